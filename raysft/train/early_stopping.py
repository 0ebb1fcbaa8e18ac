"""Early stopping: which evaluation is the best so far, and when training stops for lack of improvement."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import replace

from raysft.config import TrainSection
from raysft.train.checkpoint.cursor import EVALUATION, Best, Cursor


def should_stop(train: TrainSection, best: Best | None) -> bool:
    """Return True if ``early_stopping.patience`` evaluations in a row brought no improvement."""
    patience = train.early_stopping.patience
    return patience is not None and best is not None and best.since >= patience


def known_best(train: TrainSection, cursor: Cursor, identity: Mapping[str, str]) -> Best | None:
    """Return the best evaluation of a checkpoint if this training can continue to compare with it, else None.

    It cannot if other sets are evaluated now, or if the config asks for the best model and that model was not kept.
    """
    best = cursor.best
    if best is None or cursor.identity.get(EVALUATION) != identity.get(EVALUATION):
        return None
    if train.keep_best:
        return best if best.kept else None
    # Without keep_best its model is no longer kept, since another one becomes the trained model.
    return replace(best, kept=False) if train.early_stopping.patience else None


class EarlyStopper:
    """Compares evaluations by ``eval_loss``. Losses are sums over all workers, so that all workers decide alike."""

    def __init__(self, train: TrainSection, keep: Callable[[], None], best: Best | None = None) -> None:
        """
        Args:
            train: the section of the config.
            keep: writes the current model as the best one.
            best: the best evaluation of the checkpoint that training resumes from.
        """
        self._train, self._keep = train, keep
        self.best = best

    @property
    def should_stop(self) -> bool:
        """True if training should stop now."""
        return should_stop(self._train, self.best)

    def update(self, results: Mapping[str, float], step: int) -> None:
        """Take the evaluation results after a step, and keep the model if they are the best."""
        if not results or not (self._train.keep_best or self._train.early_stopping.patience):
            return
        loss, best = results["eval_loss"], self.best
        if best is not None and step <= best.seen:
            return  # seen before: a finished training continues, or writes its model once more
        improved = best is None or _is_less(loss, best.bar - self._train.early_stopping.threshold)
        since = 0 if improved or best is None else best.since + 1
        bar = loss if improved or best is None else best.bar
        if best is None or _is_less(loss, best.loss):
            self.best = Best(step, since, dict(results), bar, step, self._train.keep_best)
            if self._train.keep_best:
                self._keep()
        else:
            self.best = replace(best, since=since, bar=bar, seen=step)


def _is_less(loss: float, than: float) -> bool:
    """Compare losses; every number is less than NaN."""
    return loss < than or (math.isnan(than) and not math.isnan(loss))
