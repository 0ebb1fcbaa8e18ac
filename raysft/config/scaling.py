"""The ``scaling`` section."""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, field_validator

from raysft.config.section import Positive, Section

_LABEL = r"[A-Za-z0-9]([A-Za-z0-9_.-]{0,61}[A-Za-z0-9])?"
_NODE_LABEL = re.compile(rf"([A-Za-z0-9]([A-Za-z0-9.-]{{0,251}}[A-Za-z0-9])?/)?{_LABEL}={_LABEL}")
SLICE_MULTIPLE = 8
"""A slice of rows has a multiple of so many tokens, with which matrix products are fast."""


def _node_label(value: str) -> str:
    if not _NODE_LABEL.fullmatch(value):
        raise ValueError(
            "must be KEY=VALUE, each up to 63 letters, digits, '-', '_' and '.' that begin and end with a letter or digit, for "
            "example role=data"
        )
    return value


def slice_tokens(tokens: int, workers: int) -> int:
    """Return how many tokens each of some workers computes that divide so many, padding included.

    >>> slice_tokens(100, 1), slice_tokens(96, 2), slice_tokens(100, 2)
    (100, 48, 56)
    """
    return tokens if workers == 1 else -(-tokens // (SLICE_MULTIPLE * workers)) * SLICE_MULTIPLE


class ScalingSection(Section):
    """Workers, their resources and the Ray cluster."""

    num_workers: Positive | tuple[Positive, Positive] = 1
    """Number of training workers; with ``use_gpu``, each uses one GPU. ``[min, max]``: elastic training with as many workers as
    the cluster can place. It continues with fewer workers when a node leaves, and with more, from the next checkpoint on, when
    a node joins. The results do not depend on the number of workers: a step always has ``train.global_batch_size`` rows."""
    sequence_parallel: Positive = 1
    """Sequence parallelism: number of workers that share each row, for rows that do not fit on one device. Each computes a
    slice of the tokens, and in attention they exchange tokens for heads with all-to-all (Ulysses). The results are the same as
    with 1. ``num_workers`` and the number of the model's query heads must be multiples of it; choose at most the number of GPUs
    in a node."""
    wait_minutes: Annotated[float, Field(gt=0)] = 30
    """Minutes to wait for nodes if, after training has started, the cluster can place fewer workers than the minimum."""
    use_gpu: bool = False
    """Train and generate on GPUs."""
    cpus_per_worker: Annotated[float, Field(gt=0)] = 1.0
    """CPUs that Ray reserves for each worker. Leave at least half a CPU in the cluster free for data tasks."""
    threads_per_worker: Positive | None = None
    """Compute threads of each worker without a GPU. Default: the node's cores divided by its workers."""
    worker_tokens_per_second: Annotated[float, Field(gt=0)] | None = None
    """Training throughput of each worker in tokens per second, from which ``raysft check`` estimates how long training takes.
    Default: that of the newest run in ``run.storage`` with the same model and settings."""
    placement: Literal["pack", "spread"] = "pack"
    """``pack``: workers are placed on as few nodes as possible, and avoid the network where they can. ``spread``: workers are
    placed on as many nodes as possible, so that each has a larger share of a node's memory and bandwidth."""
    data_label: Annotated[str, AfterValidator(_node_label)] | None = None
    """Label of the nodes reserved for data, as set with `ray start --labels`, for example ``role=data``: tasks that read and
    tokenize data run only on these nodes, and training workers only on the others. Default: both run anywhere."""
    address: str | None = None
    """Ray cluster to join, as HOST:PORT of its head node. Default: the cluster that this process belongs to or that runs on this
    machine, otherwise a new one on this machine. ``local``: always start a new one. Ray Client addresses (``ray://``) are not
    supported."""

    @field_validator("num_workers", mode="before")
    @classmethod
    def _number_or_range(cls, value: Any) -> Any:
        limits = list(value) if isinstance(value, list | tuple) else [value, value]
        positive = all(isinstance(limit, int) and not isinstance(limit, bool) and limit > 0 for limit in limits)
        if not positive or len(limits) != 2 or limits[0] > limits[1]:
            raise ValueError("must be a positive number or [min, max], for example 2 or [1, 4]")
        return value

    @property
    def fewest_workers(self) -> int:
        """Minimum number of workers; with fewer, training waits."""
        return self.num_workers if isinstance(self.num_workers, int) else self.num_workers[0]

    @property
    def most_workers(self) -> int:
        """Maximum number of workers."""
        return self.num_workers if isinstance(self.num_workers, int) else self.num_workers[1]

    def whole_groups(self, workers: int) -> int:
        """Return how many of so many workers can train: a multiple of ``sequence_parallel``."""
        return workers - workers % self.sequence_parallel

    @property
    def is_elastic(self) -> bool:
        """True if the number of workers may change during training."""
        return self.fewest_workers < self.most_workers
