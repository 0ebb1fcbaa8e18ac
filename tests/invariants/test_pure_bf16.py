"""Training in bfloat16 alone: weights, gradients and optimizer states, without float32 copies."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from tests.training import Case, make_config, prepare, rows_of, train_all

PURE: dict[str, Any] = {"model.dtype": "bfloat16", "train.pure_bf16": True}
LOW_RANK = {"rank": 4, "update_proj_gap": 2, "scale": 0.5}
OPTIMIZERS: dict[str, dict[str, Any]] = {
    "adafactor": {},
    "muon": {},
    "adam_mini": {},
    "galore": {"train.optimizer_options": LOW_RANK},
    "apollo": {"train.optimizer_options": LOW_RANK},
}


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    return prepare(tmp_path_factory.mktemp("pure"))


def case(prepared, settings: dict[str, Any], stage: int = 0, **more: Any) -> Case:
    folder, model, manifest = prepared
    config = make_config(folder, model, {**PURE, **settings}, zero_stage=stage, micro_batch_size=4)
    return Case(config, rows_of(manifest), **more)


@pytest.fixture(scope="module")
def trained(prepared):
    """Case → its training with one worker; checkpoints of the stages are kept."""
    folder = prepared[0]
    unclipped = {"train.max_grad_norm": 0.0, "train.save_every_steps": 2}
    cases = {f"stage {stage}": case(prepared, unclipped, stage, keep=folder / f"stage {stage}") for stage in range(4)}
    cases["mixed"] = case(prepared, {"train.pure_bf16": False, "train.max_grad_norm": 0.0})
    cases["lora"] = case(prepared, {"model.finetuning": "lora", "train.save_every_steps": 2}, keep=folder / "lora")
    cases["lora, mixed"] = case(prepared, {"model.finetuning": "lora", "train.pure_bf16": False})
    cases["small steps"] = case(prepared, {"train.learning_rate": 1e-7})
    for name, options in OPTIMIZERS.items():
        cases[name] = case(prepared, {"train.optimizer": name, **options})
        cases[f"{name}, mixed"] = case(prepared, {"train.optimizer": name, "train.pure_bf16": False, **options})
    return dict(zip(cases, train_all(list(cases.values())), strict=True))


def plain(prepared) -> tuple[list[float], dict[str, torch.Tensor]]:
    """A plain loop of torch in bfloat16, with the loss of raysft alone: losses, and weights at the end."""
    from transformers import get_scheduler

    from raysft.train.finetuning import load_model
    from raysft.train.loss import TokenLoss
    from raysft.train.step import microbatches

    folder, path, manifest = prepared
    rows = rows_of(manifest)
    model = TokenLoss(load_model(make_config(folder, path, PURE), str(path))).train()
    assert {weight.dtype for weight in model.parameters()} == {torch.bfloat16}
    parameters = list(model.parameters())
    groups = [[p for p in parameters if p.dim() >= 2], [p for p in parameters if p.dim() < 2]]
    optimizer = torch.optim.AdamW(
        [{"params": group} for group in groups], lr=1e-2, eps=1e-4, weight_decay=0.0, fused=True
    )
    schedule = get_scheduler("cosine", optimizer, num_warmup_steps=0, num_training_steps=rows.row_plan.steps)
    losses = []
    for step in range(rows.row_plan.steps):
        (part,) = microbatches(rows.batch(rows.rows_for_rank(step, 0, 1)), 4, torch.device("cpu"))
        weight = float(rows.row_plan.step_weight[step])
        loss = model(**part)[0]
        losses.append(loss.item() / weight)
        (loss * (1 / weight)).backward()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    assert all(state["exp_avg"].dtype == torch.bfloat16 for state in optimizer.state.values())
    return losses, {
        name.removeprefix(
            "model.",
        ): weight.detach()
        for name, weight in model.named_parameters()
    }


def test_every_stage_steps_as_a_plain_loop_of_torch(prepared, trained):
    losses, weights = plain(prepared)
    for stage in range(4):
        result = trained[f"stage {stage}"]
        assert not result.failure, (stage, result.failure)
        assert result.losses == losses, stage
        for name, weight in weights.items():
            assert np.array_equal(result.weights[name], weight.float().numpy()), (stage, name)
    assert trained["mixed"].losses != losses


@pytest.mark.parametrize("name", [*(f"stage {stage}" for stage in range(4)), "lora"])
def test_a_checkpoint_holds_bfloat16_alone(prepared, trained, name):
    from safetensors import safe_open

    with safe_open(prepared[0] / name / "checkpoint_2" / "part_0.safetensors", "pt") as file:
        types = {key.partition(":")[0]: file.get_slice(key).get_dtype() for key in file.keys()}  # noqa: SIM118
    assert types == {"weight": "BF16", "exp_avg": "BF16", "exp_avg_sq": "BF16"}


def test_an_adapter_in_bfloat16_follows_one_with_float32_copies(trained):
    np.testing.assert_allclose(trained["lora"].losses, trained["lora, mixed"].losses, rtol=3e-2)
    assert trained["lora"].losses != trained["lora, mixed"].losses


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_each_optimizer_follows_its_training_in_mixed_precision(trained, name):
    result = trained[name]
    assert not result.failure, result.failure
    np.testing.assert_allclose(result.losses, trained[f"{name}, mixed"].losses, rtol=5e-2)
    assert all(np.array_equal(w, torch.tensor(w).bfloat16().float().numpy()) for w in result.weights.values())


def test_small_updates_are_rounded_away(prepared, trained):
    """As the documentation warns: a step of 1e-7 changes no weight of a usual size."""
    from tests.training import plain_model

    before = {
        name: weight.detach().bfloat16().float().numpy() for name, weight in plain_model(prepared[1]).named_parameters()
    }
    after = trained["small steps"].weights
    moved = sum(int((before[name] != after[name]).sum()) for name in before)
    assert moved < 0.01 * sum(weight.size for weight in before.values())


@pytest.mark.parametrize("stage", [0, 2, 3])
def test_two_workers_follow_one(prepared, trained, stage):
    (two,) = train_all([case(prepared, {"train.max_grad_norm": 0.0, "train.micro_batch_size": 2}, stage)], 2)
    assert not two.failure, two.failure
    np.testing.assert_allclose(two.losses, trained["stage 0"].losses, rtol=2e-2)
