"""One optimizer step, and one pass over an evaluation set.

Every worker makes the same collectives in the same order, whatever its rows hold. Otherwise the workers wait for each other in
different places, or add up numbers that do not belong together. Under ZeRO-3 each call of a module that has weights gathers them
from all workers, so calling one is a collective, in backward as well; under ZeRO-1 and 2 so is each gradient that a weight gets.
Rows differ between workers in number (fillers), width, labels, sources and weights. What is called, and how often, may depend on
the config, on the model and on the row plan, which all workers know, but never on a worker's own rows. A part of the model that
only some rows need, such as an encoder of images, is called for every microbatch all the same, on a stand-in that counts nothing.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from raysft.data.types import IGNORE_INDEX
from raysft.errors import RunFailed
from raysft.telemetry.events import Evaluation
from raysft.train.job import Batch

KINDS = {
    "input_ids": torch.long,
    "position_ids": torch.long,
    "labels": torch.long,
    "weights": torch.float32,
    "sources": torch.long,
}


@dataclass(frozen=True)
class StepResult:
    """What one optimizer step came to."""

    loss: float
    """The step's loss over all workers: the weighted sum over trained tokens divided by their weight."""
    norm: float
    """Norm of the whole gradient before clipping."""
    by_source: np.ndarray
    """[sources] float64 the weighted sum of each source."""
    applied: bool
    """Whether the weights were changed; they are not where the gradient is infinite or no number."""
    noticed: bool = False
    """Whether any worker's machine is about to be taken away."""
    late: bool = False
    """Whether the first worker's clock asks for a checkpoint."""


def train_step(
    engine: Any,
    batch: Batch,
    weight: float,
    sources: int = 1,
    asks: Callable[[], tuple[bool, bool]] = lambda: (False, False),
) -> StepResult:
    """Train on one worker's rows of a step.

    Args:
        engine: the DeepSpeed engine.
        batch: this worker's rows, as ``data.stream`` makes them.
        weight: weight of the trained tokens of the whole step, over all workers; their number where all count the same.
        sources: how many sources there are.
        asks: whether this worker's machine is about to be taken away, and whether its clock asks for a checkpoint; called
            when all is computed, and all workers are told.
    """
    accumulation = engine.gradient_accumulation_steps()
    # DeepSpeed averages over microbatches and workers; the sum is wanted, over one known number of tokens.
    scale = accumulation * dist.get_world_size() / weight
    totals = torch.zeros(3 + sources, device=engine.device)
    norm = None
    for microbatch in microbatches(batch, engine.train_micro_batch_size_per_gpu(), engine.device):
        loss, by_source, _ = engine(**microbatch, number_of_sources=sources)
        # 1, or no number where the loss is infinite, though its gradient may be finite: such a step is not to be applied.
        engine.backward(loss * scale * (loss.detach() * 0 + 1))
        if engine.is_gradient_accumulation_boundary() and not hasattr(engine.optimizer, "_global_grad_norm"):
            # A plain optimizer (ZeRO 0 in float32) does not keep the norm, and its gradients are whole on each worker.
            norm = torch.nn.utils.get_total_norm([p.grad for p in engine.module.parameters() if p.grad is not None])
        with _without_update(engine) if norm is not None and not torch.isfinite(norm) else nullcontext():
            engine.step()
        totals += torch.cat([totals.new_zeros(2), loss.detach()[None], by_source])
    totals[:2] = totals.new_tensor(asks())
    dist.all_reduce(totals)
    noticed, late, total, *by_source = totals.double().tolist()
    norm = float(norm if norm is not None else engine.get_global_grad_norm())
    applied = math.isfinite(norm) and engine.was_step_applied()
    return StepResult(total / weight, norm, np.asarray(by_source), applied, noticed > 0, late > 0)


@contextmanager
def _without_update(engine: Any) -> Iterator[None]:
    """A step of which only the counting is done, as ZeRO does it by itself where a gradient is not finite."""
    update = engine.optimizer.step
    engine.optimizer.step = lambda *arguments, **options: None
    try:
        yield
    finally:
        engine.optimizer.step = update


@torch.no_grad()
def evaluate(model: Any, name: str, step: int, batches: Iterable[Batch], rows: int, device: torch.device) -> Evaluation:
    """Loss and accuracy of an evaluation set, exact over all workers: sums are added up, then divided once.

    Every token counts the same here, whatever its weight in training.

    Args:
        model: ``TokenLoss``, or the engine around it.
        name: name of the set.
        step: optimizer steps done.
        batches: this worker's rows; every worker has the same number of them.
        rows: rows computed at once.
        device: where the model is.
    """
    training = model.training
    model.eval()
    totals = torch.zeros(3, dtype=torch.float64, device=device)
    for batch in batches:
        for microbatch in microbatches(batch, rows, device):
            shown = {name: microbatch[name] for name in ("input_ids", "position_ids", "labels")}
            loss, _, correct = model(**shown, score=True)
            # A label at the front of an example is never predicted, and the data stage has masked it.
            trained = (microbatch["labels"][:, 1:] != IGNORE_INDEX).sum()
            totals += torch.stack([loss.double(), correct.double(), trained.double()])
    model.train(training)
    dist.all_reduce(totals)
    loss, correct, trained = totals.tolist()
    if not trained:
        raise RunFailed(f"evaluation set {name!r} has no trained token")
    return Evaluation(name=name, step=step, loss=loss / trained, accuracy=correct / trained, tokens=int(trained))


def microbatches(batch: Batch, rows: int, device: torch.device) -> Iterable[dict[str, torch.Tensor]]:
    """Cut rows into microbatches, without the padding that all rows of one have at their end."""
    for start in range(0, len(batch["row"]), rows):
        part = {name: values[start : start + rows] for name, values in batch.items()}
        width = max(8, -(-int(part["tokens"].max()) // 8) * 8)
        yield {
            name: torch.as_tensor(part[name][:, :width], dtype=kind).to(device, non_blocking=True)
            for name, kind in KINDS.items()
            if name in part
        }
