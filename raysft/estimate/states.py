"""Bytes of weights, gradients and optimizer states under DeepSpeed's ZeRO stages. Pure.

Read in DeepSpeed 0.19 (``stage_1_and_2.py``, ``stage3.py``, ``engine.py``), and compared with the tensors of real engines in
``tests/invariants/test_memory.py``. P is the number of all weights, T of the trained ones, W of workers, b the bytes of a weight.

- ZeRO 1 to 3 keep float32 copies of the trained weights, 4 T / W, also of float32 weights; ZeRO 0 keeps none.
- ZeRO 1 and 2 allocate the whole reduce bucket in the backward pass, and then a buffer of the worker's own gradients, b T / W.
  ZeRO 1 also keeps all gradients, b T, until the step. ZeRO 3 keeps bucket and own gradients always.
- At the step ZeRO copies the own gradients to float32, and ZeRO 0 copies all gradients, up to 5e8 at a time, to reduce them.
- Offloading moves float32 copies, moments and own gradients to the node's memory.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from raysft.config.optimizers import kind_of
from raysft.estimate.sizes import ModelSizes, Weight

LARGEST_BUCKET = 500_000_000
"""Elements that DeepSpeed reduces at once, by default."""
SUB_GROUP = 1_000_000_000
"""Elements that ZeRO-3 updates at once with AdamW; with others it updates all."""
PREFETCH = 50_000_000
"""Elements that ZeRO-3 gathers ahead, by default."""
LIVE = 1_000_000_000
"""Elements that ZeRO-3 keeps gathered at most, by default."""
DEFAULT_RANK = 16
"""Rank of galore, fira and apollo."""
BITS_8, BITS_4, SCALES = 1.0, 0.5, 4 / 64
"""Bytes of a quantized weight, and of the scale that 64 of them share in 4 bits."""
DOUBLE_SCALES = 1 / 64 + 4 / (64 * 256)
"""The same with scales that are quantized to 8 bits, 256 of which share one."""


@dataclass(frozen=True)
class Setup:
    """The settings that decide what a worker keeps."""

    zero_stage: int = 2
    workers: int = 1
    width: int = 4
    """Bytes of a weight: 4 in float32 and with autocast, 2 in bfloat16 and float16."""
    optimizer: str = "adamw"
    options: Mapping[str, Any] = field(default_factory=dict)
    offload_optimizer: bool = False
    offload_parameters: bool = False
    offload_activations: bool = False
    """True if the inputs of recomputed layers wait for the backward pass in the node's memory."""
    bucket: int | None = None
    """Elements of the reduce bucket. Default: as many as are trained, at most 5e8."""
    double_bucket: bool = False
    """DeepSpeed's ``overlap_comm``, which has two buckets."""
    sums_in_float32: bool = False
    """True if what is in the bucket is copied to float32 to be added up."""
    pure_bf16: bool = False
    """True if float32 copies and optimizer states are in bfloat16 too."""
    accumulates: bool = False
    """True if a step has several microbatches."""
    quantization: str | None = None
    """``4bit`` or ``8bit``."""
    double_quantization: bool = True
    copies_start: bool = False
    """True if a frozen copy of the trained weights is there too, as they were at the start."""
    reference: int = 0
    """Elements of a frozen model in addition to the trained one."""

    def frozen_beside(self, sizes: ModelSizes) -> int:
        """Elements of all frozen weights besides the model's, which exist as often as its own."""
        return self.reference + (sizes.trained_elements if self.copies_start else 0)


@dataclass(frozen=True)
class States:
    """Bytes on each worker's device, and in its node's memory."""

    weights: float
    master: float
    """float32 copies."""
    moments: float
    gathered: float
    """Weights that ZeRO-3 has gathered, or that are dequantized, while they are used."""
    kept: float
    """Gradients of the step's earlier microbatches."""
    arrived: float
    """Gradients that are kept when that of the embedding arrives, which is the last."""
    ended: float
    """Gradients when the backward pass has ended, besides those in the bucket."""
    gradients: float
    """Gradients when the step begins."""
    step: float
    """Temporaries of the step."""
    bucket: float
    """The reduce bucket, and its copy in float32; in ZeRO 1 and 2 it is there during the backward pass."""
    host: float = 0.0
    """In the node's memory."""
    loading: float = 0.0
    """Weights that are loaded whole before ZeRO-3 partitions them."""

    @property
    def fixed(self) -> float:
        """What is there all the time."""
        return self.weights + self.master + self.moments + self.gathered


def states(sizes: ModelSizes, setup: Setup) -> States:
    """Compute the bytes of each worker's states.

    >>> one = ModelSizes(1000, (Weight((10, 100), True, 1),), 0, 1000, 0, 0, 0)
    >>> found = states(one, Setup(zero_stage=2, workers=2, width=2))
    >>> found.weights, found.master, found.moments, found.bucket
    (2000.0, 2000.0, 4000.0, 2000.0)
    """
    stage, workers, width = setup.zero_stage, setup.workers, setup.width
    trained = sizes.trained_elements
    own = trained / workers if stage else float(trained)
    weights, gathered, loading = _weights(sizes, setup)
    elements = setup.bucket if setup.bucket is not None else min(LARGEST_BUCKET, trained)
    bucket = float(width * elements * (2 if setup.double_bucket else 1)) if stage else 0.0
    # Optimizer states have the type of the weights that they are of.
    copy, share = (2.0, 0.5) if setup.pure_bf16 else (4.0, 1.0)
    master, moments = (copy * own if stage else 0.0), share * _moments(sizes, setup) / (workers if stage else 1)
    if setup.optimizer == "badam":
        own = float(min(trained, sizes.largest_layer))
        master = 4.0 * own
    kept, arrived, ended, gradients = _gradients(sizes, setup, own, bucket)
    if setup.sums_in_float32:
        # ZeRO-3 puts the copies of all gradients into one more; ``_step`` has that of a plain optimizer.
        bucket += {0: 0.0, 3: 8.0}.get(stage, 4.0) * elements
    step, host = _step(sizes, setup, own), 0.0
    if setup.offload_optimizer:
        # Pinned: float32 copies, their gradients, moments, and the new weights in the model's type.
        host = master + moments + (4.0 + width) * own
        master = moments = kept = arrived = gradients = step = 0.0
        ended = float(width * sizes.largest_trained)
    if setup.offload_parameters:
        host, weights = host + weights, 0.0
    return States(weights, master, moments, gathered, kept, arrived, ended, gradients, step, bucket, host, loading)


def _weights(sizes: ModelSizes, setup: Setup) -> tuple[float, float, float]:
    """Bytes of the weights, of those that exist a second time while they are used, and of all while they are loaded.

    ZeRO-3 partitions quantized weights, but not their scales, once all are loaded.
    """
    if beside := setup.frozen_beside(sizes):
        alone, gathered, loading = _weights(sizes, replace(setup, copies_start=False, reference=0))
        # A given model is quantized as the trained one.
        share = (
            alone / (setup.width * sizes.total)
            if setup.reference
            else 1 / (setup.workers if setup.zero_stage == 3 else 1)
        )
        return alone + setup.width * beside * share, gathered, loading
    width, whole = setup.width, float(setup.width * sizes.total)
    each, scale = (BITS_8, 0.0) if setup.quantization == "8bit" else (BITS_4, _scale(setup))
    if setup.quantization is None:
        packed, scales, dequantized = whole, 0.0, 0.0
    else:
        packed, scales = whole - (width - each) * sizes.quantizable, scale * sizes.quantizable
        dequantized = float(width * sizes.largest_linear)
    if setup.zero_stage != 3:
        return packed + scales, dequantized, 0.0
    # Elements of packed tensors, as DeepSpeed counts them.
    layer = sizes.largest_layer if setup.quantization is None else sizes.largest_layer * each / width
    live = min(LIVE, max(sizes.largest, layer) + PREFETCH, packed / width) + sizes.small
    gathered = min(width * live, packed) if setup.workers > 1 or setup.offload_parameters else 0.0
    loading = packed + scales + dequantized if setup.quantization else 0.0
    return packed / setup.workers + scales, gathered + dequantized, loading


def _scale(setup: Setup) -> float:
    return DOUBLE_SCALES if setup.double_quantization else SCALES


def _gradients(sizes: ModelSizes, setup: Setup, own: float, bucket: float) -> tuple[float, float, float, float]:
    """``States.kept``, ``arrived``, ``ended`` and ``gradients``."""
    stage, width = setup.zero_stage, setup.width
    mine = width * own
    if stage == 3:
        return mine, mine, mine, mine
    if stage == 2:
        kept = mine if setup.accumulates else 0.0
        return kept, kept, kept + mine, mine
    whole = width * (own if setup.optimizer == "badam" else sizes.trained_elements)
    kept = whole if setup.accumulates else 0.0
    arrived = kept or max(0.0, whole - width * sizes.largest_trained)
    if stage == 0:
        return kept, arrived, whole, whole
    # What is in the bucket is no longer anywhere else.
    return kept, arrived, max(whole, mine + max(0.0, whole - bucket)), mine


def _step(sizes: ModelSizes, setup: Setup, own: float) -> float:
    width = setup.width
    if setup.zero_stage == 0:
        reduced = width + (4 if setup.sums_in_float32 else 0)
        return max(reduced * min(LARGEST_BUCKET, own), _temporaries(sizes, setup))
    part = min(SUB_GROUP, own) if setup.zero_stage == 3 and setup.optimizer == "adamw" else own
    if setup.pure_bf16:
        return float(width * part)
    # A copy in float32, made from a flat copy in the model's type.
    return 4.0 * part + (width * part if width < 4 else 0.0)


def _temporaries(sizes: ModelSizes, setup: Setup) -> float:
    """Temporaries of the optimizers that ZeRO 0 allows: some tensors as large as the largest weight."""
    return {"adamw": 0.0, "badam": 4.0 * sizes.largest_layer}.get(setup.optimizer, 12.0 * sizes.largest_trained)


def _moments(sizes: ModelSizes, setup: Setup) -> float:
    """Bytes of the optimizer's states for all trained weights."""
    if setup.optimizer == "badam":
        return 8.0 * min(sizes.trained_elements, sizes.largest_layer)
    return sum(weight.count * _moments_of(weight, setup) for weight in sizes.trained)


def _moments_of(weight: Weight, setup: Setup) -> float:
    elements, optimizer = math.prod(weight.shape), setup.optimizer
    if optimizer == "adafactor":
        # A mean for each row and one for each column of a matrix (Shazeer and Stern 2018).
        return 4.0 * sum(weight.shape[-2:]) * math.prod(weight.shape[:-2]) if len(weight.shape) > 1 else 4.0 * elements
    if optimizer == "adam_mini":
        # Second moments of an embedding and of a head; elsewhere one for each block, which are few.
        return (8.0 if len(weight.shape) > 1 and not weight.inner else 4.0) * elements
    if weight.inner and optimizer in ("galore", "fira", "apollo"):
        small, large = sorted(weight.shape)
        rank = min(setup.options.get("rank", DEFAULT_RANK), small)
        return 4.0 * (2 * rank * large + rank * small)  # two moments of the projected gradient, and the projection
    kind = kind_of(optimizer)
    if not weight.inner and (kind.flag or optimizer == "muon"):
        return 8.0 * elements  # AdamW
    squares = sum(side**2 for side in weight.shape[-2:]) if len(weight.shape) > 1 else 0
    return 4.0 * (kind.copies * elements + kind.squares * squares)
