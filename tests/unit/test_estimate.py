"""Estimates of memory, storage and time, against values computed by hand."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from raysft.cluster.placement import Node
from raysft.config import Config, parse, with_overrides
from raysft.errors import RequestError
from raysft.estimate import estimate as estimates
from raysft.estimate.duration import earlier_speed, given_speed
from raysft.estimate.estimate import Estimate, Place, Training, estimate, place_of
from raysft.estimate.evaluation import Evaluation, estimate_evaluation, evaluation_memory
from raysft.estimate.formula import Decoder, by_formula
from raysft.estimate.hardware import NodeMemory, gpu_memory, this_node
from raysft.estimate.host import host_memory
from raysft.estimate.measure import Microbatch
from raysft.estimate.memory import FRAGMENTATION, PIXELS_AHEAD, Hardware, largest_rows, memory
from raysft.estimate.setup import setup_of
from raysft.estimate.sizes import GIB, Activations, Images, Layers, Line, LossBytes, ModelSizes, Weight, amount
from raysft.estimate.states import Setup, states
from raysft.estimate.storage import Storage, check_room, check_shared, storage
from raysft.train.pixels import AHEAD
from tests.messages import holds, refusal

BILLION = 1_000_000_000
SEVEN = ModelSizes(
    total=7 * BILLION,
    trained=(Weight((1000, 1000), True, 6500), Weight((125_000, 4000), False, 1)),
    quantizable=6_500_000_000,
    largest=500_000_000,
    largest_linear=1_000_000,
    largest_layer=200_000_000,
    small=300_000,
)
"""A model of 7B: matrices of a million elements, and an embedding of 500 million."""
FLAT = Activations(
    tokens=1000,
    embedded=Line(0, 100),
    layers=(Layers(1, Line(0, 10), Line(0, 30), Line(5, 0)), Layers(3, Line(0, 20), Line(0, 30), Line(5, 40))),
    loss={1: LossBytes(500, 50), 2: LossBytes(900, 90)},
    tail=Line(0, 300),
    traced=True,
)
SMALL = ModelSizes(1000, (Weight((10, 100), True, 1),), 0, 1000, 0, 1000, 0)


def _parts(*parts: str) -> str:
    return " … ".join(parts)


def config_of(folder: Path, **settings) -> Config:
    base = parse(
        {
            "run": {"name": "r", "storage": str(folder)},
            "model": {"path": "m"},
            "data": {"train": [{"name": "a", "path": "a.json"}]},
            "train": {"global_batch_size": 8},
        }
    )
    return with_overrides(base, {key.replace("__", "."): value for key, value in settings.items()})


@pytest.mark.parametrize(
    ("setup", "expected"),
    [
        # In bfloat16 on 8 GPUs: weights 14 GB; copies 28 / 8, moments 56 / 8, own gradients 14 / 8; the bucket has 5e8 elements.
        (Setup(2, 8, 2), {"weights": 14, "master": 3.5, "moments": 7, "ended": 1.75, "gradients": 1.75, "bucket": 1}),
        # ZeRO 1 keeps all gradients, but those in the bucket, beside the own copies.
        (Setup(1, 8, 2), {"weights": 14, "master": 3.5, "moments": 7, "ended": 14.75, "bucket": 1}),
        (Setup(3, 8, 2), {"weights": 1.75, "master": 3.5, "moments": 7, "kept": 1.75, "gathered": 1.1006, "bucket": 1}),
        # Float32 without ZeRO: all gradients, no copies; flattened to be reduced, 5e8 at a time.
        (Setup(0, 1, 4), {"weights": 28, "master": 0, "moments": 56, "gradients": 28, "step": 2, "bucket": 0}),
        # The next microbatches of a step find the gradients of the first.
        (Setup(2, 8, 2, accumulates=True), {"kept": 1.75, "ended": 3.5}),
        # Offloaded: copies, their gradients, moments and the weights that go back: 28 + 28 + 56 + 14 over 8.
        (
            Setup(2, 8, 2, offload_optimizer=True),
            {"weights": 14, "master": 0, "moments": 0, "gradients": 0, "host": 126 / 8, "ended": 1},
        ),
        (Setup(3, 8, 2, offload_optimizer=True, offload_parameters=True), {"weights": 0, "host": 140 / 8}),
        (Setup(2, 1, 2, bucket=100_000_000, double_bucket=True), {"bucket": 0.4}),
        # 6.5e9 weights of half a byte, and for each 64 of them a scale of 1 byte, 256 of which share 4 bytes more.
        (Setup(2, 1, 2, quantization="4bit"), {"weights": 1 + 3.25 + 6.5 / 64 + 6.5 / 4096, "gathered": 0.002}),
        (Setup(2, 1, 2, quantization="4bit", double_quantization=False), {"weights": 1 + 3.25 + 6.5 / 16}),
        (Setup(2, 1, 2, quantization="8bit"), {"weights": 1 + 6.5}),
        # Pure bfloat16: copies of 14 / 8 and two moments of 14 / 8 each; the step only flattens gradients.
        (
            Setup(2, 8, 2, pure_bf16=True),
            {"weights": 14, "master": 1.75, "moments": 3.5, "gradients": 1.75, "step": 1.75},
        ),
        (Setup(0, 1, 2, pure_bf16=True), {"weights": 14, "master": 0, "moments": 28, "gradients": 14, "step": 1}),
        # A frozen copy, which ZeRO-3 partitions, and another model of 2B beside it, quantized like it.
        (Setup(2, 8, 2, copies_start=True), {"weights": 28, "master": 3.5, "moments": 7}),
        (Setup(3, 8, 2, copies_start=True), {"weights": 3.5}),
        (Setup(2, 1, 2, reference=2 * BILLION), {"weights": 18}),
        (Setup(2, 1, 2, quantization="8bit", reference=7 * BILLION), {"weights": 15}),
    ],
)
def test_states_of_a_model_of_7b(setup, expected):
    found = states(SEVEN, setup)
    for name, gigabytes in expected.items():
        assert getattr(found, name) / 1e9 == pytest.approx(gigabytes, rel=1e-4), name


@pytest.mark.parametrize(
    ("optimizer", "options", "moments"),
    [
        ("adamw", {}, 8 * 7e9),
        ("adafactor", {}, 4 * (6500 * 2000 + 129_000)),
        ("muon", {}, 4 * 6.5e9 + 8 * 0.5e9),
        ("adam_mini", {}, 4 * 6.5e9 + 8 * 0.5e9),
        # Two moments and a projection of 16 × 1000 for each matrix.
        ("galore", {}, 6500 * 4 * 16 * 3000 + 8 * 0.5e9),
        ("apollo", {"rank": 4}, 6500 * 4 * 4 * 3000 + 8 * 0.5e9),
        ("badam", {}, 8 * 0.2e9),
        ("lion", {}, 4 * 7e9),
        ("adamw_8bit", {}, 2 * (1 + 4 / 256) * 7e9),
        ("adan", {}, 16 * 7e9),
        ("sgd", {}, 0),
    ],
)
def test_moments_of_each_optimizer(optimizer, options, moments):
    assert states(SEVEN, Setup(0, optimizer=optimizer, options=options)).moments == pytest.approx(moments)


@pytest.mark.parametrize(("stage", "copies"), [(0, 4.0), (1, 4.0), (2, 4.0), (3, 8.0)])
def test_gradients_that_are_added_up_in_float32_need_copies(stage, copies):
    """Bytes for each element of a bucket of a million; ZeRO-3 also puts those of a bucket together."""
    sizes = replace(SEVEN, trained=(Weight((1000, 1000), True, 1),))
    plain = Setup(zero_stage=stage, workers=2, width=2)
    one, other = (states(sizes, each) for each in (plain, replace(plain, sums_in_float32=True)))
    assert (other.bucket + other.step) - (one.bucket + one.step) == copies * 1e6


def test_the_peak_is_the_largest_of_the_moments():
    # 1,000 float32 weights with ZeRO 2: weights 4,000, copies 4,000, moments 8,000.
    setup, cpu = Setup(2, 1, 4), Hardware()
    one = memory(SMALL, FLAT, setup, 1, cpu)
    # Saved: 100 + 10 + 3 · 20. In the loss 500 more; after the backward pass a bucket and gradients of 4,000 each.
    assert (one.moment, one.tensors) == ("after the backward pass", 16_000 + 8_000)
    assert (one.parts["gradients"], one.parts["buckets"]) == (4_000, 4_000)
    assert sum(one.parts.values()) == one.peak > one.tensors
    hundred = memory(SMALL, FLAT, setup, 100, cpu)
    # The loss of two rows, and what the second adds for each of the others.
    assert (hundred.moment, hundred.tensors) == ("in the loss", 16_000 + 170 * 100 + 900 + 98 * 400)
    assert (hundred.parts["activations"], hundred.parts["logits"]) == (17_000, 40_100)
    assert hundred.sure == 16_000 + 17_000
    assert memory(SMALL, FLAT, setup, 100, cpu, filled=0.5).sure == 16_000 + 8_500
    few = memory(SMALL, FLAT, Setup(2, 1, 4, accumulates=True), 100, cpu)
    assert few.tensors == hundred.tensors + 4_000


def test_recomputed_layers_are_needed_once():
    layers = (Layers(4, Line(0, 10), Line(0, 500), Line(0, 800)),)
    activations = Activations(1000, Line(0, 0), layers, {1: LossBytes(100, 50)}, Line(0, 0), True)
    found = memory(SMALL, activations, Setup(0, 1, 4), 1, Hardware())
    assert found.moment in ("in the step", "after the backward pass")
    found = memory(SMALL, activations, Setup(0, 1, 4), 100, Hardware())
    assert found.moment == "in the backward pass"
    assert found.tensors == 4_000 + 8_000 + 100 * (40 + 800 + 50)


def test_on_a_gpu_there_is_more_than_tensors():
    setup = Setup(2, 8, 2)
    plain = memory(SMALL, FLAT, setup, 1000, Hardware(gpu=True))
    better = memory(SMALL, FLAT, setup, 1000, Hardware(gpu=True, expandable_segments=True))
    many = memory(SMALL, FLAT, setup, 1000, Hardware(gpu=True, nodes=2))
    assert plain.tensors == better.tensors == many.tensors
    dynamic = plain.tensors - (2_000 + 500 + 1_000)
    assert plain.peak - plain.tensors == pytest.approx(0.85 * GIB + 0.06 * dynamic)
    assert plain.peak - better.peak == pytest.approx(0.03 * dynamic)
    assert many.peak - plain.peak == pytest.approx(0.9 * GIB)


def test_the_largest_microbatch_is_the_last_that_fits():
    setup, cpu = Setup(2, 1, 4), Hardware()
    fits = memory(SMALL, FLAT, setup, 37, cpu).peak
    assert largest_rows(SMALL, FLAT, setup, cpu, fits, most=1000) == 37
    assert largest_rows(SMALL, FLAT, setup, cpu, fits - 1, most=1000) == 36
    assert largest_rows(SMALL, FLAT, setup, cpu, fits, most=5) == 5
    assert largest_rows(SMALL, FLAT, setup, cpu, 100, most=1000) == 0


def test_the_loss_of_more_rows_goes_on_as_it_grew():
    assert FLAT.loss_at(5) == LossBytes(2100, 210)
    assert replace(FLAT, loss={2: LossBytes(900, 90)}).loss_at(3) == LossBytes(1350, 135)


def test_the_formula_for_a_llama_of_8b_has_196_kib_for_each_token_and_layer():
    llama = Decoder(32, 4096, 14336, 32, 8, 128, 128_256)
    found = by_formula(llama, 2, 4096, 1.0, 0, 1024, (1,))
    # 2 · 8 · 4096 + 4 · 32 · 128 + 4 · 8 · 128 + 8 · 14336 + 4 · 32 bytes.
    assert found.layers[0].saved.at(1) / 4096 / 1024 == pytest.approx(196.125)
    # Float32 logits, log-probabilities and their gradient, and logits and gradient in bfloat16: 16 bytes · 1024 · 128,256.
    assert found.loss[1].peak - found.loss[1].left == pytest.approx(16 * 1024 * 128_256)
    recomputed = by_formula(llama, 2, 4096, 1.0, 32, 1024, (1,))
    assert recomputed.saved(1) - recomputed.embedded.at(1) == 32 * 4096 * 2 * 4096
    in_part = by_formula(llama, 2, 4096, 1.0, 20, 1024, (1,))
    assert in_part.saved(1) == pytest.approx((20 * recomputed.saved(1) + 12 * found.saved(1)) / 32)


def test_offloaded_inputs_are_in_the_nodes_memory_except_that_of_one_layer():
    again, whole = Line(0, GIB), Line(0, 5 * GIB)
    layers = (Layers(30, again, whole, whole, recomputed=True), Layers(2, whole, whole, whole))
    activations = replace(FLAT, layers=layers, embedded=Line(0, 0))
    usual, offloaded = (
        memory(SMALL, activations, Setup(2, 1, 4, offload_activations=offloads), 4, Hardware(gpu=True))
        for offloads in (False, True)
    )
    assert usual.parts["activations"] - offloaded.parts["activations"] == 29 * 4 * GIB
    assert offloaded.host - usual.host == 30 * 4 * GIB
    cpu = memory(SMALL, activations, Setup(2, 1, 4, offload_activations=True), 4, Hardware())
    assert (cpu.parts["activations"], cpu.host) == (usual.parts["activations"], 0), "its memory is the node's"


def test_activations_survive_json():
    assert Activations.from_dict(json.loads(json.dumps(FLAT.to_dict()))) == FLAT


def test_what_a_config_says(tmp_path):
    gpu = {"scaling__use_gpu": True}
    found = setup_of(config_of(tmp_path, train__zero_stage=0, **gpu), 4, 8)
    assert (found.zero_stage, found.width, found.workers) == (1, 2, 4), "16-bit weights have copies from ZeRO 1 on"
    assert setup_of(config_of(tmp_path, train__zero_stage=3), 4, 8).double_bucket
    given = {"zero_optimization": {"reduce_bucket_size": 1e6, "overlap_comm": True}}
    found = setup_of(config_of(tmp_path, train__deepspeed=given), 1, 8)
    assert (found.bucket, found.double_bucket) == (1_000_000, True)
    muon = setup_of(config_of(tmp_path, train__optimizer="muon", train__zero_stage=0, **gpu), 1, 8)
    assert (muon.zero_stage, muon.width) == (0, 4), "float32 weights with autocast"
    assert setup_of(config_of(tmp_path, train__micro_batch_size=4), 1, 8).accumulates
    pure = config_of(tmp_path, model__dtype="bfloat16", train__pure_bf16=True, train__zero_stage=0)
    assert (setup_of(pure, 1, 8).pure_bf16, setup_of(pure, 1, 8).width, setup_of(pure, 1, 8).zero_stage) == (True, 2, 0)
    asft = {"train__loss": "asft"}
    assert setup_of(config_of(tmp_path, model__finetuning="full", **asft), 1, 8).copies_start
    assert not setup_of(config_of(tmp_path, **asft), 1, 8).copies_start, "a new adapter is switched off"
    for adapter in ({"model__lora__pissa": True}, {"model__adapters": ["a/b"]}):
        assert setup_of(config_of(tmp_path, **adapter, **asft), 1, 8).copies_start
    given = config_of(tmp_path, model__finetuning="full", train__reference_model="r", **asft)
    assert setup_of(given, 1, 8, 30) == replace(setup_of(given, 1, 8), reference=30, copies_start=False)
    assert not setup_of(config_of(tmp_path, train__micro_batch_size=8), 1, 8).accumulates


@pytest.mark.parametrize(
    ("kind", "gib"),
    [
        ("NVIDIA-H100-80GB-HBM3", 79.2),
        ("nvidia-h200-141gb", 139.8),
        ("A100-40G", 39.5),
        ("nvidia-l4", 22.0),
        ("NVIDIA L40S", 44.4),
        ("GB200", 184.0),
    ],
)
def test_memory_of_a_type_of_gpu(kind, gib):
    assert gpu_memory(kind) == gib * GIB


def test_this_node_has_memory():
    found = this_node()
    assert found.total is not None
    assert GIB / 4 < found.total < 1 << 45
    assert found.gpu is None


@pytest.mark.parametrize(
    ("nodes", "scaling", "found", "limit", "ranks"),
    [
        ([Node(4.0)], {"num_workers": 2}, NodeMemory(8e9), 4e9, 2),
        ([Node(4.0)], {"num_workers": 1}, NodeMemory(8e9), 8e9, 1),
        ([Node(2.0), Node(2.0)], {"num_workers": 3}, NodeMemory(8e9), 4e9, 2),
        ([Node(8.0, 2.0)], {"num_workers": 2, "use_gpu": True}, NodeMemory(64e9, 0, 80e9), 80e9, 2),
        ([Node(8.0, 2.0)], {"num_workers": 2, "use_gpu": True}, NodeMemory(64e9), None, 2),
        ([Node(8.0)], {"num_workers": 2}, None, None, 2),
        ([Node(4.0), Node(4.0)], {"num_workers": 3, "placement": "spread"}, NodeMemory(8e9), 4e9, 2),
    ],
)
def test_what_a_worker_has(tmp_path, nodes, scaling, found, limit, ranks):
    config = config_of(tmp_path, **{f"scaling__{key}": value for key, value in scaling.items()})
    training = Training(config, None, None, scaling["num_workers"], 4, Microbatch(512, 1.0))
    place = place_of(training, nodes, (nodes[0], found) if found else None)
    assert (place.limit, place.ranks) == (limit, ranks)


@pytest.fixture
def seven(monkeypatch, tmp_path) -> Training:
    """Full fine-tuning of the model of 7B on a GPU; with recomputation or LoRA it needs less."""

    def measure(config, hf_config, adapter, microbatch):
        lora = config.model.finetuning == "lora"
        sizes = ModelSizes(**{**vars(SEVEN), "trained": (Weight((8, 1000), True, 1000),) if lora else SEVEN.trained})
        row = (0.5 if config.train.gradient_checkpointing else 4.0) * GIB
        layers = (Layers(1, Line(0, row), Line(0, row), Line(0, 0.1 * GIB)),)
        return sizes, Activations(4096, Line(0, 0), layers, {64: LossBytes(GIB, 0)}, Line(0, 0), True)

    monkeypatch.setattr(estimates, "measure", measure)
    config = config_of(
        tmp_path, scaling__use_gpu=True, model__finetuning="lora", train__micro_batch_size=4, train__zero_stage=2
    )
    return Training(config, None, None, 1, 8, Microbatch(4096, 1.0))


def on_gpu(gib: float) -> Place:
    return Place(gib * GIB, 0.0, 512 * GIB, 1, Hardware(gpu=True))


def test_what_fits_is_neither_refused_nor_warned_about(seven):
    found = estimate(seven, on_gpu(79.2))
    assert not found.warnings
    assert found.largest == 8
    assert "of 79.2 GiB for each GPU" in found.lines(table=False)[0]
    assert len(found.lines(table=True)) == 1 + 8 + 1


def test_a_microbatch_that_is_too_large_is_refused_with_the_largest_that_fits(seven):
    # Weights of 13 GiB and 4 · 4 GiB of activations.
    message = refusal(lambda: estimate(seven, on_gpu(22.0)))
    assert holds(
        message,
        _parts(
            "a microbatch of 4 rows needs at least 29.",
            "for each GPU, which has 22.0 GiB",
            "use train.micro_batch_size=1",
        ),
    )


def test_what_may_not_fit_is_warned_about(seven):
    found = estimate(seven, on_gpu(30.5))
    (warning,) = found.warnings
    assert "about 31" in warning
    assert "use train.micro_batch_size=3" in warning


@pytest.mark.parametrize(
    ("gib", "warned"), [(79.2, "use train.micro_batch_size=8, which fits"), (28.0, "=2, which"), (22.0, "")]
)
def test_a_gpu_that_waits_for_small_microbatches_is_warned_about(seven, gib, warned):
    """Rows of 2,048 tokens: 8 keep a GPU busy, and each takes 4 GiB beside 13 GiB of weights."""
    auto = with_overrides(seven.config, {"train.micro_batch_size": "auto"})
    found = estimate(Training(auto, None, None, 1, 16, Microbatch(2048, 1.0)), on_gpu(gib))
    assert [warned in warning and "a microbatch of 1 row (2,048 tokens)" in warning for warning in found.warnings] == (
        [True] if warned else []
    )
    one = with_overrides(seven.config, {"train.micro_batch_size": 1})
    assert not estimate(Training(one, None, None, 1, 16, Microbatch(2048, 1.0)), on_gpu(gib)).warnings


def test_without_a_smaller_microbatch_the_cheapest_remedy_is_named(seven):
    one = Training(with_overrides(seven.config, {"train.micro_batch_size": 1}), None, None, 1, 8, Microbatch(4096, 1.0))
    message = refusal(lambda: estimate(one, on_gpu(16.0)))
    # With recomputation 15.2 GiB, which is more than 0.92 of 16.
    assert "use train.zero_stage=3, train.offload.optimizer=cpu and train.offload.parameters=cpu (" in message
    full = Training(with_overrides(one.config, {"model.finetuning": "full"}), None, None, 1, 8, Microbatch(4096, 1.0))
    message = refusal(lambda: estimate(full, on_gpu(40.0)))
    # 13 GiB of weights, 26 of copies, 52 of moments: neither recomputation nor a smaller bucket is enough.
    assert holds(
        message, _parts("a microbatch of 1 row needs", "GPU, which has 40.0 GiB", "use train.offload.optimizer=cpu")
    )


def test_a_row_that_does_not_fit_is_told_the_longest_that_do(tmp_path, monkeypatch):
    """A model of 7B with LoRA on GPUs of 21 GiB: 13.1 GiB of weights, 0.55 of CUDA, and 1 MiB for each token of a slice, of
    which 0.25 with recomputation, and 1.06 times that."""

    def measured(config: Config, hf_config: object, adapter: object, microbatch: Microbatch):
        mib = 0.25 if config.train.gradient_checkpointing and config.train.recompute_layers is None else 1.0
        layers = (Layers(1, Line(0, microbatch.tokens * mib * (1 << 20)), Line(0, 0), Line(0, 0)),)
        return replace(SEVEN, trained=()), replace(FLAT, tokens=microbatch.tokens, layers=layers)

    monkeypatch.setattr(estimates, "measure", measured)
    monkeypatch.setattr("raysft.train.check_model.check_shared_rows", lambda *_: None)
    config = config_of(tmp_path, model__finetuning="lora", model__dtype="bfloat16", train__micro_batch_size=1,
                       model__quantization=None)  # fmt: skip
    room = (0.92 * 21 - 7e9 * 2 / GIB - 0.55) * 1024 / 1.06

    def told(tokens: int, workers: int = 1) -> str:
        given = with_overrides(config, {"data.sequence_length": tokens, "scaling.num_workers": workers})
        return refusal(lambda: estimate(Training(given, None, None, workers, 8, Microbatch(tokens, 1.0)), on_gpu(21)))

    short = told(12_000)
    assert "; use train.gradient_checkpointing=true (" in short
    assert short.endswith(f", or data.sequence_length={room // 64 * 64:.0f}")
    longest = f"use data.sequence_length={room // 64 * 64:.0f}, or {4 * room // 64 * 64:.0f} with train.gradient_checkpointing=true"
    assert told(100_000).endswith(longest)
    config = with_overrides(config, {"train.gradient_checkpointing": True, "train.recompute_layers": 1})
    assert "; use train.recompute_layers=null, for all layers (" in told(12_000)
    assert told(100_000).endswith(longest.replace("gradient_checkpointing=true", "recompute_layers=null"))

    def nine_heads(config: Config, _: object) -> None:
        if 9 % config.scaling.sequence_parallel:
            raise RequestError("9 heads")

    monkeypatch.setattr("raysft.train.check_model.check_shared_rows", nine_heads)
    config = with_overrides(config, {"train.recompute_layers": None})
    shared = re.findall(r"scaling.sequence_parallel=(\d+)", told(1_000_000, workers=36))
    assert shared == ["3", "9"]
    assert told(100_000, workers=36).count("scaling.sequence_parallel=9 (") == 1


def test_a_run_that_fits_only_with_swap_is_not_refused(seven):
    place = Place(22.0 * GIB, 16.0 * GIB, 22.0 * GIB, 1, Hardware())
    assert estimate(seven, place).warnings


def test_checkpoints_and_model_need_room(tmp_path):
    config = config_of(tmp_path, model__finetuning="full", train__keep_last=2)
    found = storage(config, SEVEN, setup_of(config, 2, 4))
    # Weights, and two moments of each, in float32; three of them exist while the third is written.
    assert (found.checkpoint, found.model, found.kept) == (12 * 7e9, 4 * 7e9, 3)
    assert found.needed == 3 * 12 * 7e9 + 4 * 7e9
    offloaded = config_of(tmp_path, model__finetuning="full", train__offload__optimizer="cpu")
    assert storage(offloaded, SEVEN, setup_of(offloaded, 2, 4)).checkpoint == 12 * 7e9
    none = config_of(tmp_path, model__finetuning="full", train__save_every_minutes=None)
    assert storage(none, SEVEN, setup_of(none, 2, 4)).needed == 4 * 7e9
    assert storage(config, SEVEN, setup_of(config, 2, 4), written_in_all=1).kept == 1
    every = config_of(tmp_path, model__finetuning="full", train__keep_last=None)
    assert storage(every, SEVEN, setup_of(every, 2, 4), written_in_all=9).kept == 9
    assert found.free is not None
    bucket = config_of(tmp_path, run__storage="s3://bucket/runs")
    assert storage(bucket, SEVEN, setup_of(bucket, 2, 4)).free is None


def test_a_disk_without_room_is_refused(tmp_path):
    config = config_of(tmp_path)
    check_room(config, Storage(10 * GIB, GIB, 3, 11 * GIB))
    message = refusal(lambda: check_room(config, Storage(10 * GIB, GIB, 3, 8 * GIB)))
    assert holds(message, _parts("run.storage", "8.0 GiB free", "11.0 GiB", "free some space"))


def test_a_storage_that_another_node_does_not_see_is_refused(tmp_path, monkeypatch):
    asked = []

    def ask(nodes, function, *arguments):
        asked.extend(nodes)
        return [function(*arguments), "is another folder"]

    monkeypatch.setattr("raysft.estimate.storage.ask", ask)
    nodes = [Node(2.0, name="10.0.0.1"), Node(2.0, name="10.0.0.2")]
    message = refusal(lambda: check_shared(config_of(tmp_path), nodes))
    assert holds(message, _parts(f"run.storage: {tmp_path}", "on node 10.0.0.2", "every node shares"))
    assert asked == nodes
    assert not list(tmp_path.iterdir()), "a probe is left behind"
    message = refusal(lambda: check_shared(config_of(tmp_path / "none"), nodes))
    assert holds(message, f"run.storage: {tmp_path}/none cannot be written to (No such file … choose another folder")
    check_shared(config_of(tmp_path), nodes[:1])
    check_shared(config_of(tmp_path, run__storage="s3://bucket/runs"), nodes)


def test_time_follows_from_an_earlier_run_of_the_same_model(tmp_path):
    config = config_of(tmp_path)
    assert earlier_speed(config) is None
    for name, path, speed in (("other", "n", 9.0), ("same", "m", 900.0)):
        run = tmp_path / name
        run.mkdir()
        (run / "config.yaml").write_text(
            yaml.safe_dump(with_overrides(config, {"model.path": path}).model_dump(mode="json"))
        )
        (run / "plan.json").write_text(json.dumps({"resolved": {"dtype": "float32", "workers": 3}}))
        (run / "train_results.json").write_text(json.dumps({"train_tokens_per_second": speed}))
    found = earlier_speed(config)
    assert found is not None
    assert (found.run, found.tokens_per_second) == ("same", 300.0)
    assert earlier_speed(with_overrides(config, {"model.dtype": "bfloat16"})) is None
    assert earlier_speed(with_overrides(config, {"data.sequence_length": 64})) is None


def test_a_given_speed_counts_without_an_earlier_run_and_before_it(tmp_path):
    assert given_speed(config_of(tmp_path)) is None
    speed = given_speed(config_of(tmp_path, scaling__worker_tokens_per_second=250))
    assert speed is not None
    assert speed.run is None
    # 3,000 tokens for two workers of 250 tokens/s.
    assert speed.seconds(3_000, 2) == 6.0


def test_refusals_are_requests(seven):
    with pytest.raises(RequestError):
        estimate(seven, on_gpu(8.0))


def evaluation(folder: Path, workers: int = 1, weight_bytes: int = 0, **settings) -> Evaluation:
    from transformers import LlamaConfig

    decoder = LlamaConfig(hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
                          vocab_size=1000)  # fmt: skip
    config = with_overrides(config_of(folder), {"evaluate.model": "m", "model.dtype": "bfloat16", **settings})
    return Evaluation(config, "evaluate.model=m", decoder, workers, bool(weight_bytes), weight_bytes)


def test_an_evaluation_needs_weights_and_neither_gradients_nor_an_optimizer(tmp_path):
    place = Place(None, 0.0, None, 1, Hardware(gpu=False))

    def weights(**given) -> float:
        return evaluation_memory(evaluation(tmp_path, **given), SEVEN, place).sure

    assert weights() == 14e9
    assert weights(**{"model.dtype": "float32"}) == 28e9
    assert weights(workers=4, **{"train.zero_stage": 2}) == 14e9
    assert weights(workers=4, **{"train.zero_stage": 3}) == 14e9 / 4
    four = {"model.quantization": "4bit", "model.double_quantization": False}
    assert weights(**four) == 1e9 + 6.5e9 * (0.5 + 4 / 64)
    assert weights(workers=4, **four, **{"train.zero_stage": 3}) == weights(**four), "they cannot be partitioned"
    assert weights(weight_bytes=4_000_000_000) == 4e9
    elsewhere = replace(evaluation(tmp_path), quantized=True)  # by GPTQ, say; its files are not on this machine
    assert evaluation_memory(elsewhere, SEVEN, place).sure < 5e9, "not refused for the room that exact weights take"
    whole = evaluation_memory(evaluation(tmp_path), SEVEN, place)
    assert whole.activations == evaluation_memory(evaluation(tmp_path, **four), SEVEN, place).activations > 0
    assert whole.peak > whole.sure


def test_weights_that_surely_do_not_fit_are_refused_for_an_evaluation(tmp_path):
    node = Node(4.0)
    line = estimate_evaluation(evaluation(tmp_path), [node], (node, NodeMemory(8.0 * GIB)))
    assert holds(line, "memory: about … of 8.0 GiB for each worker (weights … activations")
    small = (node, NodeMemory(100_000.0))
    message = refusal(estimate_evaluation, evaluation(tmp_path), [node], small)
    assert holds(
        message, "evaluate.model=m: its weights need at least … for each worker, which has … model.quantization=4bit"
    )
    message = refusal(estimate_evaluation, evaluation(tmp_path, weight_bytes=9 * GIB), [node], small)
    assert holds(message, "evaluate.model=m: its weights need at least 9.0 GiB … use nodes with more memory")


@pytest.mark.parametrize("gpu", [False, True])
def test_pixels_that_are_made_ahead_are_in_the_memory_of_the_node(gpu):
    """Two images a row of 1 GiB each, of which three microbatches of two rows are ahead of the one on the device."""
    one, nothing = Line(0, GIB), Line(0, 0)
    images = Images(pixels=one, saved=nothing, forward=nothing, backward=nothing, per_row=2.0)
    text = Activations(64, nothing, (Layers(1, nothing, nothing, nothing),), {2: LossBytes(0, 0)}, nothing, True)
    sizes, setup, hardware = ModelSizes(0, (), 0, 0, 0, 0, 0), Setup(zero_stage=0), Hardware(gpu=gpu)
    without, seen = (memory(sizes, each, setup, 2, hardware) for each in (text, replace(text, images=images)))
    assert PIXELS_AHEAD == AHEAD
    assert seen.tensors - without.tensors == 4 * GIB
    share = FRAGMENTATION * 4 * GIB if gpu else 12 * GIB
    assert seen.peak - without.peak == pytest.approx(4 * GIB + share)
    assert seen.host - without.host == (12 * GIB if gpu else 0)


@pytest.mark.parametrize(
    ("kind", "settings", "width"),
    [
        ("qwen3_moe", {"num_experts_per_tok": 8, "moe_intermediate_size": 768}, 8 * 768),
        ("deepseek_v3", {"num_experts_per_tok": 8, "moe_intermediate_size": 2048, "n_shared_experts": 1}, 9 * 2048),
        ("qwen2_moe", {"num_experts_per_tok": 4, "moe_intermediate_size": 1408, "shared_expert_intermediate_size": 5632},
         4 * 1408 + 5632),
        ("mixtral", {"num_experts_per_tok": 2, "intermediate_size": 14336}, 2 * 14336),
    ],
)  # fmt: skip
def test_a_token_goes_through_some_experts_and_all_shared_ones(kind, settings, width):
    from transformers import AutoConfig

    assert Decoder.of(AutoConfig.for_model(kind, **settings)).feed_forward == width


def test_weights_of_experts_wait_in_the_memory_of_a_node():
    """As ``raysft check`` prints it: 30.5 billion weights of 2 bytes, on one node or on four."""
    mixture = ModelSizes(30_500_000_000, (), 0, 622_000_000, 0, 622_000_000, 0)
    offloaded = Setup(zero_stage=3, workers=8, width=2, offload_parameters=True)
    needed = memory(mixture, FLAT, offloaded, 1, Hardware(gpu=True))
    assert needed.host == states(mixture, offloaded).host == 61e9 / 8
    for ranks in (8, 2):
        host = host_memory(mixture, offloaded, needed, ranks, gpu=True)
        assert host == pytest.approx(ranks * (61e9 / 8 + 3 * GIB) + 5 * GIB)
        shown = Estimate(mixture, needed, Place(80 * GIB, 0.0, 512 * GIB, ranks, Hardware(gpu=True)), 1, 1, host)
        assert shown.lines(table=False)[-1] == f"memory of a node: about {amount(host)} of 512.0 GiB"
    on_cpu = replace(shown, place=replace(shown.place, hardware=Hardware()))
    assert on_cpu.lines(table=True)[-1] == shown.lines(table=True)[-1], (
        "also on CPUs, where nothing else is beside a worker"
    )
