"""What a training reports while it runs."""

from __future__ import annotations

import math
from dataclasses import dataclass, field


@dataclass(frozen=True)
class StepRecord:
    """One optimizer step, as logged and printed; the keys are those of LLaMA-Factory's ``trainer_log.jsonl`` and more."""

    current_steps: int
    total_steps: int
    loss: float
    """Mean loss of the step's trained tokens, natural logarithm."""
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
    """Trained tokens of this step: what its loss is divided by."""
    packing_efficiency: float
    """Share of the step's row space that holds tokens and not padding."""
    rows: int
    """The cursor: rows consumed so far, over all workers."""
    step_seconds: float
    data_wait_seconds: float
    memory_gib: float
    """Peak memory of rank 0's device, or resident memory of its process without GPU."""
    memory_total_gib: float
    loss_token_throughput: float = 0.0
    """Trained tokens per second over all workers: what the training is for."""
    throughput_per_device: float = 0.0
    """Tokens per second of one worker's device, without padding."""
    loss_token_throughput_per_device: float = 0.0
    """Trained tokens per second of one worker's device."""
    mfu: float | None = None
    """Model FLOPs utilisation: share of the devices' 16-bit peak that the model's own operations use; None without GPU."""
    source_losses: dict[str, float] = field(default_factory=dict)
    """Mean loss of each source's trained tokens in this step, where there are several sources."""

    def line(self) -> str:
        """The step as one line for people.

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
class Evaluation:
    """Loss and accuracy of one evaluation set at one moment of the training."""

    name: str
    step: int
    loss: float
    """Mean loss of the trained tokens, natural logarithm."""
    accuracy: float
    """Share of trained tokens that are the most probable one."""
    tokens: int
    """Trained tokens that the two are means over."""

    @property
    def perplexity(self) -> float:
        """exp(loss); infinite where that overflows."""
        try:
            return math.exp(self.loss)
        except OverflowError:
            return math.inf


def evaluation_results(evaluations: list[Evaluation]) -> dict[str, float]:
    """Evaluations as flat results: ``eval_loss``, ``eval_perplexity``, ``eval_accuracy`` over all sets, token-weighted, and
    with more than one set ``eval_{name}_loss`` and so on for each.

    >>> evaluation_results([Evaluation("a", 3, 1.0, 0.5, 30), Evaluation("b", 3, 2.0, 0.1, 10)])["eval_loss"]
    1.25
    """
    total = sum(evaluation.tokens for evaluation in evaluations)
    if not total:
        return {}
    mean = Evaluation(
        name="",
        step=evaluations[0].step,
        loss=sum(e.loss * e.tokens for e in evaluations) / total,
        accuracy=sum(e.accuracy * e.tokens for e in evaluations) / total,
        tokens=total,
    )
    results: dict[str, float] = {}
    for evaluation in [mean, *(evaluations if len(evaluations) > 1 else [])]:
        prefix = f"eval_{evaluation.name}_" if evaluation.name else "eval_"
        results[prefix + "loss"] = evaluation.loss
        results[prefix + "perplexity"] = evaluation.perplexity
        results[prefix + "accuracy"] = evaluation.accuracy
        results[prefix + "tokens"] = evaluation.tokens
    return results
