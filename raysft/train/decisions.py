"""What a scheduler of trials decides after an evaluation, on its way from the driver to the workers."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from enum import IntEnum
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

if TYPE_CHECKING:
    from ray.util.queue import Queue

WAIT_SECONDS = 300
"""How long the first worker waits for a decision before it continues; well below the timeout of the others in a collective."""


class Decision(IntEnum):
    """What a training run does after an evaluation."""

    GO_ON = 0
    SAVE = 1
    """Save a checkpoint, and ask again."""
    STOP = 2
    """Save a checkpoint and end, without a trained model."""


Decide = Callable[[int], Decision]
"""Returns the decision on the evaluation after a step; called by the first worker."""


@dataclass(frozen=True)
class Outside:
    """What a worker hears from outside its training loop. What only one worker knows reaches the others in collectives."""

    preemption_reason: Callable[[], str] = str
    """Returns why this worker's machine will be preempted soon, so that a checkpoint is saved; empty if it will not be."""
    stop_reason: Callable[[], str] = str
    """Returns why the training should save a checkpoint and end; empty if it should not. The first worker's answer counts."""
    decide: Decide | None = None
    """Asked after each evaluation except the first and the last whether to continue."""
    generation: Any = None
    """``generation.Line`` to the driver, which generates with the models of steps; None if it does not."""


def receiver(queue: Queue) -> Decide:
    """Return a function that waits for what the driver puts in a queue: (step, decision)."""
    from ray.exceptions import RayError
    from ray.util.queue import Empty

    def decide(step: int) -> Decision:
        limit = time.monotonic() + WAIT_SECONDS
        try:
            while (left := limit - time.monotonic()) > 0:
                after, decision = queue.get(timeout=left)
                if after == step:  # otherwise it is for workers that failed before they read it
                    return Decision(decision)
        except (Empty, RayError):
            pass  # a scheduler that does not respond stops nothing
        return Decision.GO_ON

    return decide


def shared(decide: Decide, step: int, device: Any) -> Decision:
    """Return the first worker's decision on all workers. A collective."""
    return Decision(from_first(int(decide(step)) if dist.get_rank() == 0 else 0, device=device)[0])


def from_first(*values: int, device: Any) -> list[int]:
    """Return the first worker's numbers on all workers. A collective."""
    tensor = torch.tensor([int(value) for value in values], device=device)
    dist.broadcast(tensor, src=0)
    return tensor.tolist()


def any_worker(*values: bool, device: Any) -> list[bool]:
    """Return, for each value and on all workers, whether it is true for any worker. A collective."""
    tensor = torch.tensor([int(value) for value in values], device=device)
    dist.all_reduce(tensor, op=dist.ReduceOp.MAX)
    return [bool(value) for value in tensor.tolist()]
