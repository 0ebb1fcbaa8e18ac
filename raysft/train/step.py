"""One optimizer step.

Every worker makes the same collectives in the same order, no matter what its rows hold. Otherwise the workers would wait for
each other in different places, or sum numbers that do not belong together. With ZeRO-3, each call of a module with weights gathers
them from all workers, in forward and backward, so calling it is a collective; with ZeRO-1 and 2, each gradient of a weight is
one. Workers' rows differ in number (fillers), width, labels, sources and weights. So which modules are called, and how often,
may depend on the config, the model and the row plan, which all workers know, but never on a worker's own rows. A part of the
model that only some rows need, such as an image encoder, must be called for every microbatch, on a stand-in without effect.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from raysft.train.deepspeed_internals import keeps_gradient_norm
from raysft.train.device_timer import DeviceTimer
from raysft.train.job import Batch
from raysft.train.phases import Phases
from raysft.train.pixels import Pixels
from raysft.train.sequence_group import ALONE, SequenceGroup
from raysft.train.step_rows import cut, with_targets
from raysft.train.uploads import predicting, uploaded

TENSORS = {
    "input_ids": torch.long,
    "position_ids": torch.long,
    "targets": torch.long,
    "weights": torch.float32,
    "sources": torch.long,
}
"""Inputs of ``TokenLoss`` and their dtypes; a batch holds them as [rows, tokens], with labels in place of targets."""


@dataclass(frozen=True)
class StepResult:
    """Result of one optimizer step."""

    loss: float
    """The step's loss over all workers: the weighted sum over loss tokens divided by their total weight."""
    norm: float
    """Norm of the gradient over all workers, before clipping."""
    by_source: np.ndarray
    """[sources] float64: the weighted sum of losses of each source."""
    applied: bool
    """False if the weights were not updated, because the gradient is NaN or infinite."""
    noticed: bool = False
    """True if any worker's machine is about to be preempted."""
    late: bool = False
    """True if the first worker's clock asks for a checkpoint."""
    over: bool = False
    """True if the first worker was asked to stop."""
    rows_are_late: bool = False
    """True if any worker does not have the rows of the next step."""
    forward_seconds: float = 0.0
    """Time of this worker's forward passes."""
    pixel_seconds: float = 0.0
    """Time that this worker waited for the pixels of its images."""
    held_seconds: float = 0.0
    """Time by which any worker's waits for pixels held this one up: the longest of them, unless it was over before the others
    had to wait for it."""
    router_aux_loss: float | None = None
    """The load balancing loss of routers over all workers (``router_loss``), which ``loss`` does not contain; None without it."""


def train_step(
    engine: Any,
    batch: Batch,
    weight: float,
    sources: int = 1,
    asks: Callable[[], tuple[bool, bool, bool, bool]] = lambda: (False, False, False, False),
    phases: Phases | None = None,
    pixels: Pixels | None = None,
    tokens: float = 1.0,
    group: SequenceGroup = ALONE,
) -> StepResult:
    """Train on one worker's rows of a step.

    Args:
        engine: the DeepSpeed engine.
        batch: this worker's rows, from a ``RowSource``.
        weight: total weight of the step's loss tokens over all workers; without weights, their number.
        sources: number of sources.
        asks: returns (this worker's machine is about to be preempted, its clock asks for a checkpoint, it should stop, it lacks
            the next step's rows). It is called after the computation, and all workers learn whether any of these is true
            for any of them.
        phases: told what this worker does.
        pixels: of the rows' images; None if the data has none.
        tokens: of the step over all workers, without padding; the loss of routers is divided by them.
        group: the workers that have the same rows.
    """
    phases = phases or Phases()
    # DeepSpeed averages over microbatches and workers; undo that, and divide by the step's weight instead.
    averaged = engine.gradient_accumulation_steps() * dist.get_world_size()
    totals = torch.zeros(2 + sources, device=engine.device)
    router_loss = engine.module.router_loss
    norm, forward, started = None, DeviceTimer(engine.device), time.perf_counter()
    rows = engine.train_micro_batch_size_per_gpu()
    given = microbatches(batch, rows, engine.device, pixels, group)
    for part, microbatch in zip(cut(batch, rows), given, strict=True):
        phases.enter("forward")
        with forward, router_loss or nullcontext():
            loss, by_source, _ = engine(**microbatch, number_of_sources=sources)
        balance = router_loss(part, group) if router_loss else loss.new_zeros(())
        phases.enter("backward")
        # `loss * 0 + 1` is 1 for a finite loss and NaN otherwise; it makes the gradient NaN, so that the step is skipped.
        whole = loss * (averaged / weight) * (loss.detach() * 0 + 1)
        engine.backward(whole + router_loss.coefficient * averaged / tokens * balance if router_loss else whole)
        phases.enter("step")
        norm = _stepped(engine)
        # Workers that share rows all have the balance of whole rows.
        balanced = balance.detach()[None] / group.size
        totals += torch.cat([loss.detach()[None], by_source, balanced])
    norm = norm if norm is not None else engine.get_global_grad_norm()
    summed, norm, waited, held = _summed(totals, asks(), norm, pixels, started)
    total, *by_source, balanced, noticed, late, over, lacks = summed
    applied = math.isfinite(norm) and engine.was_step_applied()
    heard = (noticed > 0, late > 0, over > 0, lacks > 0)
    times = (forward.seconds(), waited, held)
    balanced = balanced / tokens if router_loss else None
    return StepResult(total / weight, norm, np.asarray(by_source), applied, *heard, *times, balanced)


def _stepped(engine: Any) -> torch.Tensor | None:
    """Call the engine's step after a microbatch, without an update if the gradient is not finite.

    Returns:
        The norm of the step's gradient with a plain optimizer, whose gradients are whole on each worker; others keep it
        themselves.
    """
    norm = None
    if engine.is_gradient_accumulation_boundary() and not keeps_gradient_norm(engine):
        norm = torch.nn.utils.get_total_norm([p.grad for p in engine.module.parameters() if p.grad is not None])
    with _without_update(engine) if norm is not None and not torch.isfinite(norm) else nullcontext():
        engine.step()
    return norm


def _summed(
    totals: torch.Tensor, asked: Sequence[bool], norm: torch.Tensor | float, pixels: Pixels | None, started: float
) -> tuple[list[float], float, float, float]:
    """Sum numbers over all workers, and wait for the device once.

    Args:
        totals: this worker's numbers on the device.
        asked: further ones, on the CPU.
        norm: of the gradient, the same on all workers.
        pixels: of the step's images.
        started: when the step started, by ``time.perf_counter``.

    Returns:
        The sums; the norm; how long this worker waited for pixels; and how long any worker's waits held it up.
    """
    waited, waits = 0.0, torch.zeros(0 if pixels is None else dist.get_world_size(), 2)
    if pixels is not None:
        waited = pixels.waited()
        waits[dist.get_rank()] = torch.tensor([waited, time.perf_counter() - started - waited])
    own = uploaded({"own": torch.cat([torch.tensor(asked, dtype=waits.dtype), waits.flatten()])}, totals.device)["own"]
    shared = torch.cat([totals, own])
    dist.all_reduce(shared)
    if isinstance(norm, torch.Tensor) and norm.device == totals.device:
        *sums, norm = torch.cat([shared.double(), norm.double().reshape(1)]).tolist()
    else:
        sums = shared.double().tolist()
    count = len(totals) + len(asked)
    pairs = list(zip(sums[count::2], sums[count + 1 :: 2], strict=True))
    held = _held_seconds(pairs, time.perf_counter() - started) if pairs else 0.0
    return sums[:count], float(norm), waited, held


def _held_seconds(workers: Sequence[Sequence[float]], seconds: float) -> float:
    """Return by how long waits for pixels have held up a step.

    Args:
        workers: for each, the time that it waited, and the rest of its step, in which it may have waited for another worker.
        seconds: time of this worker's step.

    >>> _held_seconds([(0.0, 3.0), (2.0, 1.0)], 3.0)
    2.0

    The second worker began earlier, while the first one still wrote a checkpoint:

    >>> _held_seconds([(0.0, 1.0), (2.0, 5.0)], 1.0)
    0.0
    """
    return max(0.0, min(max(waited for waited, _ in workers), seconds - min(rest for _, rest in workers)))


@contextmanager
def _without_update(engine: Any) -> Iterator[None]:
    """Make ``engine.step`` count the step without an update, as ZeRO itself does for a gradient that is not finite."""
    update = engine.optimizer.step
    engine.optimizer.step = lambda *arguments, **options: None
    try:
        yield
    finally:
        engine.optimizer.step = update


def microbatches(
    batch: Batch, rows: int, device: torch.device, pixels: Pixels | None = None, group: SequenceGroup = ALONE
) -> Iterable[dict[str, Any]]:
    """Cut rows into microbatches, and this worker's slice out of each: arguments of ``TokenLoss``."""
    for part in cut(batch, rows):
        own, examples = group.cut(with_targets(part))
        inputs: dict[str, Any] = {
            name: torch.as_tensor(own[name], dtype=dtype) for name, dtype in TENSORS.items() if name in own
        }
        inputs |= {"predicting": predicting(own["targets"]), "examples": examples}
        yield uploaded(inputs if pixels is None else inputs | pixels.take(), device)
