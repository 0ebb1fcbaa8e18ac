"""Memory of a node besides its GPUs. Pure."""

from __future__ import annotations

from raysft.estimate.memory import PROCESS, Memory
from raysft.estimate.sizes import GIB, ModelSizes
from raysft.estimate.states import Setup

GPU_PROCESS = 3.0 * GIB
"""A worker's process with CUDA: libraries, pinned buffers, batches."""
DATA_TASK = 0.5 * GIB
DATA_TASKS = 2
RAY = 2.0 * GIB
"""Ray's own processes on a node."""
OBJECTS = 2.0 * GIB
"""What a training run keeps in Ray's object store: shares of rows that are read ahead."""


def host_memory(sizes: ModelSizes, setup: Setup, needed: Memory, ranks: int, gpu: bool) -> float:
    """Return the bytes that the workers of a node and what runs alongside them need in the node's memory.

    Args:
        sizes: of the model.
        setup: of the training.
        needed: by each worker.
        ranks: workers on the node.
        gpu: True if they compute on GPUs; each then loads the weights through the node's memory, unless ZeRO-3 partitions them.

    >>> from raysft.estimate.sizes import ModelSizes
    >>> model = ModelSizes(7_000_000_000, (), 0, 0, 0, 0, 0)
    >>> idle = Memory({}, "", 0.0, 0.0, 0.0, 1, True)
    >>> round(host_memory(model, Setup(width=2), idle, ranks=8, gpu=True) / GIB)
    133
    """
    loaded = 0.0 if setup.zero_stage == 3 else float(setup.width * (sizes.total + _beside(sizes, setup)))
    each = GPU_PROCESS + needed.host + loaded if gpu else max(needed.peak, PROCESS + loaded) + needed.host
    return ranks * each + OBJECTS + DATA_TASKS * DATA_TASK + RAY


def _beside(sizes: ModelSizes, setup: Setup) -> int:
    """Elements that are loaded in addition to the model; those of a copy that are shared are dropped again."""
    return setup.reference + (sizes.total if setup.copies_start else 0)
