"""ASFT: the loss of a training and its gradients, and that the frozen model stays what training started from."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from raysft.data.types import IGNORE_INDEX
from raysft.telemetry.events import SetupDone
from raysft.train.flops import weights_of
from raysft.train.objective import Objective
from tests.tiny import tiny_model
from tests.training import (
    TOLERANCE,
    Case,
    assert_same,
    examples_of,
    make_config,
    plain_model,
    prepare,
    rows_of,
    train_all,
)

ALPHA = 2.0
ASFT: dict[str, Any] = {"train.loss": "asft", "train.asft_alpha": ALPHA}
LORA: dict[str, Any] = {"model.finetuning": "lora"}
WHOLE: dict[str, Any] = {**LORA, "model.lora.target": ["q_proj", "v_proj"], "model.lora.extra_modules": ["lm_head"]}
"""LoRA with a module that is trained in full."""
FREEZE: dict[str, Any] = {"model.finetuning": "freeze", "model.freeze.layers": 1}


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    return prepare(tmp_path_factory.mktemp("asft"))


@pytest.fixture(scope="module")
def other(tmp_path_factory):
    """Another model with the same tokens."""
    return str(tiny_model(tmp_path_factory.mktemp("other"), seed=7))


@pytest.fixture(scope="module")
def trained(prepared, other):
    """Case → its training with one worker."""
    folder, model, manifest = prepared
    cases = {
        "dft": {"train.loss": "dft"},
        "full": ASFT,
        "checkpointed": {**ASFT, "train.gradient_checkpointing": True},
        "bfloat16": {**ASFT, "model.dtype": "bfloat16"},
        "autocast": {**ASFT, "model.dtype": "bfloat16", "train.optimizer": "muon"},
        "freeze": {**ASFT, **FREEZE},
        "lora": {**ASFT, **LORA},
        "whole": {**ASFT, **WHOLE},
        "given": {**ASFT, "train.reference_model": other},
        "given to lora": {**ASFT, **LORA, "train.reference_model": other},
    }
    made = [
        Case(
            make_config(folder, model, settings, micro_batch_size=4),
            rows_of(manifest),
            reference=settings.get("train.reference_model"),
            eval_rows=rows_of(manifest, steps=1),
        )
        for settings in cases.values()
    ]
    return dict(zip(cases, train_all(made), strict=True))


def exact_loss(model: Any, reference: Any, batch: Any, alpha: float = ALPHA) -> torch.Tensor:
    """The loss of a step of four rows, example by example: Σ sg(p[t]) · −log p[t] + α Σ q (log q − log p), by the loss tokens."""
    total, count = torch.zeros((), dtype=torch.float64), 0
    for row in range(4):
        for ids, labels in examples_of(batch, row):
            targets, (p, q) = (
                labels[1:],
                (each(input_ids=ids[None], use_cache=False).logits[0] for each in (model, reference)),
            )
            chosen = targets != IGNORE_INDEX
            p, q = F.log_softmax(p[:-1][chosen], -1), F.log_softmax(q[:-1][chosen].detach(), -1)
            logs = p.gather(1, targets[chosen][:, None])[:, 0]
            total = total - (logs.exp().detach() * logs).sum() + alpha * (q.exp() * (q - p)).sum()
            count += int(chosen.sum())
    return total / count


def exact_training(path: Any, reference: Any, rows: Any) -> list[float]:
    """Losses of a plain loop in float64."""
    from transformers import get_scheduler

    model, frozen = plain_model(path).double(), plain_model(reference).double()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, eps=1e-4, weight_decay=0.0)
    schedule = get_scheduler("cosine", optimizer, num_warmup_steps=0, num_training_steps=rows.row_plan.steps)
    losses = []
    for step in range(rows.row_plan.steps):
        loss = exact_loss(model, frozen, rows.batch(rows.rows_for_rank(step, 0, 1)))
        losses.append(loss.item())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    return losses


def test_a_training_is_that_of_the_formula(prepared, trained, other):
    _, path, manifest = prepared
    rows = rows_of(manifest)
    expected = exact_training(path, path, rows)
    np.testing.assert_allclose(trained["full"].losses, expected, rtol=1e-4)
    assert abs(expected[-1] / trained["dft"].losses[-1] - 1) > 0.01, "the reference has an effect"
    np.testing.assert_allclose(trained["given"].losses, exact_training(path, other, rows), rtol=1e-4)


def test_what_saves_memory_or_computes_in_bfloat16_follows_it(trained):
    assert_same(trained["full"][:4], trained["checkpointed"][:4])
    np.testing.assert_allclose(trained["bfloat16"].losses, trained["full"].losses, rtol=2e-2)
    assert np.isfinite(trained["autocast"].losses).all()


def test_the_first_step_has_no_divergence(trained):
    for case in ("full", "freeze", "lora", "whole"):
        assert trained[case].losses[0] == pytest.approx(trained["dft"].losses[0], rel=1e-6), case
    assert trained["given to lora"].losses[0] > trained["dft"].losses[0]


def parameters(result: Any) -> int:
    return next(event.parameters for event in result.events if isinstance(event, SetupDone))


def test_the_reference_does_not_count_as_a_part_of_the_model(trained):
    assert parameters(trained["full"]) == parameters(trained["dft"])
    assert parameters(trained["given to lora"]) == parameters(trained["lora"])


WAYS = {"full": {}, "freeze": FREEZE, "lora": LORA, "whole": WHOLE}


@pytest.mark.parametrize("world", [1, 2, 3])
def test_workers_microbatches_and_stages_do_not_change_it(prepared, trained, other, world):
    """Three workers have fillers, and so workers without a loss token; chunks are of 16 tokens."""
    folder, model, manifest = prepared
    cases, names = [], []
    for stage in (0, 2, 3) if world == 2 else (3,):
        for name, settings in {**WAYS, "given": {"train.reference_model": other}}.items():
            config = make_config(folder, model, {**ASFT, **settings}, zero_stage=stage, micro_batch_size=1)
            reference, few = settings.get("train.reference_model"), rows_of(manifest, steps=1)
            cases.append(Case(config, rows_of(manifest), reference=reference, eval_rows=few, chunk_tokens=16))
            names.append(name)
    for name, result in zip(names, train_all(cases, world), strict=True):
        assert not result.failure, (name, result.failure)
        assert_same(trained[name], result, tolerance=1e-4)  # Adam turns rounding of gradients near 0 into steps


def made(prepared, settings: dict[str, Any], adapter: str | None = None) -> Any:
    """The model with its loss, as an engine gets it."""
    from raysft.train.engine import _loss_model

    folder, path, _ = prepared
    config = make_config(folder, path, {**ASFT, **settings})
    return _loss_model(config, str(path), torch.device("cpu"), adapter, None)


def microbatch(prepared) -> dict[str, torch.Tensor]:
    from raysft.train.step import microbatches

    return next(iter(microbatches(rows_of(prepared[2]).batch(range(4)), 4, torch.device("cpu"))))


def losses_of(model: Any, part: dict[str, torch.Tensor]) -> tuple[float, float]:
    """The losses with ASFT and with DFT."""
    found = []
    for objective in (Objective("asft", asft_alpha=1e6), Objective("dft")):
        model.objective = objective
        found.append(model(**part)[0].item())
    return found[0], found[1]


@pytest.mark.parametrize("name", ["full", "freeze", "lora", "whole", "pissa", "4bit", "bfloat16"])
def test_before_the_first_step_the_divergence_is_exactly_zero(prepared, name):
    more = {
        "pissa": {**LORA, "model.lora.pissa": True},
        "4bit": {**LORA, "model.quantization": "4bit"},
        "bfloat16": {"model.dtype": "bfloat16", "train.zero_stage": 1},
    }
    model = made(prepared, {**WAYS, **more}[name]).train()
    with_reference, without = losses_of(model, microbatch(prepared))
    assert with_reference == without
    with torch.no_grad():
        for weight in model.parameters():
            if weight.requires_grad:
                weight.add_(0.01)
    with_reference, without = losses_of(model, microbatch(prepared))
    assert with_reference > without + 1, "the reference did not change with the model"


@pytest.mark.parametrize("name", ["lora", "oft", "dora", "whole", "freeze", "continued"])
def test_gradients_are_those_of_the_formula_and_the_reference_has_none(prepared, trained, name):
    settings = {
        "oft": {"model.finetuning": "oft", "model.oft.block_size": 16},
        "dora": {**LORA, "model.lora.dora": True},
    }
    settings |= {**WAYS, "continued": dict(WHOLE)}
    adapter = str(trained["whole"].model) if name == "continued" else None
    settings["continued"] |= {"model.adapters": [adapter]} if adapter else {}
    model = made(prepared, settings[name], adapter)
    start = made(prepared, settings[name], adapter).model.double()  # the same weights
    torch.manual_seed(1)
    with torch.no_grad():
        for weight in model.parameters():
            if weight.requires_grad:
                weight.add_(0.05 * torch.randn_like(weight))
    exact = made(prepared, settings[name], adapter).model.double()
    ours = {key: weight for key, weight in model.model.named_parameters() if weight.requires_grad}
    exact.load_state_dict({key: weight.double() for key, weight in ours.items()}, strict=False)
    batch, count = rows_of(prepared[2]).batch(range(4)), 0
    for row in range(4):
        count += sum(int((labels[1:] != IGNORE_INDEX).sum()) for _, labels in examples_of(batch, row))
    total = model.train()(**microbatch(prepared))[0]
    total.backward()
    expected = exact_loss(exact.eval(), start.eval(), batch) * count
    expected.backward()
    assert total.item() == pytest.approx(expected.item(), rel=TOLERANCE)
    theirs = dict(exact.named_parameters())
    for key, weight in ours.items():
        assert weight.grad is not None, key
        assert weight.grad.any(), key
        np.testing.assert_allclose(weight.grad, theirs[key].grad, rtol=2e-3, atol=2e-3, err_msg=key)
    frozen = [weight for key, weight in model.named_parameters() if not key.startswith("model.") or ".start." in key]
    assert not any(weight.requires_grad or weight.grad is not None for weight in frozen)
    if name == "continued":
        counted = sum(weight.numel() for _, weight in weights_of(model.model))
        assert counted == parameters(trained["whole"]), "the adapter as it was at the start is no part of the model"


def test_a_frozen_copy_holds_only_what_is_trained(prepared):
    def held(settings):
        return sum(weight.numel() for weight in made(prepared, settings).parameters())

    def trains(settings):
        return sum(weight.numel() for weight in made(prepared, settings).parameters() if weight.requires_grad)

    plain = {"train.loss": "dft"}
    for settings, copied in (
        (LORA, False),
        (WHOLE, False),
        (FREEZE, True),
        ({}, True),
        ({**LORA, "model.lora.pissa": True}, True),
    ):
        beside = held(settings) - held({**settings, **plain})
        assert beside == (trains(settings) if copied else 0), settings


def test_the_reference_has_neither_noise_nor_dropout(prepared, tmp_path):
    """Its states are the same each time, also where the training draws noise and dropout."""
    folder, path, manifest = prepared
    source = plain_model(path)
    source.config.attention_dropout = 0.5
    source.save_pretrained(tmp_path / "model")
    changed = (folder, tmp_path / "model", manifest)
    part = microbatch(prepared)
    for settings in ({"train.neftune_alpha": 50.0}, {**LORA, "model.lora.dropout": 0.5, "train.neftune_alpha": 50.0}):
        model = made(changed, {**settings, "model.attention": "eager"}).train()
        places = part["input_ids"], part["position_ids"]
        once, again = model._reference_states(*places), model._reference_states(*places)
        assert torch.equal(once, again)
        assert all(module.training for module in model.model.modules())
        plain = made(prepared, {"model.attention": "eager"}).model.eval()
        with torch.no_grad():
            expected = model.hidden_states(plain.base_model, places[0], places[1])
        torch.testing.assert_close(once, expected, rtol=TOLERANCE, atol=TOLERANCE)


def test_an_adapter_on_the_head_has_no_dropout_in_the_reference(prepared, tmp_path):
    """With dropout of nearly everything, a reference that dropped too would differ from itself."""
    from raysft.train.finetuning import load_model

    folder, path, _ = prepared
    settings = {**LORA, "model.lora.target": ["lm_head"], "model.lora.dropout": 0.9}
    earlier = load_model(make_config(folder, path, settings), str(path))
    with torch.no_grad():
        for name, weight in earlier.named_parameters():
            if "lora_B" in name:
                weight.fill_(1.0)
    earlier.save_pretrained(tmp_path / "adapter")
    model = made(
        prepared, {**settings, "model.adapters": [str(tmp_path / "adapter")]}, str(tmp_path / "adapter")
    ).train()
    part = microbatch(prepared)
    hidden = model._reference_states(part["input_ids"], part["position_ids"])
    once, again = model._reference_logits(hidden), model._reference_logits(hidden)
    assert torch.equal(once, again)
    assert all(module.training for module in model.model.modules())
    without = plain_model(path)
    with torch.no_grad():
        assert not torch.allclose(once, without.lm_head(hidden)), "the adapter has an effect"


def test_an_adapter_that_goes_on_stays_close_to_how_it_was(prepared, trained):
    """On any stage, and also when it resumes; its export holds one adapter."""
    folder, path, manifest = prepared
    earlier, rows = str(trained["whole"].model), rows_of(manifest)
    keep = folder / "kept"
    one, two = (
        make_config(folder, path, {**ASFT, **WHOLE, "model.adapters": [earlier]}, zero_stage=stage, save_every_steps=2)
        for stage in (0, 3)
    )
    whole, resumed = train_all(
        [Case(one, rows, earlier, keep=keep), Case(one, rows, earlier, resume=keep / "checkpoint_2")]
    )
    (partitioned,) = train_all([Case(two, rows, earlier, chunk_tokens=16)], 2)
    assert [whole.failure, partitioned.failure] == ["", ""]
    assert_same(whole, partitioned)
    assert resumed.losses == whole.losses[2:]
    assert all(np.array_equal(resumed.weights[name], whole.weights[name]) for name in whole.weights)
    assert not any("start" in name for name in whole.weights)
    assert sorted(each.name for each in whole.model.iterdir() if each.is_dir()) == []


def test_evaluations_measure_the_cross_entropy(prepared, trained):
    model = made(prepared, {}).eval()
    part = microbatch(prepared)
    with torch.no_grad():
        found = model(**part, score=True)[0].item()
        model.objective = Objective()
        assert found == model(**part)[0].item()
