"""Results of training and of evaluations, under the names that the files of a run have."""

from __future__ import annotations

import math
from dataclasses import dataclass

TRAIN_RESULTS = (
    *(
        "train_loss",
        "train_runtime",
        "train_steps_per_second",
        "train_samples_per_second",
        "train_tokens_per_second",
        "effective_tokens_per_sec",
        "total_flos",
        "num_input_tokens_seen",
        "packing_efficiency",
        "epoch",
    ),
    *("total_steps", "total_rows", "total_tokens", "planned_steps", "best_step"),
    *("seconds_to_first_step", "seconds_to_launch", "seconds_to_load_model", "seconds_to_wait_for_data"),
    *("seconds_to_evaluate", "seconds_of_first_step"),
)
"""Names of all results in ``train_results.json``. Only a training that ends before its row plan has ``planned_steps``, and only one
that looks for its best evaluation has ``best_step``, with ``best_eval_loss`` or what else ``train.best_metric`` names."""


@dataclass(frozen=True)
class Evaluation:
    """Loss and accuracy on one evaluation set after some step."""

    name: str
    step: int
    loss: float
    """Mean loss over the loss tokens, natural logarithm."""
    accuracy: float
    """Fraction of loss tokens that the model ranks first."""
    tokens: int
    """Loss tokens: the denominator of both."""
    seconds: float | None = None
    """Time that it took; None if it was not computed but is from the cache."""
    examples: int = 0
    steps: int = 0
    """Microbatches of each worker."""

    @property
    def perplexity(self) -> float:
        """exp(loss), or infinity on overflow."""
        try:
            return math.exp(self.loss)
        except OverflowError:
            return math.inf


def evaluation_results(evaluations: list[Evaluation]) -> dict[str, float]:
    """Flatten evaluations: token-weighted ``eval_loss``, ``eval_perplexity``, ``eval_accuracy`` and ``eval_tokens`` over all
    sets, and with several sets ``eval_{name}_loss`` and so on for each set.

    ``eval_runtime``, ``eval_samples_per_second`` and ``eval_steps_per_second`` are of the sets that were computed. They are
    missing where the cache had all of them.

    >>> evaluation_results([Evaluation("a", 3, 1.0, 0.5, 30), Evaluation("b", 3, 2.0, 0.1, 10)])["eval_loss"]
    1.25
    """
    total = sum(evaluation.tokens for evaluation in evaluations)
    if not total:
        return {}
    computed = [evaluation for evaluation in evaluations if evaluation.seconds is not None]
    mean = Evaluation(
        name="",
        step=evaluations[0].step,
        loss=sum(e.loss * e.tokens for e in evaluations) / total,
        accuracy=sum(e.accuracy * e.tokens for e in evaluations) / total,
        tokens=total,
        seconds=sum(e.seconds or 0.0 for e in computed) if computed else None,
        examples=sum(e.examples for e in computed),
        steps=sum(e.steps for e in computed),
    )
    results: dict[str, float] = {}
    for evaluation in [mean, *(evaluations if len(evaluations) > 1 else [])]:
        prefix = f"eval_{evaluation.name}_" if evaluation.name else "eval_"
        results[prefix + "loss"] = evaluation.loss
        results[prefix + "perplexity"] = evaluation.perplexity
        results[prefix + "accuracy"] = evaluation.accuracy
        results[prefix + "tokens"] = evaluation.tokens
        if evaluation.seconds is not None:
            results |= _speed(prefix, evaluation.seconds, evaluation.examples, evaluation.steps)
    return results


def _speed(prefix: str, seconds: float, examples: int, steps: int) -> dict[str, float]:
    """Return runtime and speed under the names that a ``Trainer`` gives them.

    >>> _speed("eval_", 2.0, 9, 3)
    {'eval_runtime': 2.0, 'eval_samples_per_second': 4.5, 'eval_steps_per_second': 1.5}
    """
    speeds = {"samples_per_second": examples / seconds, "steps_per_second": steps / seconds} if seconds else {}
    return {f"{prefix}runtime": round(seconds, 4), **{prefix + key: round(speed, 3) for key, speed in speeds.items()}}
