"""Which evaluation was the best, and whether it is time to stop."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import replace

from raysft.config import TrainSection
from raysft.train.checkpoint.cursor import EVALUATION, Best, Cursor


def should_stop(train: TrainSection, best: Best | None) -> bool:
    """Whether there were as many evaluations without improvement as there may be."""
    patience = train.early_stopping.patience
    return patience is not None and best is not None and best.since >= patience


def known_best(train: TrainSection, cursor: Cursor, identity: Mapping[str, str]) -> Best | None:
    """The best evaluation that a checkpoint tells of, if anybody asks, others can be compared with it, and its model was kept if it
    must be."""
    best = cursor.best
    if best is None or cursor.identity.get(EVALUATION) != identity.get(EVALUATION):
        return None
    if train.keep_best:
        return best if best.kept else None
    # From now on its model is not kept any more: another one becomes the trained one.
    return replace(best, kept=False) if train.early_stopping.patience else None


class EarlyStopper:
    """Compares evaluations by ``eval_loss``. Losses are sums over all workers, so that each worker comes to the same end."""

    def __init__(self, train: TrainSection, keep: Callable[[], None], best: Best | None = None) -> None:
        """
        Args:
            train: says whether there is anything to early_stopper, and how.
            keep: writes the model as it is now.
            best: what a checkpoint knew.
        """
        self._train, self._keep = train, keep
        self.best = best

    @property
    def should_stop(self) -> bool:
        """Whether it is time."""
        return should_stop(self._train, self.best)

    def update(self, results: Mapping[str, float], step: int) -> None:
        """Take the results of an evaluation after so many steps, and keep its model if it is the best."""
        if not results or not (self._train.keep_best or self._train.early_stopping.patience):
            return
        loss, best = results["eval_loss"], self.best
        if best is not None and step <= best.seen:
            return  # a training that ended there goes on, or writes its model once more
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
    """Any number is less than none."""
    return loss < than or (math.isnan(than) and not math.isnan(loss))
