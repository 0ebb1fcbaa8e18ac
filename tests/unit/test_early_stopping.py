"""Which model is kept as the best, and when training stops."""

from __future__ import annotations

import json
import math
from dataclasses import asdict

import pytest

from raysft.config import TrainSection
from raysft.train.checkpoint.cursor import EVALUATION, PREDICTION, Best, Cursor
from raysft.train.early_stopping import EarlyStopper, MetricMissing, known_best, not_comparable

LOSS, ACCURACY = "eval_loss", "eval_accuracy"


def stopper(metric=LOSS, patience=None, threshold=0.0, mode=None, best=None):
    kept: list[int] = []
    stopping = {"patience": patience, "threshold": threshold}
    train = TrainSection(keep_best=True, early_stopping=stopping, best_metric=metric, best_mode=mode)
    made = EarlyStopper(train, lambda: kept.append(made.best.step), best)
    return made, kept


def outcome(values, patience=None, threshold=0.0, metric=LOSS, mode=None):
    """Best step, kept steps, and the step after which it ended."""
    made, kept = stopper(metric, patience, threshold, mode)
    step = 0
    for step, value in enumerate(values, 1):
        made.update({LOSS: 0.0, ACCURACY: 0.0, metric: value}, step)
        if made.should_stop:
            break
    assert made.best.results == {} or made.best.value == values[made.best.step - 1]
    return made.best.step, kept, step


@pytest.mark.parametrize(
    ("losses", "patience", "threshold", "expected"),
    [
        ([2.0, 1.5, 1.7, 1.6], None, 0.0, (2, [1, 2], 4)),
        ([2.0, 1.95, 1.92, 1.96], None, 0.1, (3, [1, 2, 3], 4)),
        ([2.0, 1.95, 1.92, 1.8], 2, 0.1, (3, [1, 2, 3], 3)),
        ([2.0, 1.95, 1.85, 1.8, 1.79], 2, 0.1, (5, [1, 2, 3, 4, 5], 5)),
        ([math.nan, 2.0, 1.0, 0.5], 3, 0.0, (4, [2, 3, 4], 4)),
        ([2.0, math.nan, math.nan], 2, 0.0, (1, [1], 3)),
        ([math.nan, math.inf, -math.inf], 3, 0.0, (0, [], 3)),
        ([math.inf, 3.0, math.nan, 2.0], 2, 0.0, (4, [2, 4], 4)),
        ([1.0, 1.0, 1.0], 2, 0.0, (1, [1], 3)),
    ],
)
def test_the_lowest_is_kept_and_patience_counts_from_the_last_improvement(losses, patience, threshold, expected):
    assert outcome(losses, patience, threshold) == expected
    # The highest of the negated values is the lowest: the same choice in the other direction.
    negated = [-loss for loss in losses]
    assert outcome(negated, patience, threshold, ACCURACY) == expected
    assert outcome(negated, patience, threshold, LOSS, "max") == expected
    assert outcome(losses, patience, threshold, "predict_f1", "min") == expected


@pytest.mark.parametrize(
    ("metric", "lowest"),
    [
        ("eval_loss", True),
        ("eval_perplexity", True),
        ("eval_accuracy", False),
        ("eval_accuracy_set_loss", True),
        ("predict_rouge-l", False),
        ("predict_chats_bleu_zh", False),
        ("predict_exact_match_low", False),
    ],
)
def test_a_metric_has_its_own_direction(metric, lowest):
    assert TrainSection(best_metric=metric).lowest_is_best is lowest
    assert TrainSection(best_metric=metric, best_mode="min").lowest_is_best is True
    assert TrainSection(best_metric=metric, best_mode="max").lowest_is_best is False


def test_results_without_a_metric_of_predictions_are_no_evaluation():
    made, kept = stopper("predict_rouge-l", patience=2)
    for step, results in enumerate(
        [{LOSS: 3.0}, {LOSS: 2.0, "predict_rouge-l": 10.0}, {LOSS: 1.0}, {LOSS: 0.5}, {"predict_rouge-l": 9.0}, {}], 1
    ):
        made.update(results, step)
    assert (made.best.step, made.best.since, kept) == (2, 1, [2])
    assert made.best.results == {LOSS: 2.0, "predict_rouge-l": 10.0}


def test_predictions_may_come_after_the_evaluation_of_their_step():
    made, kept = stopper("predict_rouge-l")
    made.update({LOSS: 3.0}, 4)
    made.update({"predict_rouge-l": 10.0}, 4)
    made.update({"predict_rouge-l": 99.0}, 4)
    assert (made.best.step, made.best.value, kept) == (4, 10.0, [4]), "a step is compared once"


def test_a_metric_that_the_first_results_lack_is_named_with_those_that_there_are():
    made, _ = stopper("predict_f1", mode="max")
    made.update({LOSS: 1.0}, 1)
    found = {"predict_examples": 4, "predict_rouge-l": 3.0, "predict_rouge-l_low": 2.0, "predict_rouge-l_high": 4.0}
    with pytest.raises(MetricMissing) as raised:
        made.update(found, 2)
    told = str(raised.value)
    assert told.startswith("train.best_metric=predict_f1 is not a result of this run; use one of predict_rouge-l, ")
    assert "--allow-changed" in told
    with pytest.raises(MetricMissing, match="no prediction has a reference"):
        made.update({"predict_examples": 0}, 2)


def test_without_a_setting_that_compares_nothing_is_looked_at():
    made = EarlyStopper(TrainSection(best_metric="eval_other"), lambda: pytest.fail("kept"))
    made.update({LOSS: 1.0}, 1)
    assert made.best is None


def test_a_resumed_training_compares_with_the_best_before_by_the_same_metric_alone():
    made, _ = stopper(ACCURACY, patience=5)
    for step, value in enumerate([math.nan, 0.5, 0.4], 1):
        made.update({LOSS: 1.0, ACCURACY: value}, step)
    cursor = Cursor(3, 12, 100, {EVALUATION: "a"}, made.best)
    read = Cursor.parse(json.dumps(asdict(cursor)).encode())
    assert read == cursor
    same = TrainSection(keep_best=True, best_metric=ACCURACY)
    best = known_best(same, read, {EVALUATION: "a"})
    again, kept = stopper(ACCURACY, best=best)
    again.update({LOSS: 1.0, ACCURACY: 0.45}, 4)
    assert (again.best.step, again.best.since, kept) == (2, 2, [])
    for changed in ({"best_metric": LOSS}, {"best_mode": "min"}, {"best_metric": "eval_perplexity"}):
        assert known_best(same.model_copy(update=changed), read, {EVALUATION: "a"}) is None
    named = same.model_copy(update={"best_mode": "max"})
    assert known_best(named, read, {EVALUATION: "a"}) == best, "the direction is the same"


@pytest.mark.parametrize(("metric", "comparable"), [("predict_rouge-l", False), ("eval_loss", True)])
def test_scores_of_other_predictions_are_not_compared(metric, comparable):
    best = Best(2, 0, {metric: 0.5}, 0.5, 2, True, metric, metric == LOSS)
    cursor = Cursor(3, 12, 100, {EVALUATION: "a", PREDICTION: "short answers"}, best)
    train = TrainSection(keep_best=True, best_metric=metric)
    assert known_best(train, cursor, {EVALUATION: "a", PREDICTION: "short answers"}) == best
    assert known_best(train, cursor, {EVALUATION: "a", PREDICTION: "long ones"}) == (best if comparable else None)
    reason = not_comparable(train, cursor, {EVALUATION: "a", PREDICTION: "long ones"})
    assert ("generate settings" in reason) != comparable


def test_a_checkpoint_from_before_there_were_other_metrics_is_by_the_loss():
    best = {"step": 2, "since": 1, "results": {LOSS: 1.0}, "bar": 1.0, "seen": 3, "kept": True}
    cursor = Cursor.parse(json.dumps({"step": 3, "rows": 3, "tokens": 3, "identity": {}, "best": best}).encode())
    assert known_best(TrainSection(keep_best=True), cursor, {}) == Best(2, 1, {LOSS: 1.0}, 1.0, 3, True, LOSS, True)
