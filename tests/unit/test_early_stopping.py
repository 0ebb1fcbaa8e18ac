"""Which model is kept as the best, and when training stops."""

import math

import pytest

from raysft.config import TrainSection
from raysft.train.early_stopping import EarlyStopper


def outcome(losses, patience=None, threshold=0.0):
    kept: list[int] = []
    stopping = {"patience": patience, "threshold": threshold}
    early_stopper = EarlyStopper(TrainSection(keep_best=True, early_stopping=stopping), lambda: kept.append(step))
    for step, loss in enumerate(losses, 1):
        early_stopper.update({"eval_loss": loss}, step)
        if early_stopper.should_stop:
            break
    return early_stopper.best.step, kept, step


@pytest.mark.parametrize(
    ("losses", "patience", "threshold", "expected"),
    [
        ([2.0, 1.5, 1.7, 1.6], None, 0.0, (2, [1, 2], 4)),
        ([2.0, 1.95, 1.92, 1.96], None, 0.1, (3, [1, 2, 3], 4)),
        ([2.0, 1.95, 1.92, 1.8], 2, 0.1, (3, [1, 2, 3], 3)),
        ([2.0, 1.95, 1.85, 1.8, 1.79], 2, 0.1, (5, [1, 2, 3, 4, 5], 5)),
        ([math.nan, 2.0, 1.0, 0.5], 3, 0.0, (4, [1, 2, 3, 4], 4)),
        ([2.0, math.nan, math.nan], 2, 0.0, (1, [1], 3)),
    ],
)
def test_the_lowest_is_kept_and_patience_counts_from_the_last_improvement(losses, patience, threshold, expected):
    assert outcome(losses, patience, threshold) == expected
