"""Events of a training run: what workers and the scaling policy report to the driver while it runs.

``Event`` is the union of all event classes. ``TrainLog`` in ``train_log`` handles each of them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class SetupDone:
    """The workers loaded the model, and a checkpoint if there was one; training starts now."""

    step: int
    """Optimizer steps done before: 0, or those of the checkpoint."""
    workers: int
    model_seconds: float
    """Seconds to load the model and the checkpoint."""
    data_wait_seconds: float
    """Seconds spent waiting for the first rows after that."""
    parameters: int
    trained_parameters: int
    log: list[dict[str, Any]] = field(default_factory=list)
    """Log records from the checkpoint, for a driver that died before it wrote them."""


@dataclass(frozen=True)
class StepRecord:
    """Metrics of one optimizer step, as logged and printed. The keys include those of LLaMA-Factory's ``trainer_log.jsonl``."""

    current_steps: int
    total_steps: int
    loss: float
    """Mean loss over the step's loss tokens, natural logarithm."""
    lr: float
    grad_norm: float
    epoch: float
    percentage: float
    elapsed_time: str
    remaining_time: str
    throughput: float
    """Tokens per second over all workers, without padding."""
    total_tokens: int
    """Tokens without padding consumed so far."""
    loss_tokens: int
    """Loss tokens of this step: the denominator of its loss."""
    packing_efficiency: float
    """Fraction of the step's row capacity that holds tokens, not padding."""
    rows: int
    """Rows consumed so far over all workers (the cursor)."""
    step_seconds: float
    data_wait_seconds: float
    """Seconds before the step until all workers had their rows, and in it until rank 0 had the pixels of its images."""
    memory_gib: float
    """Peak memory of rank 0's GPU; without a GPU, resident memory of its process."""
    memory_total_gib: float
    loss_token_throughput: float = 0.0
    """Loss tokens per second over all workers."""
    throughput_per_device: float = 0.0
    """Tokens per second and device, without padding."""
    loss_token_throughput_per_device: float = 0.0
    """Loss tokens per second and device."""
    mfu: float | None = None
    """Model FLOPs utilization: the model's own FLOPs divided by the devices' 16-bit peak; None without a GPU."""
    source_losses: dict[str, float] = field(default_factory=dict)
    """Mean loss over the loss tokens of each source in this step; empty with a single source."""
    router_aux_loss: float | None = None
    """Load balancing loss of the routers, without its coefficient; None without ``train.router_aux_loss_coef``."""

    def line(self) -> str:
        """Format the step as one line for the terminal.

        >>> StepRecord(120, 1000, 1.83421, 1.9e-05, 0.71, 0.1, 12.0, "0:10", "1:13", 41234.0, 9, 5, 0.961, 3840,
        ...            2.0, 0.0, 61.2, 80.0).line()
        'step 120/1000 | loss 1.8342 | lr 1.9e-05 | grad 0.71 | 41.2k tok/s | 96.1% packed | mem 61/80 GiB'
        """
        speed = f"{self.throughput / 1000:.1f}k" if self.throughput >= 1000 else f"{self.throughput:.0f}"
        return (
            f"step {self.current_steps}/{self.total_steps} | loss {self.loss:.4f} | lr {self.lr:.1e} | "
            f"grad {self.grad_norm:.2f} | {speed} tok/s | {100 * self.packing_efficiency:.1f}% packed | "
            + (f"{100 * self.mfu:.0f}% mfu | " if self.mfu is not None else "")
            + f"mem {self.memory_gib:.0f}/{self.memory_total_gib:.0f} GiB"
        )


@dataclass(frozen=True)
class StepSkipped:
    """An optimizer step was not applied because its loss or gradient was not finite."""

    step: int
    reason: str


@dataclass(frozen=True)
class EvaluationDone:
    """All evaluation sets were evaluated."""

    record: dict[str, Any]
    """``current_steps``, ``total_steps``, ``epoch``, ``percentage``, and the ``evaluation_results``."""
    note: str = ""
    """What to add to the printed line, for example that the results are from the cache."""


@dataclass(frozen=True)
class GenerationDone:
    """The predictions of a step's model were scored."""

    record: dict[str, Any]
    """``current_steps``, ``total_steps``, ``epoch``, ``percentage``, and the numbers of ``predict_results.json``."""


@dataclass(frozen=True)
class GenerationNotice:
    """Something about the predictions of a step's model, which may not come."""

    step: int
    message: str


@dataclass(frozen=True)
class StoppedEarly:
    """Early stopping ended the training."""

    step: int
    metric: str
    """``train.best_metric``."""
    best_step: int
    best_value: float | None
    """None if no evaluation gave a finite value."""


@dataclass(frozen=True)
class CheckpointSaved:
    """A checkpoint is complete."""

    step: int
    rows: int


@dataclass(frozen=True)
class CheckpointFailed:
    """A checkpoint could not be written. Training continues, and older checkpoints are kept."""

    step: int
    reason: str
    skipped: bool = False
    """True if nothing was written because the checkpoint before it was still being written."""
    worker: str = ""
    """Who could not: run, rank and place."""


@dataclass(frozen=True)
class CheckpointCorrupt:
    """A checkpoint differs from what was written; the one before it is used instead."""

    reason: str


@dataclass(frozen=True)
class Waiting:
    """A worker or the scaling policy waits for storage or nodes."""

    message: str
    worker: str = ""
    """Who waits: run, rank and place; empty for the scaling policy."""


@dataclass(frozen=True)
class WorkersRestarting:
    """The workers failed and are started again."""

    reason: str


@dataclass(frozen=True)
class WorkersResized:
    """An elastic training is restarted with more workers."""

    before: int
    after: int


@dataclass(frozen=True)
class PreemptionNotice:
    """A worker's machine will be taken away soon; a checkpoint follows."""

    step: int
    reason: str


@dataclass(frozen=True)
class WorkerSlow:
    """A worker is slower than the others, which wait for it."""

    step: int
    rank: int
    place: str
    """Its host, and its GPU."""
    factor: float
    """Its own time in a step, divided by the median of the others."""
    cause: str


@dataclass(frozen=True)
class WorkersAlive:
    """A sign of life of the first worker, for times in which nothing else is reported."""

    step: int
    """The step that is trained on, from 1; 0 before the first."""
    phase: str


@dataclass(frozen=True)
class WorkerHangs:
    """A worker makes no progress. Each worker reports itself."""

    rank: int
    workers: int
    """Number of workers that train."""
    place: str
    """Its host, and its GPU."""
    step: int
    phase: str
    """A ``Phase`` of ``raysft.train.phases``."""
    seconds: int
    """Time without progress."""
    stacks: str
    """Name of the file in ``diagnosis/`` with the stacks of its threads; empty if they could not be written."""
    ends: bool
    """True if it ends itself now, so that the workers restart."""


@dataclass(frozen=True)
class TrainingEnded:
    """The training is complete and its model is written."""

    train: dict[str, Any]
    """Results for ``train_results.json``."""
    eval: dict[str, float]
    """Results for ``eval_results.json``; empty without evaluation sets."""


@dataclass(frozen=True)
class TrainingStopped:
    """The training was stopped before its end; its checkpoint is kept, and no model is written."""

    step: int
    reason: str
    eval: dict[str, float]
    """Results of the latest evaluation."""
    failed: bool = False
    """True if it cannot continue as it was asked to, False if it was asked to stop."""


Event = (
    SetupDone
    | StepRecord
    | StepSkipped
    | EvaluationDone
    | GenerationDone
    | GenerationNotice
    | StoppedEarly
    | CheckpointSaved
    | CheckpointFailed
    | CheckpointCorrupt
    | Waiting
    | WorkersRestarting
    | WorkersResized
    | PreemptionNotice
    | WorkerSlow
    | WorkersAlive
    | WorkerHangs
    | TrainingEnded
    | TrainingStopped
)
Emit = Callable[[Event], None]
"""Receives events: in a worker it sends them to the driver, in the driver it handles them."""
