"""Workers that are slower than the others: every few steps all report how long they took, and the first one names the slowest.

A step takes all workers the same time, since they wait for each other in its collectives. What differs is the time before them:
waiting for rows, and the forward pass, except that with ZeRO-3 it gathers weights from all workers, and so says nothing either.
"""

from __future__ import annotations

import socket
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist

from raysft.telemetry.events import Emit, StepRecord, WorkerSlow

EVERY_STEPS = 20
"""Steps between two comparisons."""
FACTOR = 1.2
"""Multiple of the others' median from which a worker is called slow."""
LEAST_SHARE = 0.05
"""Share of a step by which it must be slower: anything less costs nobody time."""


@dataclass(frozen=True)
class WorkerTimes:
    """Means over the compared steps."""

    data: float
    """Seconds that a step waited for its rows."""
    forward: float
    """Seconds of its forward passes."""
    step: float
    """Seconds of the whole step."""
    memory: float
    """Peak memory in GiB: of the GPU, or resident memory."""
    clock: float
    """Clock of the GPU's multiprocessors in MHz; 0 without a GPU."""


@dataclass(frozen=True)
class Slow:
    """A worker that keeps the others waiting."""

    rank: int
    factor: float
    """Its own time, divided by the median of the others."""
    cause: str


def slowest(times: Sequence[WorkerTimes], forward_counts: bool = True) -> Slow | None:
    """Return the slowest worker if it is slow, and why.

    Args:
        times: of all workers, by rank.
        forward_counts: False if the forward pass waits for other workers.

    >>> usual = WorkerTimes(0.01, 0.40, 1.0, 60, 1980)
    >>> slowest([usual, usual, usual]) is None
    True
    >>> slowest([usual, WorkerTimes(0.01, 0.55, 1.2, 60, 1410), usual])
    Slow(rank=1, factor=1.37, cause='forward pass 0.55 s instead of 0.40 s, at 1,410 MHz instead of 1,980')
    >>> slowest([usual, usual, WorkerTimes(0.31, 0.40, 1.2, 60, 1980)]).cause
    'waits 0.31 s for its rows instead of 0.01 s'
    """
    if len(times) < 2:
        return None
    own = [each.data + (each.forward if forward_counts else 0.0) for each in times]
    rank = max(range(len(times)), key=own.__getitem__)
    others = [each for other, each in enumerate(times) if other != rank]
    usual = statistics.median(value for other, value in enumerate(own) if other != rank)
    one = times[rank]
    if own[rank] < FACTOR * usual or own[rank] - usual < LEAST_SHARE * one.step:
        return None
    data, forward, clock = (
        statistics.median(getattr(each, name) for each in others) for name in ("data", "forward", "clock")
    )
    if not forward_counts or one.data - data > one.forward - forward:
        cause = f"waits {one.data:.2f} s for its rows instead of {data:.2f} s"
    else:
        cause = f"forward pass {one.forward:.2f} s instead of {forward:.2f} s"
        if one.clock < 0.95 * clock:
            cause += f", at {one.clock:,.0f} MHz instead of {clock:,.0f}"
    return Slow(rank, round(own[rank] / usual, 2) if usual else float("inf"), cause)


class Stragglers:
    """Compares the workers of a training run; all of them call it alike."""

    def __init__(self, device: torch.device, emit: Emit, forward_counts: bool) -> None:
        """
        Args:
            device: where this worker computes.
            emit: receives ``WorkerSlow``; called by the first worker.
            forward_counts: False with ZeRO-3, and where workers exchange tokens.
        """
        self._device, self._emit, self._forward_counts = device, emit, forward_counts
        self._rank, self._workers = dist.get_rank(), dist.get_world_size()
        self._sums, self._steps = np.zeros(3), 0
        """Seconds of data, forward pass and step, over the steps since the last comparison."""
        self._told: set[int] = set()
        self._places: list[str] = []

    def after_step(self, record: StepRecord, data_seconds: float, forward_seconds: float) -> None:
        """Count a step, and compare the workers when it is time.

        Args:
            record: of the step, with this worker's own time for it; all have the same number of steps.
            data_seconds: time that this worker waited for its rows before it.
            forward_seconds: time of this worker's forward passes in it.
        """
        self._sums += data_seconds, forward_seconds, record.step_seconds
        self._steps += 1
        step = record.current_steps
        if self._workers == 1 or step % EVERY_STEPS:
            return
        mine = [*(self._sums / self._steps).tolist(), record.memory_gib, _clock(self._device)]
        self._sums, self._steps = np.zeros(3), 0
        together = torch.zeros(self._workers * len(mine), device=self._device)  # gloo accepts no other shape
        dist.all_gather_into_tensor(together, torch.tensor(mine, device=self._device))
        if not self._places:
            self._places = _places(self._workers, self._device)
        slow = slowest([WorkerTimes(*row) for row in together.view(self._workers, -1).tolist()], self._forward_counts)
        if self._rank == 0 and slow and slow.rank not in self._told:
            self._told.add(slow.rank)
            self._emit(WorkerSlow(step, slow.rank, self._places[slow.rank], slow.factor, slow.cause))


def place(device: torch.device) -> str:
    """Return where this worker runs, for messages: its host, and its GPU."""
    return socket.gethostname() + (f", GPU {device.index or 0}" if device.type == "cuda" else "")


def _places(workers: int, device: torch.device) -> list[str]:
    places: list[str] = [""] * workers
    dist.all_gather_object(places, place(device))
    return places


def _clock(device: torch.device) -> float:
    """Clock of the GPU's multiprocessors in MHz; 0 if it is unknown."""
    if device.type != "cuda":
        return 0.0
    try:
        return float(torch.cuda.clock_rate(device))
    except Exception:  # without NVML, or where the driver does not report it
        return 0.0
