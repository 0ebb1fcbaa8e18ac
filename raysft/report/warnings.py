"""What a person should know before they use the model: what the plan warned of, and what the training and its predictions show."""

from __future__ import annotations

import math
import statistics
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

from raysft.report.read_run import RunLog, finite, read_lines, series

SOME_STEPS = 10
"""Steps below which the course of a loss says nothing."""
HARDLY = 0.01
"""A share of the held-out loss that nobody trains for."""
SOME_PREDICTIONS = 5


def warnings(log: RunLog) -> list[str]:
    """One line for each, those of the plan first; each is fact, value and remedy."""
    planned = log.plan.get("warnings")
    lines = [str(line) for line in planned] if isinstance(planned, list) else []
    return lines + [line for warning in WARNINGS for line in warning(log)]


def loss_rose(log: RunLog) -> Iterator[str]:
    """The training loss at the end against that of the beginning, a tenth of the steps each, in short trainings up to a third: a
    loss that only scatters passes for one that rose in one of a hundred trainings."""
    steps, losses = series(log.steps, "loss")
    if len(log.steps) > len(steps):
        yield (
            f"the loss of {len(log.steps) - len(steps):,} of {len(log.steps):,} steps is no number; lower train.learning_rate, or "
            "look at the records of these steps"
        )
    if rose := _rise(losses):
        part, first, last = rose
        means = f"from {first:.4f} to {last:.4f} (means of the first and the last {part:,} steps)"
        yield f"the training loss rose {means}; {_lower_rate(log)}"


def _rise(losses: list[float]) -> tuple[int, float, float] | None:
    """The steps that are compared and the means of the first and the last of them, where these are more than noise apart."""
    if len(losses) < SOME_STEPS:
        return None
    part = max(len(losses) // 10, min(10, len(losses) // 3))
    first, last = losses[:part], losses[-part:]
    before, after = statistics.fmean(first), statistics.fmean(last)
    noise = math.sqrt((statistics.variance(first) + statistics.variance(last)) / part)
    return (part, before, after) if after - before > max(3 * noise, HARDLY * before) else None


def evaluation_got_worse(log: RunLog) -> Iterator[str]:
    """Each evaluation set at the end against before the training, and against the best evaluation between."""
    evaluations = [record for record in log.evaluations if record.get("current_steps")]
    before = next((record for record in log.evaluations if record.get("current_steps") == 0), {})
    after = log.evaluated or (evaluations[-1] if evaluations else {})
    overall = list(_worse(log, "", evaluations, before, after))
    yield from overall or (
        line for name in log.evaluation_sets for line in _worse(log, name, evaluations, before, after)
    )


def _worse(
    log: RunLog, name: str, evaluations: list[dict[str, Any]], before: dict[str, Any], after: dict[str, Any]
) -> Iterator[str]:
    key = f"eval_{name}_loss" if name else "eval_loss"
    what = f"the held-out loss of {name!r}" if name else "the held-out loss"
    start, end = finite(before.get(key)), finite(after.get(key))
    if end is None:
        return
    steps, losses = series(evaluations, key)
    lowest = min(losses, default=end)
    if lowest < (1 - HARDLY) * end and (start is None or lowest < start):
        yield (
            f"{what} was lowest after step {steps[losses.index(lowest)]:,} ({lowest:.4f}) and {end:.4f} at the end; set "
            "train.keep_best=true, or train fewer epochs"
        )
    elif start is not None and end > (1 + HARDLY) * start:
        yield f"{what} rose from {start:.4f} to {end:.4f}; {_lower_rate(log)}, or train fewer epochs"
    elif start is not None and not name and log.evaluated and abs(end - start) <= HARDLY * start:
        yield (
            f"{what} hardly changed, from {start:.4f} to {end:.4f}; train more epochs, or raise train.learning_rate"
            f"{_equals(log.option('train.learning_rate'))}"
        )


def predictions_tell(log: RunLog) -> Iterator[str]:
    """Predictions that are cut off, empty, all the same, or missing."""
    stops, empty, same, first = Counter[str](), 0, 0, None
    for row in read_lines(log.directory.predictions):
        text = str(row.get("predict", "")).strip()
        first = text if first is None else first
        stops[str(row.get("stop", ""))] += 1
        empty += not text
        same += text == first
    count = stops.total()
    if stops["error"]:
        yield f"{stops['error']:,} of {count:,} prompts failed; the same command tries them again"
    if 2 * stops["length"] >= max(count, SOME_PREDICTIONS):
        limit = f"generate.max_new_tokens{_equals(log.option('generate.max_new_tokens'))}"
        yield f"{stops['length']:,} of {count:,} predictions were cut off at {limit}; raise it, or train longer"
    if 2 * empty >= max(count, SOME_PREDICTIONS):
        yield f"{empty:,} of {count:,} predictions are empty; compare the chat template with what the model was trained on"
    elif same == count >= SOME_PREDICTIONS:
        yield f"all {count:,} predictions are the same text; {_lower_rate(log)}, or look at the data"


def _lower_rate(log: RunLog) -> str:
    rate = finite(log.option("train.learning_rate"))
    return f"lower train.learning_rate{_equals(rate)}" + (f", for example to {rate / 3:.1g}" if rate else "")


def _equals(value: Any) -> str:
    return f"={value:g}" if finite(value) is not None else ""


WARNINGS: tuple[Callable[[RunLog], Iterator[str]], ...] = (loss_rose, evaluation_got_worse, predictions_tell)
