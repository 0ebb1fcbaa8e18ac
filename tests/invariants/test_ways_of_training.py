"""Optimizers compared with their libraries, and exactly the weights trained that should be.

All cases run one after another in one process, which takes longer to start than to train.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from tests.training import (
    TOLERANCE,
    Case,
    Result,
    assert_same,
    make_config,
    plain_model,
    plain_training,
    prepare,
    rows_of,
    train_all,
)

RATE = 1e-2
LOW_RANK = {"rank": 4, "update_proj_gap": 2, "scale": 0.5}
CASES: dict[str, dict[str, Any]] = {
    "full": {},
    "checkpointed": {"train.gradient_checkpointing": True},
    "checkpointed in part, inputs on the CPU": {
        "train.gradient_checkpointing": True,
        "train.recompute_layers": 1,
        "train.offload.activations": "cpu",
    },
    "eager": {"model.attention": "eager"},
    "adafactor": {"train.optimizer": "adafactor"},
    "muon": {"train.optimizer": "muon"},
    "muon in bfloat16": {"train.optimizer": "muon", "model.dtype": "bfloat16"},
    "adam_mini": {"train.optimizer": "adam_mini"},
    "galore": {"train.optimizer": "galore", "train.optimizer_options": LOW_RANK},
    "apollo": {"train.optimizer": "apollo", "train.optimizer_options": LOW_RANK},
    "badam": {"train.optimizer": "badam", "train.optimizer_options": {"switch_block_every": 2}},
    "last layer": {"model.finetuning": "freeze", "model.freeze.layers": 1},
    "first layer": {"model.finetuning": "freeze", "model.freeze.layers": -1},
    "mlp of all layers, and the embedding": {
        "model.finetuning": "freeze",
        "model.freeze.modules": ["mlp"],
        "model.freeze.extra_modules": ["embed_tokens"],
    },
    "lora": {"model.finetuning": "lora"},
    "lora on two modules": {
        "model.finetuning": "lora",
        "model.lora.target": ["q_proj", "v_proj"],
        "model.lora.extra_modules": ["norm"],
    },
    "dora": {"model.finetuning": "lora", "model.lora.dora": True},
    "rslora": {"model.finetuning": "lora", "model.lora.rslora": True},
    "pissa": {"model.finetuning": "lora", "model.lora.pissa": True, "train.learning_rate": 1e-3},
    "exact pissa": {
        "model.finetuning": "lora",
        "model.lora.pissa": True,
        "model.lora.pissa_iterations": 0,
        "train.learning_rate": 1e-3,
    },
    "loraplus": {"model.finetuning": "lora", "model.lora.loraplus_ratio": 4.0},
    "oft": {"model.finetuning": "oft", "model.oft.block_size": 16},
    "4bit": {"model.finetuning": "lora", "model.quantization": "4bit"},
    "8bit": {"model.finetuning": "lora", "model.quantization": "8bit"},
}


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    return prepare(tmp_path_factory.mktemp("ways"))


@pytest.fixture(scope="module")
def trained(prepared) -> dict[str, Result]:
    """Case → its training with one worker."""
    folder, model, manifest = prepared
    cases = [
        Case(make_config(folder, model, settings, micro_batch_size=4), rows_of(manifest)) for settings in CASES.values()
    ]
    return dict(zip(CASES, train_all(cases), strict=True))


def decayed(model: torch.nn.Module) -> list[dict[str, Any]]:
    """Two groups, matrices and vectors, as the optimizers get them."""
    parameters = list(model.parameters())
    return [{"params": [p for p in parameters if p.dim() >= 2]}, {"params": [p for p in parameters if p.dim() < 2]}]


def is_inner(name: str, parameter: torch.Tensor) -> bool:
    return parameter.dim() == 2 and "embed" not in name and "lm_head" not in name


class Both(torch.optim.Optimizer):
    """Two optimizers with one learning rate, written by hand."""

    def __init__(self, *optimizers):
        super().__init__([torch.nn.Parameter(torch.zeros(1))], {"lr": RATE})
        self.optimizers = optimizers

    def step(self):  # type: ignore[override]
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = self.param_groups[0]["lr"]
            optimizer.step()

    def zero_grad(self):  # type: ignore[override]
        for optimizer in self.optimizers:
            optimizer.zero_grad()


def adafactor(model):
    from transformers import Adafactor

    return Adafactor(decayed(model), lr=RATE, scale_parameter=False, relative_step=False)


def muon(model):
    inner = [p for n, p in model.named_parameters() if is_inner(n, p)]
    rest = [p for n, p in model.named_parameters() if not is_inner(n, p)]
    return Both(
        torch.optim.Muon(inner, lr=RATE, weight_decay=0.0, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(rest, lr=RATE, eps=1e-4, weight_decay=0.0),
    )


def adam_mini(model):
    from pytorch_optimizer import AdamMini

    return AdamMini(model, lr=RATE, eps=1e-4, weight_decay=0.0, num_embeds=64, num_heads=4, num_query_groups=2)


def low_rank(kind: str, **options):
    def make(model):
        import apollo_torch

        inner = [p for n, p in model.named_parameters() if is_inner(n, p)]
        rest = [p for n, p in model.named_parameters() if not is_inner(n, p)]
        matrices = [p for p in rest if p.dim() == 2]
        vectors = [p for p in rest if p.dim() < 2]
        groups = [
            {"params": inner, **LOW_RANK, "proj_type": "std", **options},
            {"params": matrices},
            {"params": vectors},
        ]
        return getattr(apollo_torch, kind)(groups, lr=RATE, eps=1e-4, weight_decay=0.0)

    return make


def badam(model):
    from badam import BlockOptimizer

    base = torch.optim.AdamW(decayed(model), lr=RATE, eps=1e-4, weight_decay=0.0)
    return BlockOptimizer(
        base, list(model.named_parameters()), switch_mode="ascending", switch_block_every=2, verbose=0
    )


@pytest.mark.parametrize(
    ("case", "make"),
    [
        ("adafactor", adafactor),
        ("muon", muon),
        ("adam_mini", adam_mini),
        ("galore", low_rank("GaLoreAdamW")),
        ("apollo", low_rank("APOLLOAdamW", proj="random", scale_type="channel")),
        ("badam", badam),
    ],
)
def test_an_optimizer_steps_as_its_library_used_alone(prepared, trained, case, make):
    _, path, manifest = prepared
    losses, _, weights = plain_training(plain_model(path), rows_of(manifest), make)
    ours = trained[case]
    # Muon's matrix iteration is computed in bfloat16, which makes rounding larger.
    tolerance = 1e-3 if case == "muon" else TOLERANCE
    np.testing.assert_allclose(ours.losses, losses, rtol=tolerance)
    for name, weight in weights.items():
        np.testing.assert_allclose(ours.weights[name], weight, rtol=1e-4, atol=tolerance, err_msg=name)


@pytest.mark.parametrize("case", ["checkpointed", "eager"])
def test_saving_memory_or_time_does_not_change_the_training(trained, case):
    assert_same(trained["full"][:4], trained[case][:4])


def test_muon_in_bfloat16_keeps_float32_weights_and_follows_float32(trained):
    np.testing.assert_allclose(trained["muon in bfloat16"].losses, trained["muon"].losses, rtol=3e-3)
    name = "model.layers.0.mlp.up_proj.weight"
    weights = trained["muon in bfloat16"].weights[name]
    assert not np.array_equal(weights, torch.tensor(weights).bfloat16().float().numpy())


@pytest.mark.parametrize(
    ("case", "expected"),
    [
        ("last layer", lambda name: name.startswith("model.layers.1.")),
        ("first layer", lambda name: name.startswith("model.layers.0.")),
        ("mlp of all layers, and the embedding", lambda name: ".mlp." in name or "embed_tokens" in name),
        ("full", lambda name: True),
    ],
)
def test_exactly_the_weights_that_should_change_do(prepared, trained, case, expected):
    before = {name: p.detach().numpy() for name, p in plain_model(prepared[1]).named_parameters()}
    after = trained[case].weights
    changed = {name for name in before if not np.array_equal(before[name], after[name])}
    assert changed == {name for name in before if expected(name)}


ADAPTERS = [name for name, settings in CASES.items() if settings.get("model.finetuning") in ("lora", "oft")]


@pytest.mark.parametrize("case", ADAPTERS)
def test_every_matrix_of_an_adapter_learns_and_the_base_stays(prepared, trained, case):
    weights = trained[case].weights
    if "oft" in case:
        assert all("oft_R" in name for name in weights)
        assert all(np.abs(value).max() > 0 for value in weights.values())
        return
    matrices = [name for name in weights if "lora_B" in name]
    two = "two modules" in case
    assert len(matrices) == (4 if two else 14)
    assert all(np.abs(weights[name]).max() > 0 for name in matrices), "B starts at zero and learns at once"
    rank = 16 if "pissa" in case else 8  # the difference from the start of PiSSA has twice its rank
    assert all(weights[name].shape[0] == rank for name in weights if "lora_A" in name)
    whole = [name for name in weights if "lora" not in name]
    assert whole == (["base_model.model.model.norm.weight"] if two else [])


@pytest.mark.parametrize("case", ADAPTERS)
def test_the_exported_adapter_is_the_trained_one(prepared, trained, case):
    """Loaded with peft on the unchanged base, it has the loss that training ended with; merged, the same logits."""
    from raysft.train.finetuning import load_trained
    from raysft.train.loss import TokenLoss
    from raysft.train.step import microbatches

    folder, path, manifest = prepared
    result = trained[case]
    config = make_config(folder, path, CASES[case])
    model = load_trained(config, result.model).eval()
    rows = rows_of(manifest)
    with torch.no_grad():
        losses = [
            TokenLoss(model).eval()(**part, score=True)[0].item()
            for batch in rows.steps(0, 0, 1)
            for part in microbatches(batch, 4, torch.device("cpu"))
        ]
    tolerance = 1e-2 if "bit" in case else 2e-5
    assert sum(losses) / rows.row_plan.step_loss_tokens.sum() == pytest.approx(
        result.evaluation["eval_loss"], rel=tolerance
    )
    if "bit" in case:
        return
    ids = torch.arange(60)[None]
    with torch.no_grad():
        apart = model(input_ids=ids, use_cache=False).logits
        merged = model.merge_and_unload()(input_ids=ids, use_cache=False).logits
    torch.testing.assert_close(merged, apart, rtol=1e-4, atol=1e-4)


def test_pissa_starts_with_the_loss_of_the_model(trained):
    for case in ("pissa", "exact pissa"):
        assert trained[case].losses[0] == pytest.approx(trained["lora"].losses[0], rel=TOLERANCE)
    assert trained["pissa"].losses[1:] != trained["lora"].losses[1:]


def test_loraplus_steps_as_pefts_own(prepared, trained):
    from peft import LoraConfig, get_peft_model
    from peft.optimizers import create_loraplus_optimizer

    _, path, manifest = prepared
    base = plain_model(path)
    torch.manual_seed(3)
    model = get_peft_model(base, LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM"))

    def make(model):
        return create_loraplus_optimizer(
            model,
            torch.optim.AdamW,
            lr=RATE,
            loraplus_lr_ratio=4.0,
            loraplus_weight_decay=0.0,
            eps=1e-4,
            weight_decay=0.0,
        )

    losses, _, _ = plain_training(model, rows_of(manifest), make)
    np.testing.assert_allclose(trained["loraplus"].losses, losses, rtol=TOLERANCE)


@pytest.mark.parametrize("case", ["4bit", "8bit"])
def test_a_quantized_base_trains_about_like_the_exact_one(trained, case):
    """Also after an evaluation at the start, which once left weights in a layout with wrong gradients."""
    np.testing.assert_allclose(trained[case].losses, trained["lora"].losses, rtol=0.015)
