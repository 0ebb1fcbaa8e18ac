"""One pass over an evaluation set. As in a step, every worker makes the same collectives in the same order (``step``)."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from time import monotonic
from typing import Any

import torch
import torch.distributed as dist

from raysft.data.types import IGNORE_INDEX
from raysft.errors import RunFailed
from raysft.telemetry.results import Evaluation
from raysft.train.job import Batch
from raysft.train.pixels import ImageInputs, Pixels, beside
from raysft.train.sequence_group import ALONE, SequenceGroup
from raysft.train.step import microbatches

LOOK_SECONDS, LOOK_BATCHES = 1.0, 64
"""About how many seconds, and at most how many batches of an evaluation, pass between two checks for a request to stop."""


class EvaluationStopped(Exception):
    """A worker was asked to stop; all workers drop the evaluation after the same batch."""


@torch.no_grad()
def evaluate(
    model: Any,
    name: str,
    step: int,
    batches: Iterable[Batch],
    rows: int,
    device: torch.device,
    stops: Callable[[], bool] | None = None,
    examples: int = 0,
    images: ImageInputs | None = None,
    source: Any = None,
    group: SequenceGroup = ALONE,
) -> Evaluation:
    """Compute loss and accuracy on an evaluation set, exactly over all workers: sums are reduced, then divided once.

    All loss tokens count the same, regardless of their weight in training.

    Args:
        model: ``TokenLoss``, or the engine around it.
        name: name of the set.
        step: optimizer steps done.
        batches: this worker's rows; all workers have the same number of batches.
        rows: rows per microbatch.
        device: where the model is.
        stops: True if this worker was asked to stop. All workers share this about once a second. Default: never asked.
        examples: how many the set has, for their number per second.
        images: makes the pixels of images; None if the data has none.
        source: ``RowSource`` of the set, if there are images.
        group: the workers that have the same rows.

    Raises:
        RunFailed: the set has no loss token.
        EvaluationStopped: a worker was asked to stop; raised by all workers alike.
    """
    training, started = model.training, time.perf_counter()
    model.eval()
    try:
        look = _Looks(stops, device) if stops else lambda: None
        with beside(images, batches, source, rows) as (read, pixels):
            totals, steps = _evaluated(model, read, rows, device, look, pixels, group)
    finally:
        model.train(training)
    dist.all_reduce(totals)
    loss, correct, tokens = totals.tolist()
    if not tokens:
        raise RunFailed(
            f"evaluation set {name!r} has no loss tokens; remove the set, or add examples with assistant messages"
        )
    seconds = time.perf_counter() - started
    return Evaluation(name, step, loss / tokens, correct / tokens, int(tokens), seconds, examples, steps)


def _evaluated(
    model: Any,
    batches: Iterable[Batch],
    rows: int,
    device: torch.device,
    look: Callable[[], None],
    pixels: Pixels | None,
    group: SequenceGroup,
) -> tuple[torch.Tensor, int]:
    """Return this worker's sums of loss, correct predictions and loss tokens, as [3] float64, and its number of microbatches."""
    totals, steps = torch.zeros(3, dtype=torch.float64, device=device), 0
    for batch in batches:
        look()
        for microbatch in microbatches(batch, rows, device, pixels, group):
            inputs = {name: value for name, value in microbatch.items() if name not in ("weights", "sources")}
            loss, _, correct = model(**inputs, score=True)
            # The first token of an example is never predicted; the data stage has masked its label.
            loss_tokens = (microbatch["targets"] != IGNORE_INDEX).sum()
            totals += torch.stack([loss.double(), correct.double(), loss_tokens.double()])
            steps += 1
    return totals, steps


class _Looks:
    """Share between batches whether a worker was asked to stop, about once a second: each time costs a collective.

    The first worker's time for a batch determines the interval, so that all workers check before the same batches.
    """

    def __init__(self, stops: Callable[[], bool], device: torch.device) -> None:
        self._stops, self._device = stops, device
        self._last: float | None = None
        self._distance, self._left = 1, 0

    def __call__(self) -> None:
        """Called before each batch.

        Raises:
            EvaluationStopped: a worker was asked to stop.
        """
        if self._left:
            self._left -= 1
            return
        now = monotonic()
        seconds = LOOK_SECONDS if self._last is None else (now - self._last) / self._distance
        seconds = seconds if dist.get_rank() == 0 else 0.0
        shared = torch.tensor([float(self._stops()), seconds], device=self._device)
        dist.all_reduce(shared)
        stops, seconds = shared.tolist()
        if stops:
            raise EvaluationStopped
        self._last, self._distance = now, min(LOOK_BATCHES, max(1, int(LOOK_SECONDS / max(seconds, 1e-6))))
        self._left = self._distance - 1
