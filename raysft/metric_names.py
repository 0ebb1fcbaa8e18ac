"""Names and directions of what evaluations and predictions measure, for all who compare them: training, sweeps, reports."""

from __future__ import annotations

from collections.abc import Sequence

SPEED = ("runtime", "samples_per_second", "steps_per_second")
"""Measures of how long an evaluation took, without its prefix; what is from the cache has none."""
EVALUATION: dict[str, bool | None] = {"loss": False, "perplexity": False, "accuracy": True, "tokens": None}
"""Measure of an evaluation → True if the highest value is best; None if neither the highest nor the lowest is."""
METRIC_KEYS = {
    "similarity": ("rouge-1", "rouge-2", "rouge-l", "bleu-4"),
    "rouge": ("rouge1", "rouge2", "rougeL", "rougeLsum"),
    **{name: (name,) for name in ("bleu", "bleu_zh", "chrf", "exact_match")},
}
"""Names of the values of each built-in metric of predictions, for those who do not load it. The highest value is best in all."""


def higher_is_better(result: str) -> bool | None:
    """Direction of a key of ``all_results.json``, over all sources or for one of them.

    Returns:
        True if the highest value is best, False if the lowest is, None if neither is or that is unknown.

    >>> higher_is_better("eval_loss"), higher_is_better("eval_chats_accuracy"), higher_is_better("predict_rouge-l_low")
    (False, True, True)
    >>> higher_is_better("predict_f1"), higher_is_better("eval_tokens"), higher_is_better("best_eval_loss")
    (None, None, False)
    """
    result = result.removeprefix("best_")
    if result == "train_loss":
        return False
    if result.startswith("eval_"):
        return EVALUATION.get(result.rpartition("_")[2])
    if not result.startswith(("predict_", "base_predict_")):
        return None
    score = result.removesuffix("_low").removesuffix("_high")
    known = any(score.endswith(f"_{key}") for keys in METRIC_KEYS.values() for key in keys)
    return True if known else None


def directions(metrics: Sequence[str], mode: str | Sequence[str] | None) -> list[bool | None]:
    """Return for each metric of a sweep whether the highest value is best.

    Args:
        metrics: ``tune.metric``.
        mode: ``tune.mode``. None: each metric has its own direction.

    >>> directions(["eval_loss", "predict_chrf"], None), directions(["eval_loss"], "max")
    ([False, True], [True])
    """
    if mode is None:
        return [higher_is_better(metric) for metric in metrics]
    return [each == "max" for each in ([mode] * len(metrics) if isinstance(mode, str) else mode)]
