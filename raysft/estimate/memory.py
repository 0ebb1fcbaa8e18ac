"""The memory of a training worker at its peak. Pure.

What is there all the time (weights, float32 copies, moments), and then the most of: encoding images, the loss (all activations and
the logits of a chunk), the backward pass of the last layer (all activations, what a layer needs, the bucket), the gradients of the
embedding, the backward pass of what encodes images, the end of the backward pass (gradients and bucket), and the optimizer's step.
The pixels of a microbatch are there from its beginning to its end.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from raysft.estimate.sizes import GIB, Activations, ModelSizes
from raysft.estimate.states import Setup, States, states

CONTEXT, NCCL_ONE_NODE, NCCL = 0.55 * GIB, 0.3 * GIB, 1.2 * GIB
"""CUDA's context with the libraries' kernels, and the buffers of NCCL."""
FRAGMENTATION, EXPANDABLE = 0.06, 0.03
"""Share of what comes and goes that torch's allocator on a GPU cannot use; with expandable segments."""
PROCESS = 0.6 * GIB
"""A worker's process on a CPU: Python, torch, transformers, DeepSpeed, Ray."""
EXPERT_WIDTH = 2
"""Bytes of a weight of the experts in KTransformers' kernel."""
ADAPTER_WIDTH = 7.5
"""Bytes of a weight of their adapters there, as measured: what the kernel is given, gradients, and its own copies."""
PIXELS_AHEAD = 3
"""Microbatches whose pixels exist in the node's memory besides those of the current one: ``train.pixels.AHEAD``."""
ROWS = ("weights", "gradients", "master weights", "moments", "activations", "logits", "buckets", "rest")
"""Rows of the table."""


@dataclass(frozen=True)
class Hardware:
    """Where the workers run, as far as it decides what they need."""

    gpu: bool = False
    nodes: int = 1
    expandable_segments: bool = False


@dataclass(frozen=True)
class Memory:
    """Bytes of a worker at its peak, on a GPU or, without one, in the node's memory."""

    parts: Mapping[str, float]
    """The rows of the table, which sum to ``peak``."""
    moment: str
    """When the peak is: while images are encoded, in the loss, in the backward pass, with the last gradients, in the backward pass
    of what encodes images, after it, in the step, or at the start."""
    tensors: float
    """Bytes of torch's tensors alone, which ``torch.cuda.max_memory_allocated`` counts."""
    sure: float
    """Bytes that a worker needs at least."""
    host: float
    """Bytes in the node's memory besides the worker's process."""
    rows: int
    """Rows of the microbatch."""
    traced: bool
    """False if activations come from a formula."""

    @property
    def peak(self) -> float:
        """Bytes in all."""
        return sum(self.parts.values())

    def as_dict(self) -> dict[str, Any]:
        """The numbers in GiB, for ``plan.json``."""
        gib = {name: round(value / GIB, 4) for name, value in self.parts.items()}
        return {"peak_gib": round(self.peak / GIB, 4), "tensors_gib": round(self.tensors / GIB, 4), "moment": self.moment,
                "traced": self.traced, "parts_gib": gib}  # fmt: skip


def memory(
    sizes: ModelSizes, activations: Activations, setup: Setup, rows: int, hardware: Hardware, filled: float = 1.0
) -> Memory:
    """Compute the memory of a worker.

    Args:
        sizes: of the model.
        activations: of the model.
        setup: the settings that decide what a worker keeps.
        rows: rows of a microbatch.
        hardware: where it runs.
        filled: share of the places of such a microbatch that surely hold tokens in some step; the padding at the end of all of its
            rows is cut off.
    """
    kept = states(sizes, setup)
    setup = setup if hardware.gpu else replace(setup, offload_activations=False)  # a CPU's memory is the node's
    moments = _moments(activations, kept, setup, rows)
    moment = max(moments, key=lambda name: sum(moments[name].values()))
    parts = dict.fromkeys(ROWS, 0.0) | {
        "weights": kept.weights,
        "master weights": kept.master,
        "moments": kept.moments,
        **moments[moment],
    }
    parts["rest"] += kept.gathered
    tensors = sum(parts.values())
    parts["rest"] += _beside(tensors - kept.fixed, setup, hardware)
    ahead, host, sure = (
        PIXELS_AHEAD * activations.images_at(rows).pixels,
        kept.host,
        _sure(activations, kept, setup, rows, filled),
    )
    if setup.offload_activations:
        host += activations.inputs(rows)[0]
    # The kernel turns the weights of one layer at a time for its backward pass.
    experts = EXPERT_WIDTH * (sizes.experts + sizes.experts_of_layer) + ADAPTER_WIDTH * sizes.adapters_in_kernel
    kernel = rows * activations.tokens * sizes.bytes_in_kernel
    if hardware.gpu:
        host += ahead + experts + kernel
    else:
        parts["rest"] += ahead + kernel
        parts["weights"] += experts
        sure += experts
    return Memory(parts, moment, tensors, sure, host, rows, activations.traced)


def _moments(activations: Activations, kept: States, setup: Setup, rows: int) -> dict[str, dict[str, float]]:
    """What comes and goes, by row of the table, at each moment that may be the peak."""
    saved, loss, images = _saved(activations, setup, rows), activations.loss_at(rows), activations.images_at(rows)
    saved += images.saved
    forward = max((each.forward.at(rows) - each.saved.at(rows) for each in activations.layers), default=0.0)
    moments = {
        "while images are encoded": {
            "activations": images.forward,
            "gradients": kept.kept,
            "buckets": kept.bucket if setup.zero_stage == 3 else 0.0,
        },
        "in the loss": {
            "activations": saved,
            "logits": max(loss.peak, forward),
            "gradients": kept.kept,
            "buckets": kept.bucket if setup.zero_stage == 3 else 0.0,
        },
        "in the backward pass": {
            "activations": saved,
            "rest": activations.backward(rows) + loss.left,
            "buckets": kept.bucket,
            "gradients": kept.kept,
        },
        "with the last gradients": {
            "rest": activations.tail.at(rows) + images.saved,
            "buckets": kept.bucket,
            "gradients": kept.arrived,
        },
        "in the backward pass of what encodes images": {
            "rest": images.backward,
            "buckets": kept.bucket,
            "gradients": kept.arrived,
        },
        "after the backward pass": {"buckets": kept.bucket, "gradients": kept.ended},
        "in the step": {"gradients": kept.gradients, "rest": kept.step},
    }
    with_pixels = {
        name: {**parts, "activations": parts.get("activations", 0.0) + images.pixels} for name, parts in moments.items()
    }
    return {**with_pixels, "while the weights are loaded": {"rest": max(0.0, kept.loading - kept.fixed)}}


def _saved(activations: Activations, setup: Setup, rows: int) -> float:
    """What the decoder keeps on the device for the backward pass: of offloaded inputs that of the layer that is computed."""
    saved = activations.saved(rows)
    if setup.offload_activations:
        offloaded, largest = activations.inputs(rows)
        saved += largest - offloaded
    return saved


def _beside(dynamic: float, setup: Setup, hardware: Hardware) -> float:
    """Bytes besides those of tensors."""
    if not hardware.gpu:
        return PROCESS
    share = EXPANDABLE if hardware.expandable_segments else FRAGMENTATION
    nccl = 0.0 if setup.workers == 1 else NCCL_ONE_NODE if hardware.nodes == 1 else NCCL
    return CONTEXT + nccl + share * max(0.0, dynamic)


def _sure(activations: Activations, kept: States, setup: Setup, rows: int, filled: float) -> float:
    """Bytes that are certainly there at once: while weights are loaded, at the end of the forward pass, or in the step."""
    saved = filled * _saved(activations, setup, rows) if activations.traced else 0.0
    return max(kept.loading, kept.weights + kept.master + kept.moments + max(kept.kept + saved, kept.gradients))


def largest_rows(
    sizes: ModelSizes, activations: Activations, setup: Setup, hardware: Hardware, limit: float, most: int
) -> int:
    """Return the largest number of rows of a microbatch, up to ``most``, whose peak is at most ``limit`` bytes; 0 if none is."""
    low, high = 0, most
    while low < high:
        middle = (low + high + 1) // 2
        fits = memory(sizes, activations, setup, middle, hardware).peak <= limit
        low, high = (middle, high) if fits else (low, middle - 1)
    return low
