"""Every optimizer in a DeepSpeed engine: it steps as its library does alone, and goes on from a checkpoint bit for bit."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn

from raysft.config.optimizer_settings import UNDECAYED
from raysft.config.optimizers import OPTIMIZERS
from raysft.environment import environment
from tests.training import make_config

SHAPES = {"layers_a": (24, 40), "layers_bias": (40,), "layers_b": (64, 70), "norm": (24,)}
"""One of the matrices has more than 4,096 elements, from which on states are kept in 8 bits."""
STEPS = 6
OPTIONS: dict[str, dict[str, Any]] = {
    "galore": {"rank": 4, "update_proj_gap": 4},
    "fira": {"rank": 4, "update_proj_gap": 4},
    "apollo": {"rank": 4, "update_proj_gap": 4},
    "pid": {"momentum": 0.9},
    "sgd": {"momentum": 0.9},
}
PURE = {"model.dtype": "bfloat16", "train.pure_bf16": True}
DECAY: dict[str, float] = dict.fromkeys(UNDECAYED, 0.0)
UNRESUMED = ("adam_mini", "badam")
"""adam_mini is made of a model with heads (``test_checkpoints.py``), and badam does not resume."""
SOME = ("adamw_8bit", "adan", "lion", "nadam", "schedulefree_adamw")
BY_WEIGHT = [name for name, kind in OPTIMIZERS.items() if kind.elementwise]


class Quadratic(nn.Module):
    """A loss whose gradient is known, and differs from step to step."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(1)
        for name, shape in SHAPES.items():
            self.register_parameter(name, nn.Parameter(torch.randn(shape, generator=generator)))

    def forward(self, step: int) -> torch.Tensor:
        generator = torch.Generator().manual_seed(100 + step)
        parts = [
            ((weight - torch.randn(SHAPES[name], generator=generator)) ** 2).sum() * (1 + index)
            for index, (name, weight) in enumerate(self.named_parameters())
        ]
        return torch.stack(parts).sum()


@pytest.fixture(scope="module", autouse=True)
def group() -> Iterator[None]:
    """A process group of this process alone."""
    from raysft.train.deepspeed_import import deepspeed

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)  # pyright: ignore[reportPrivateImportUsage]
    with environment(LOCAL_RANK="0"):
        yield
    deepspeed.comm.destroy_process_group()  # DeepSpeed forgets its groups, which other tests of this process would get
    torch.set_num_threads(threads)


def engine_of(
    folder: Path, name: str, stage: int, clip: float = 0.0, pure: bool = False, **options: Any
) -> tuple[Any, Any]:
    """Make an engine as ``train/engine.py`` does, around a model of a few tensors."""
    from raysft.train.deepspeed_config import deepspeed_settings, with_bucket
    from raysft.train.deepspeed_import import deepspeed
    from raysft.train.deepspeed_internals import use_gloo_allreduce
    from raysft.train.optim import make_lr_scheduler, make_optimizer

    use_gloo_allreduce()
    deepspeed.init_distributed(dist_backend="gloo", auto_mpi_discovery=False, verbose=False)
    config = make_config(
        folder, Path("m"), PURE if pure else None, optimizer=name, zero_stage=stage,
        optimizer_options={**OPTIONS.get(name, {}), **options},
        schedule="constant" if OPTIMIZERS[name].averages else "linear", max_grad_norm=clip, weight_decay=DECAY.get(name, 0.1),
    )  # fmt: skip
    model = Quadratic().to(torch.bfloat16 if pure else torch.float32)
    optimizer = make_optimizer(model, config.train)
    scheduler = make_lr_scheduler(optimizer, config.train, STEPS)
    engine, *_ = deepspeed.initialize(
        model=model, optimizer=optimizer, lr_scheduler=scheduler, config=with_bucket(deepspeed_settings(config, 1), model),
        dist_init_required=False,
    )  # fmt: skip
    return engine, scheduler


def steps(engine: Any, first: int, end: int) -> None:
    for step in range(first, end):
        torch.manual_seed(step)
        engine.backward(engine(step))
        engine.step()


def weights(engine: Any) -> dict[str, torch.Tensor]:
    from raysft.train.checkpoint.zero_shards import fragments

    return {f"{each.name}:{each.start}": each.weight.clone() for each in fragments(engine, replicated=True)}


@pytest.mark.parametrize(("name", "stage"), [(name, 3) for name in BY_WEIGHT] + [(name, 1) for name in SOME])
def test_zero_steps_as_the_library_used_alone(tmp_path, name, stage):
    from raysft.train.optim import make_lr_scheduler, make_optimizer

    engine, _ = engine_of(tmp_path, name, stage)
    steps(engine, 0, STEPS)
    plain = Quadratic()
    config = make_config(
        tmp_path, Path("m"), optimizer=name, optimizer_options=OPTIONS.get(name, {}), weight_decay=DECAY.get(name, 0.1),
        schedule="constant" if OPTIMIZERS[name].averages else "linear",
    )  # fmt: skip
    optimizer = make_optimizer(plain, config.train)
    scheduler = make_lr_scheduler(optimizer, config.train, STEPS)
    for step in range(STEPS):
        plain(step).backward()
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
    found = weights(engine)
    # Codes of 8 bits depend on which weights are in a block with which.
    tolerance = 2e-2 if "8bit" in name else 1e-5
    for key, parameter in plain.named_parameters():
        torch.testing.assert_close(
            found[f"{key}:0"].view_as(parameter), parameter.detach(), rtol=tolerance, atol=tolerance
        )


@pytest.mark.parametrize(
    ("name", "stage", "pure"),
    [("sgd", stage, pure) for stage in range(4) for pure in (False, True)]
    + [(name, 0, False) for name in ("schedulefree_sgd", "sgdp")],
)
def test_a_step_of_clipped_gradients_is_as_long_as_the_rate_says(tmp_path, name, stage, pure):
    """The first step of gradient descent is the rate, 0.01, times the gradient, of which clipping leaves a length of 50."""
    engine, _ = engine_of(tmp_path, name, stage, 50.0, pure)
    for group in engine.optimizer.param_groups:
        group["weight_decay"] = 0.0
    before = weights(engine)
    steps(engine, 0, 1)
    after = weights(engine)
    moved = sum(float((after[key] - value).float().pow(2).sum()) for key, value in before.items()) ** 0.5
    # A weight of 1 has steps of 0.008 in bfloat16, and moves by 0.006.
    assert moved == pytest.approx(0.01 * 50, rel=0.2 if pure else 1e-4)


@pytest.mark.parametrize(
    ("name", "stage", "options"),
    [(name, 0, {}) for name in OPTIMIZERS if name not in UNRESUMED]
    + [(name, 3, {}) for name in BY_WEIGHT]
    + [(name, 2, {}) for name in SOME]
    + [("adabelief", 0, {"adanorm": True, "adanorm_r": 0.5}), ("lion", 0, {"cautious": True})],
)
def test_a_resumed_training_is_bit_for_bit_the_uninterrupted_one(tmp_path, name, stage, options):
    from raysft.train.checkpoint import parts, state
    from raysft.train.checkpoint.cursor import Cursor
    from raysft.train.checkpoint.resume import ResumePoint

    half = STEPS // 2
    engine, _ = engine_of(tmp_path, name, stage, **options)
    steps(engine, 0, half)
    snapshot = state.snapshot(engine, Cursor(half, half * 4, 1, {}))
    steps(engine, half, STEPS)  # what is written later is what was copied
    parts.write(snapshot, tmp_path / "checkpoint")
    resumed, scheduler = engine_of(tmp_path, name, stage, **options)
    state.load(resumed, scheduler, ResumePoint.of(tmp_path / "checkpoint"))
    steps(resumed, half, STEPS)
    whole, second = weights(engine), weights(resumed)
    assert whole.keys() == second.keys()
    for key in whole:
        assert torch.equal(whole[key], second[key]), key


@pytest.mark.parametrize("name", BY_WEIGHT)
def test_a_training_resumes_under_another_stage(tmp_path, name):
    from raysft.train.checkpoint import parts, state
    from raysft.train.checkpoint.cursor import Cursor
    from raysft.train.checkpoint.resume import ResumePoint

    half = STEPS // 2
    engine, _ = engine_of(tmp_path, name, 0)
    steps(engine, 0, half)
    parts.write(state.snapshot(engine, Cursor(half, half * 4, 1, {})), tmp_path / "checkpoint")
    steps(engine, half, STEPS)
    resumed, scheduler = engine_of(tmp_path, name, 3)
    state.load(resumed, scheduler, ResumePoint.of(tmp_path / "checkpoint"))
    steps(resumed, half, STEPS)
    second = weights(resumed)
    tolerance = 2e-2 if "8bit" in name else 1e-5
    for key, value in weights(engine).items():
        torch.testing.assert_close(second[key], value, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("stage", [0, 2, 3])
@pytest.mark.parametrize("name", ["schedulefree_adamw", "schedulefree_sgd"])
def test_the_model_to_use_is_the_average_and_the_training_goes_on_as_if_nobody_had_looked(tmp_path, name, stage):
    """Schedule-free SGD and AdamW evaluate x, for which the weights y are (1 − β)·z + β·x (Defazio et al. 2024)."""
    from raysft.train.averaging import averaged

    looked, left = engine_of(tmp_path, name, stage)[0], engine_of(tmp_path, name, stage)[0]
    for engine in (looked, left):
        steps(engine, 0, STEPS // 2)
    before = weights(looked)
    states = {}
    from raysft.train.checkpoint.zero_shards import fragments
    from raysft.train.deepspeed_internals import base_optimizer

    for each in fragments(looked, replicated=True):
        states[f"{each.name}:{each.start}"] = each.of(base_optimizer(looked).state[each.owner]["z"]).clone()
    with averaged(looked):
        for key, value in weights(looked).items():
            torch.testing.assert_close(0.1 * states[key] + 0.9 * value, before[key], rtol=1e-4, atol=1e-5)
            assert not torch.equal(value, before[key])
        loss = looked(0)
    assert loss != looked(0), "the model computes with the average"
    for engine in (looked, left):
        steps(engine, STEPS // 2, STEPS)
    for key, value in weights(looked).items():
        assert torch.equal(value, weights(left)[key])
