"""Warnings about a trained model: those of the plan, and those that follow from its losses and predictions.

Each function is one warning, and each line is fact, value and remedy.
"""

from __future__ import annotations

import math
import statistics
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

from raysft.report.read_run import RunLog, finite, read_lines, series

MIN_STEPS = 10
"""Fewest steps from which a trend of the loss is read."""
MIN_CHANGE = 0.01
"""Smallest relative change of a loss that counts as one."""
MAX_FINDINGS = 5
"""Most slow or hanging workers that are named; ``diagnosis.jsonl`` has all."""
MIN_PREDICTIONS = 5
"""Fewest predictions with one fault that are reported."""


def warnings(log: RunLog) -> list[str]:
    """All warnings, one line each, those of the plan first."""
    planned = log.plan.get("warnings")
    lines = [str(line) for line in planned] if isinstance(planned, list) else []
    return lines + [line for warning in WARNINGS for line in warning(log)]


def loss_rose(log: RunLog) -> Iterator[str]:
    """Warn if the training loss rose, or is not finite.

    It compares the means of the first and the last tenth of the steps, or up to a third in short runs. A loss that is only
    noise is reported in about one of a hundred runs.
    """
    steps, losses = series(log.steps, "loss")
    if len(log.steps) > len(steps):
        yield (
            f"the loss of {len(log.steps) - len(steps):,} of {len(log.steps):,} steps is NaN or infinite; lower "
            "train.learning_rate, or inspect the records of these steps"
        )
    if rise := _rise(losses):
        part, first, last = rise
        means = f"from {first:.4f} to {last:.4f} (means of the first and the last {part:,} steps)"
        yield f"the training loss rose {means}; {_lower_rate(log)}"


def _rise(losses: list[float]) -> tuple[int, float, float] | None:
    """The number of steps that are compared, and the means of the first and the last of them; None if they differ by noise."""
    if len(losses) < MIN_STEPS:
        return None
    part = max(len(losses) // 10, min(10, len(losses) // 3))
    first, last = losses[:part], losses[-part:]
    before, after = statistics.fmean(first), statistics.fmean(last)
    noise = math.sqrt((statistics.variance(first) + statistics.variance(last)) / part)
    return (part, before, after) if after - before > max(3 * noise, MIN_CHANGE * before) else None


def evaluation_got_worse(log: RunLog) -> Iterator[str]:
    """Warn if the last evaluation is worse than the first or the best one, or hardly better than the first."""
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
    loss = f"the evaluation loss of {name!r}" if name else "the evaluation loss"
    start, end = finite(before.get(key)), finite(after.get(key))
    if end is None:
        return
    steps, losses = series(evaluations, key)
    lowest = min(losses, default=end)
    keeps_best = log.option("train.keep_best", False)  # by another metric then, if it is not the lowest
    if lowest < (1 - MIN_CHANGE) * end and (start is None or lowest < start) and not keeps_best:
        yield (
            f"{loss} was lowest after step {steps[losses.index(lowest)]:,} ({lowest:.4f}), but is {end:.4f} at the end; set "
            "train.keep_best=true, or train for fewer epochs"
        )
    elif start is not None and end > (1 + MIN_CHANGE) * start:
        yield f"{loss} rose from {start:.4f} to {end:.4f}; {_lower_rate(log)}, or train for fewer epochs"
    elif start is not None and not name and log.evaluated and abs(end - start) <= MIN_CHANGE * start:
        yield (
            f"{loss} hardly changed, from {start:.4f} to {end:.4f}; train for more epochs, or raise train.learning_rate"
            f"{_equals(log.option('train.learning_rate'))}"
        )


def faulty_predictions(log: RunLog) -> Iterator[str]:
    """Warn if predictions failed, or if most are cut off, empty or the same."""
    stops, empty, same, first = Counter[str](), 0, 0, None
    for row in read_lines(log.directory.predictions):
        text = str(row.get("predict", "")).strip()
        first = text if first is None else first
        stops[str(row.get("stop", ""))] += 1
        empty += not text
        same += text == first
    count = stops.total()
    if stops["error"]:
        yield f"{stops['error']:,} of {count:,} prompts failed; run the same command again to retry them"
    if 2 * stops["length"] >= max(count, MIN_PREDICTIONS):
        limit = f"generate.max_new_tokens{_equals(log.option('generate.max_new_tokens'))}"
        yield f"{stops['length']:,} of {count:,} predictions were cut off at {limit}; raise it, or train for longer"
    if 2 * empty >= max(count, MIN_PREDICTIONS):
        yield f"{empty:,} of {count:,} predictions are empty; check that training and generation use the same chat template"
    elif same == count >= MIN_PREDICTIONS:
        yield f"all {count:,} predictions are the same text; {_lower_rate(log)}, or inspect the training data"


def _lower_rate(log: RunLog) -> str:
    rate = finite(log.option("train.learning_rate"))
    return f"lower train.learning_rate{_equals(rate)}" + (f", for example to {rate / 3:.1g}" if rate else "")


def _equals(value: Any) -> str:
    return f"={value:g}" if finite(value) is not None else ""


def workers_kept_others_waiting(log: RunLog) -> Iterator[str]:
    """Name the workers that were slow or made no progress, each once."""
    findings = {str(line["finding"]): line for line in read_lines(log.directory.diagnosis) if line.get("finding")}
    for finding, line in list(findings.items())[-MAX_FINDINGS:]:
        yield f"step {line.get('step')}: {finding}; look at this machine, or exclude it from the cluster"


WARNINGS: tuple[Callable[[RunLog], Iterator[str]], ...] = (
    loss_rose,
    evaluation_got_worse,
    faulty_predictions,
    workers_kept_others_waiting,
)
