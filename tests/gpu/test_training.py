"""The invariants of a training, on a GPU: against the same training on a CPU, and however it is split."""

import importlib.util
from typing import Any

import numpy as np
import pytest

from raysft.data.rows.packed_dataset import PackedDataset
from raysft.telemetry.events import EvaluationDone, StepRecord
from tests.training import SEQUENCE_LENGTH, STEPS, Case, Result, make_config, prepare, rows_of, train, train_all

HALF = STEPS // 2
FLOAT32, BFLOAT16 = 1e-4, 2e-2
"""Relative tolerances. Kernels of a GPU add in another order than those of a CPU; bfloat16 has 8 bits."""
LORA: dict[str, Any] = {"finetuning": "lora", "micro_batch_size": 4}


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    return prepare(tmp_path_factory.mktemp("gpu"))


def unpacked(manifest) -> PackedDataset:
    """The examples, each in a row of its own, in their order."""
    path = f"{manifest.directory}/manifest.parquet"
    return PackedDataset((path,), SEQUENCE_LENGTH, 4, layout="single", shuffle=False)


@pytest.fixture(scope="module")
def trained(device, prepared) -> dict[str, Result]:
    """Name of a training → its result."""
    folder, model, manifest = prepared
    rows, single = rows_of(manifest), unpacked(manifest)
    packed = PackedDataset((f"{manifest.directory}/manifest.parquet",), SEQUENCE_LENGTH, 4, shuffle=False)
    cases: dict[str, Case] = {}
    for dtype in ("float32", "bfloat16"):

        def case(name: str, dtype: str = dtype, **options: Any) -> None:
            name = f"{dtype} {name}"
            train = {"micro_batch_size": 4, "save_every_steps": HALF} | options.pop("train", {})
            settings = {"model.dtype": dtype, "scaling.use_gpu": device == "cuda"}
            cases[name] = Case(make_config(folder / name, model, settings, **train), rows, **options)

        for stage in (0, 1, 2, 3):
            case(f"ZeRO {stage}", train={"zero_stage": stage}, keep=folder / f"kept-{dtype}-{stage}")
            kept = folder / f"kept-{dtype}-{stage}" / f"checkpoint_{HALF}"
            case(f"ZeRO {stage} resumed", train={"zero_stage": stage}, resume=kept)
        case("microbatches of 1", train={"micro_batch_size": 1})
        case("recomputed", train={"gradient_checkpointing": True})
        on_cpu = {"recompute_layers": 1, "offload": {"activations": "cpu"}}
        case("recomputed in part, inputs on the CPU", train={"gradient_checkpointing": True, **on_cpu})
        case("evaluated packed", eval_rows=packed)
        case("evaluated unpacked", eval_rows=single)
        case("LoRA", train=LORA, keep=folder / f"kept-{dtype}-lora")
        case("LoRA resumed", train=LORA, resume=folder / f"kept-{dtype}-lora" / f"checkpoint_{HALF}")
    return dict(zip(cases, train_all(list(cases.values()), device=device), strict=True))


def differs(one: Result, other: Result, last: int = STEPS) -> tuple[float, float]:
    """The largest relative difference of the last losses, and the largest of a trained weight."""
    assert not one.failure + other.failure
    a, b = np.asarray(one.losses[-last:]), np.asarray(other.losses[-last:])
    assert len(a) == len(b) == last
    assert one.weights.keys() == other.weights.keys()
    weights = max(float(np.abs(one.weights[name] - other.weights[name]).max()) for name in one.weights)
    return float((np.abs(a - b) / np.abs(b)).max()), weights


def show(what: str, difference: tuple[float, float]) -> float:
    """Print a difference and return that of the losses."""
    print(f"{what}: losses differ by {difference[0]:.1e}, weights by {difference[1]:.1e}")
    return difference[0]


def test_float32_is_that_of_a_cpu(device, prepared, trained):
    folder, model, manifest = prepared
    on_cpu = train(make_config(folder, model, micro_batch_size=4), rows_of(manifest))
    ours = trained["float32 ZeRO 0"]
    assert show("float32 beside a CPU", differs(ours, on_cpu)) < FLOAT32
    np.testing.assert_allclose(ours.norms, on_cpu.norms, rtol=1e-3)
    assert ours.evaluation["eval_loss"] == pytest.approx(on_cpu.evaluation["eval_loss"], rel=FLOAT32)


@pytest.mark.parametrize("name", ["ZeRO 1", "ZeRO 2", "ZeRO 3", "microbatches of 1", "recomputed"])
@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", FLOAT32), ("bfloat16", BFLOAT16)])
def test_the_way_it_is_split_changes_no_loss(trained, dtype, tolerance, name):
    difference = differs(trained[f"{dtype} {name}"], trained[f"{dtype} ZeRO 0"])
    assert show(f"{dtype}, {name} beside ZeRO 0", difference) < tolerance


@pytest.mark.parametrize("name", ["ZeRO 0", "LoRA"])
def test_bfloat16_is_float32_rounded(trained, name):
    difference = differs(trained[f"bfloat16 {name}"], trained[f"float32 {name}"])
    assert show(f"{name}, bfloat16 beside float32", difference) < BFLOAT16


@pytest.mark.parametrize("name", ["ZeRO 0", "ZeRO 1", "ZeRO 2", "ZeRO 3", "LoRA"])
@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", FLOAT32), ("bfloat16", BFLOAT16)])
def test_a_resumed_training_is_an_uninterrupted_one(trained, dtype, tolerance, name):
    difference = differs(trained[f"{dtype} {name} resumed"], trained[f"{dtype} {name}"], last=STEPS - HALF)
    assert show(f"{dtype}, {name}, resumed beside uninterrupted", difference) < tolerance


@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", FLOAT32), ("bfloat16", BFLOAT16)])
def test_packing_does_not_change_the_loss_of_an_evaluation(trained, dtype, tolerance):
    losses = []
    for name in ("evaluated packed", "evaluated unpacked"):
        first = next(event for event in trained[f"{dtype} {name}"].events if isinstance(event, EvaluationDone))
        assert first.record["current_steps"] == 0
        losses.append(first.record["eval_loss"])
    print(f"{dtype}: packed {losses[0]:.6f}, unpacked {losses[1]:.6f}")
    assert losses[0] == pytest.approx(losses[1], rel=tolerance)


def test_the_memory_of_a_step_is_that_of_the_gpu(device, trained):
    records = [event for event in trained["bfloat16 ZeRO 2"].events if isinstance(event, StepRecord)]
    assert all(0 < record.memory_gib < record.memory_total_gib for record in records)
    if device == "cuda":
        import torch

        assert records[0].memory_total_gib == pytest.approx(torch.cuda.mem_get_info()[1] / 2**30, rel=0.02)
        assert records[-1].memory_gib < 4, "a tiny model"


def small_change(device: str, prepared: Any, name: str, settings: dict[str, Any], **train_options: Any) -> None:
    """A way of training that rounds otherwise: its losses are those of the usual one within bfloat16."""
    folder, model, manifest = prepared
    usual = {"model.dtype": "bfloat16", "scaling.use_gpu": device == "cuda"}
    options = {"micro_batch_size": 4, "zero_stage": 2, **train_options}
    one, other = train_all(
        [
            Case(make_config(folder, model, {**usual, **settings}, **options), rows_of(manifest)),
            Case(make_config(folder, model, usual, **options), rows_of(manifest)),
        ],
        device=device,
    )
    assert not one.failure + other.failure
    a, b = np.asarray(one.losses), np.asarray(other.losses)
    print(f"{name}: losses differ by {(np.abs(a - b) / b).max():.1e}")
    np.testing.assert_allclose(a, b, rtol=2 * BFLOAT16)


PACKAGES = {
    "liger": "liger_kernel",
    "fp8": "torchao",
    "4bit": "bitsandbytes",
    "8bit": "bitsandbytes",
    "compiled": "triton",
    "fp8, one row at a time": "torchao",
    "fp8, compiled": "torchao",
    "flash attention 2": "flash_attn",
    "flash attention 3": "flash_attn_interface",
    "flash attention 2, compiled": "flash_attn",
}
SETTINGS: dict[str, dict[str, Any]] = {
    "liger": {"model.liger": True},
    "fp8": {"train.fp8": "torchao"},
    "fp8, one row at a time": {"train.fp8": "torchao", "train.micro_batch_size": 1},
    "4bit": {"model.quantization": "4bit"},
    "8bit": {"model.quantization": "8bit"},
    "compiled": {"train.compile": True},
    "fp8, compiled": {"train.fp8": "torchao", "train.compile": True},
    "flash attention 2": {"model.attention": "flash_attention_2"},
    "flash attention 3": {"model.attention": "flash_attention_3"},
    "flash attention 2, compiled": {"model.attention": "flash_attention_2", "train.compile": True},
}


@pytest.mark.parametrize("name", SETTINGS)
def test_a_package_for_gpus_changes_no_loss_by_more_than_rounding(device, prepared, name):
    if device == "cpu" or importlib.util.find_spec(PACKAGES[name]) is None:
        pytest.skip(f"needs a GPU and {PACKAGES[name]}")
    lora = {"finetuning": "lora"} if "bit" in name else {}
    small_change(device, prepared, name, SETTINGS[name], **lora)


def test_offload_changes_no_loss(device, prepared):
    small_change(device, prepared, "offload", {"train.offload": {"optimizer": "cpu"}})
