"""Early stopping: which evaluation is the best so far, and when training stops for lack of improvement."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import replace

from raysft.config import TrainSection
from raysft.train.checkpoint.cursor import EVALUATION, PREDICTION, Best, Cursor

NO_SCORES = ("_low", "_high", "_tokens", "_examples", "_unscored", "_runtime", "_per_second")
"""Suffixes of results that messages do not offer as metrics to choose by."""


class MetricMissing(Exception):
    """The results that should have ``train.best_metric`` do not have it. The message is one line, with a remedy."""


def should_stop(train: TrainSection, best: Best | None) -> bool:
    """Return True if ``early_stopping.patience`` evaluations in a row brought no improvement."""
    patience = train.early_stopping.patience
    return patience is not None and best is not None and best.since >= patience


def known_best(train: TrainSection, cursor: Cursor, identity: Mapping[str, str]) -> Best | None:
    """Return the best evaluation of a checkpoint if this training can continue to compare against it, else None.

    It cannot if the values are not comparable, or if the config asks for the best model and that model was not kept.
    """
    best = cursor.best
    if best is None or not_comparable(train, cursor, identity):
        return None
    if train.keep_best:
        return best if best.kept else None
    # Without keep_best its model is no longer kept, since another one becomes the trained model.
    return replace(best, kept=False) if train.early_stopping.patience else None


def not_comparable(train: TrainSection, cursor: Cursor, identity: Mapping[str, str]) -> str:
    """Say why values of ``train.best_metric`` cannot be compared with the best one of a checkpoint; empty if they can."""
    best = cursor.best
    if best is None:
        return ""
    if (best.metric, best.lowest) != (train.best_metric, train.lowest_is_best):
        return "a different metric or direction now decides"
    if cursor.identity.get(EVALUATION) != identity.get(EVALUATION):
        return "different data is now evaluated"
    if train.best_metric.startswith("predict_") and cursor.identity.get(PREDICTION) != identity.get(PREDICTION):
        return "different prompts or generate settings now determine the predictions"
    return ""


class EarlyStopper:
    """Compares the results of evaluations by ``train.best_metric``.

    They are the same on all workers, since losses are sums over all of them, so all workers decide alike.
    """

    def __init__(self, train: TrainSection, keep: Callable[[], None], best: Best | None = None) -> None:
        """
        Args:
            train: the section of the config.
            keep: writes the current model as the best one.
            best: the best evaluation of the checkpoint that training resumes from.
        """
        self._train, self._keep = train, keep
        self.best = best
        """``best.value`` is None until an evaluation gives a finite value."""

    @property
    def active(self) -> bool:
        """True if the config asks to compare evaluations."""
        return self._train.comparing_key is not None

    @property
    def should_stop(self) -> bool:
        """True if training should stop now."""
        return should_stop(self._train, self.best)

    def judges(self, results: Mapping[str, float]) -> bool:
        """Return True if these results have the deciding metric."""
        return self.active and self._train.best_metric in results

    def update(self, results: Mapping[str, float], step: int) -> None:
        """Process the results after a step, and keep the model if they are the best.

        Evaluations and predictions of a step may come in one mapping, or one after another, all before the next optimizer step:
        what is kept is the current model. Every worker calls it with the same results.

        Args:
            results: values as ``eval_results.json`` and ``predict_results.json`` name them. Without any result of the kind that
                the metric belongs to (``eval_…``, ``predict_…``), they do not count as an evaluation: neither better nor worse.
            step: optimizer steps done. A step that was compared before is skipped.

        Raises:
            MetricMissing: there are results of its kind, but not the metric itself.
        """
        metric, lowest = self._train.best_metric, self._train.lowest_is_best
        if not self.judges(results):
            self._refuse_missing(results)
            return
        nothing = Best(0, 0, {}, math.inf if lowest else -math.inf, 0, self._train.keep_best, metric, lowest)
        value, best = results[metric], self.best or nothing
        if step <= best.seen:
            return  # seen before: a finished training run continues, or writes its model again
        improved = self._beats(value, best.bar, self._train.early_stopping.threshold)
        since, bar = (0, value) if improved else (best.since + 1, best.bar)
        best = replace(best, since=since, bar=bar, seen=step)
        if self._beats(value, best.value):
            self.best = replace(best, step=step, results=dict(results), kept=self._train.keep_best)
            if self._train.keep_best:
                self._keep()
        else:
            self.best = best

    def _refuse_missing(self, results: Mapping[str, float]) -> None:
        metric = self._train.best_metric
        kind = metric.partition("_")[0] + "_"
        found = [name for name in results if name.startswith(kind)]
        if not self.active or not found:
            return
        scores = ", ".join(name for name in found if not name.endswith(NO_SCORES))
        fact = "is not a result of this run" if scores else "scores nothing: no prediction has a reference"
        remedy = f"use one of {scores}" if scores else "use eval_loss"
        raise MetricMissing(f"train.best_metric={metric} {fact}; {remedy}, and resume with --allow-changed")

    def _beats(self, value: float, other: float | None, threshold: float = 0.0) -> bool:
        """True if a value is better than another by more than a threshold; only finite values are."""
        if other is None or not math.isfinite(value):
            return math.isfinite(value)
        return value < other - threshold if self._train.lowest_is_best else value > other + threshold
