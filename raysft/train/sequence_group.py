"""Workers that compute the same rows together: each group of ``scaling.sequence_parallel`` of them gets what one worker would
get, and each worker in it computes a slice of the tokens.

A step's loss is a sum over tokens, divided by a number that all know. So DeepSpeed, which sums the gradients of all workers,
need not know about the groups.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import numpy as np
import torch.distributed as dist

from raysft.config.scaling import slice_tokens
from raysft.data.types import IGNORE_INDEX
from raysft.errors import RunFailed
from raysft.models.examples import Examples, Slice, example_lengths
from raysft.train.job import COLLECTIVE_SECONDS, Batch


@dataclass(frozen=True)
class SequenceGroup:
    """The group of one worker."""

    size: int = 1
    """Workers of each group."""
    place: int = 0
    """This worker's rank in the group, which is the number of its slice."""
    number: int = 0
    """The group's number, used instead of a worker's wherever rows are divided."""
    groups: int = 1
    """Number of groups."""
    processes: Any = None
    """Process group of its workers; None if it has only one."""

    @classmethod
    def join(cls, size: int) -> SequenceGroup:
        """Make the groups, which all workers do together, and return this worker's.

        Raises:
            RunFailed: the workers cannot be divided into groups of this size.
        """
        rank, workers = dist.get_rank(), dist.get_world_size()
        if workers % size:
            raise RunFailed(
                f"scaling.sequence_parallel={size} needs groups of {size} workers, but there are {workers}; "
                f"use a multiple of {size} workers"
            )
        made = [
            dist.new_group(list(range(first, first + size)), timeout=timedelta(seconds=COLLECTIVE_SECONDS))
            for first in range(0, workers if size > 1 else 0, size)
        ]
        number = rank // size
        return cls(size, rank % size, number, workers // size, made[number] if made else None)

    def slice_tokens(self, tokens: int) -> int:
        """Return how many tokens a slice of a row of ``tokens`` has."""
        return slice_tokens(tokens, self.size)

    def cut(self, part: Batch) -> tuple[Batch, Examples]:
        """Cut this worker's slice out of a microbatch whose labels are targets already (``step_rows.with_targets``).

        Returns:
            Arrays of [1, tokens], and where the examples of all slices lie; in a group of one, the input itself and its examples.
        """
        if self.size == 1:
            return part, Examples.of_rows(part["position_ids"])
        tokens = part["position_ids"].size
        width = self.slice_tokens(tokens)
        missing = width * self.size - tokens
        # What is missing becomes a separate example.
        lengths = [*example_lengths(part["position_ids"]).tolist(), *([missing] if missing else [])]
        start, stop = self.place * width, (self.place + 1) * width
        empty = {"targets": np.full(missing, IGNORE_INDEX), "position_ids": np.arange(missing)}
        cut = {
            name: np.concatenate([values.reshape(-1), empty.get(name, np.zeros(missing, values.dtype))])[
                None, start:stop
            ]
            for name, values in part.items()
            if values.ndim == 2
        }
        return cut, Examples.of_part(lengths, Slice(self.processes, self.size, start, stop))

    def cut_one(self, values: np.ndarray, empty: int) -> np.ndarray:
        """Cut this worker's slice out of values of all tokens, one row after another; what is missing at the end is ``empty``."""
        width = self.slice_tokens(len(values))
        filled = np.pad(values, (0, width * self.size - len(values)), constant_values=empty)
        return filled[self.place * width : (self.place + 1) * width]


ALONE = SequenceGroup()
"""The group of a worker that computes whole rows, where there is but one."""


def group_of(rank: int, workers: int, size: int) -> tuple[int, int]:
    """Return the number of a worker's group, and the number of groups.

    >>> [group_of(rank, 4, 2) for rank in range(4)]
    [(0, 2), (0, 2), (1, 2), (1, 2)]
    """
    return rank // size, max(1, workers // size)
