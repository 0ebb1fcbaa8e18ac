"""Every optimizer, and the losses and types that issue from them, on a GPU: beside a CPU, in 16 bits, and resumed."""

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest

from raysft.config.optimizers import OPTIMIZERS
from tests.training import STEPS, Case, Result, make_config, prepare, rows_of, train_all

HALF = STEPS // 2
ROUNDED = 3e-2
"""Relative tolerance of losses where a sign or a code of 8 bits may round to its neighbour."""
OPTIONS: dict[str, dict[str, Any]] = {
    name: {"rank": 4, "update_proj_gap": 2} for name in ("galore", "fira", "apollo")
} | {name: {"momentum": 0.9} for name in ("pid", "sgd")}  # fmt: skip
RATES = {"ex_adam": 1e-3, "kate": 1e-3}
"""Rates of those that 0.01 makes diverge, by which rounding grows."""
PAGED = tuple(name for name in OPTIMIZERS if name.startswith("paged"))
"""They keep states in memory that a GPU and its machine share, which there is none of without a GPU."""
RESUMED: dict[str, dict[str, Any]] = {
    **{name: {"optimizer": name, "zero_stage": 2} for name in ("adamw_8bit", "lion_8bit", *PAGED)},
    "adamw_8bit, zero 3": {"optimizer": "adamw_8bit", "zero_stage": 3},
    "galore": {"optimizer": "galore", "optimizer_options": OPTIONS["galore"]},
    "apollo": {"optimizer": "apollo", "optimizer_options": OPTIONS["apollo"]},
    "muon": {"optimizer": "muon"},
    "schedulefree_adamw": {"optimizer": "schedulefree_adamw", "schedule": "constant", "zero_stage": 2},
    "float16": {"zero_stage": 2, "settings": {"model.dtype": "float16"}},
    "pure bf16": {"zero_stage": 2, "settings": {"train.pure_bf16": True}},
    "asft": {"loss": "asft", "zero_stage": 2},
    "asft, lora": {"loss": "asft", "finetuning": "lora"},
    "4bit, zero 3": {"finetuning": "lora", "zero_stage": 3, "settings": {"model.quantization": "4bit"}},
}
LIKE_A_CPU = {
    "asft": {"loss": "asft", "asft_alpha": 2.0},
    "asft, lora": {"loss": "asft", "asft_alpha": 2.0, "finetuning": "lora"},
    "dft": {"loss": "dft"},
    "dora": {"finetuning": "lora", "settings": {"model.lora.dora": True}},
    "freeze": {"finetuning": "freeze", "settings": {"model.freeze.layers": 1}},
}


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    return prepare(tmp_path_factory.mktemp("optimizers"))


def case(prepared: Any, device: str, dtype: str, options: dict[str, Any], **more: Any) -> Case:
    folder, model, manifest = prepared
    options = dict(options)
    settings = {"model.dtype": dtype, "scaling.use_gpu": device == "cuda", **options.pop("settings", {})}
    config = make_config(folder, model, settings, micro_batch_size=4, eval_at_start=False, **options)
    return Case(config, rows_of(manifest), eval_rows=rows_of(manifest, steps=1), **more)


def of(name: str) -> dict[str, Any]:
    """The keys of ``train`` with which an optimizer is tried."""
    schedule = {"schedule": "constant"} if OPTIMIZERS[name].averages else {}
    rate = {"learning_rate": RATES[name]} if name in RATES else {}
    return {"optimizer": name, "optimizer_options": OPTIONS.get(name, {}), **schedule, **rate}


def largest(one: Result, other: Result, last: int = STEPS) -> float:
    """The largest relative difference of the last losses."""
    assert not one.failure + other.failure
    a, b = np.asarray(one.losses[-last:]), np.asarray(other.losses[-last:])
    assert len(a) == len(b) == last
    return float((np.abs(a - b) / np.abs(b)).max())


@pytest.fixture(scope="module")
def trained(device, prepared) -> dict[tuple[str, str], Result]:
    """(device and type, optimizer) → its training."""

    def train_each(place: str, dtype: str) -> dict[tuple[str, str], Result]:
        names = [name for name in OPTIMIZERS if place == "cuda" or name not in PAGED]
        cases = [case(prepared, place, dtype, of(name)) for name in names]
        results = train_all(cases, device=place)
        return {(f"{place} {dtype}", name): result for name, result in zip(names, results, strict=True)}

    found = train_each("cpu", "float32")
    with ThreadPoolExecutor(2) as threads:
        for results in threads.map(lambda dtype: train_each(device, dtype), ("float32", "bfloat16")):
            found |= results
    return found


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_an_optimizer_steps_as_on_a_cpu(device, trained, name):
    like = name.removeprefix("paged_") if name in PAGED else name
    if device == "cpu" and name in PAGED:
        pytest.skip("needs a GPU")
    ours, theirs = trained[f"{device} float32", name], trained["cpu float32", like]
    difference = largest(ours, theirs)
    print(f"{name}: losses differ by {difference:.1e}")
    assert difference < ROUNDED
    assert len(set(theirs.losses)) == STEPS, "it trains"


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_an_optimizer_trains_in_bfloat16(device, trained, name):
    if device == "cpu" and name in PAGED:
        pytest.skip("needs a GPU")
    difference = largest(trained[f"{device} bfloat16", name], trained[f"{device} float32", name])
    print(f"{name}: bfloat16 differs by {difference:.1e}")
    assert difference < 2 * ROUNDED


@pytest.fixture(scope="module")
def both(device, prepared) -> dict[str, tuple[Result, Result]]:
    """Way → an uninterrupted training, and one that goes on from its checkpoint."""
    names = [name for name in RESUMED if device == "cuda" or name not in (*PAGED, "float16")]
    cases = []
    for name in names:
        kept = prepared[0] / "kept" / name
        options = {"save_every_steps": HALF, **RESUMED[name]}
        cases += [
            case(prepared, device, "bfloat16", options, keep=kept),
            case(prepared, device, "bfloat16", options, resume=kept / f"checkpoint_{HALF}"),
        ]
    results = train_all(cases, device=device)
    return {name: (results[2 * index], results[2 * index + 1]) for index, name in enumerate(names)}


@pytest.mark.parametrize("name", RESUMED)
def test_a_resumed_training_is_bit_for_bit_the_uninterrupted_one(both, name):
    if name not in both:
        pytest.skip("needs a GPU")
    whole, resumed = both[name]
    assert not whole.failure + resumed.failure
    assert resumed.losses[-HALF:] == whole.losses[-HALF:]
    assert resumed.weights.keys() == whole.weights.keys()
    for key, weight in whole.weights.items():
        np.testing.assert_array_equal(resumed.weights[key], weight, err_msg=key)


@pytest.fixture(scope="module")
def pairs(device, prepared) -> dict[str, list[Result]]:
    """Way → its training on the device, and on a CPU."""
    found: dict[str, list[Result]] = {name: [] for name in LIKE_A_CPU}
    for place in (device, "cpu"):
        cases = [case(prepared, place, "float32", options) for options in LIKE_A_CPU.values()]
        for name, result in zip(LIKE_A_CPU, train_all(cases, device=place), strict=True):
            found[name].append(result)
    return found


@pytest.mark.parametrize("name", LIKE_A_CPU)
def test_a_way_of_training_is_that_of_a_cpu(pairs, name):
    difference = largest(*pairs[name])
    print(f"{name}: losses differ by {difference:.1e}")
    assert difference < 1e-4
