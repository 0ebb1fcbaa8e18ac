"""Time that a device computes, without waiting for it. A GPU lags behind the CPU, whose clock only shows the launches."""

from __future__ import annotations

import time
from typing import Any

import torch


class DeviceTimer:
    """Adds up the seconds of its blocks."""

    def __init__(self, device: torch.device) -> None:
        """``device`` is what computes in the blocks."""
        self._cuda = device.type == "cuda"
        self._blocks: list[tuple[Any, Any]] = []

    def __enter__(self) -> None:
        self._start = self._mark()

    def __exit__(self, *_: object) -> None:
        self._blocks.append((self._start, self._mark()))

    def _mark(self) -> Any:
        if not self._cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def seconds(self) -> float:
        """Return the sum; on a GPU, only once it has finished the work."""
        if self._cuda:
            return sum(start.elapsed_time(end) for start, end in self._blocks) / 1000
        return sum(end - start for start, end in self._blocks)
