"""The curves of several runs over each other."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from raysft.report.curves import Chart, Drawing, Line
from raysft.report.read_run import RunLog, series
from raysft.report.runs import Run

WIDE, NARROW = (940, 340), (440, 280)
RAW_RUNS = 2
"""Largest number of runs whose values are drawn below their smoothed curves."""
MAX_SETS = 6
"""Number of evaluation sets with their own chart."""

_Records = Callable[[RunLog], list[dict[str, Any]]]


def loss_charts(runs: Sequence[Run]) -> list[tuple[Drawing, Drawing]]:
    """Training loss and evaluation loss, each for a wide page and for a narrow one."""
    charts = [
        ("Training loss, nats per token", _steps, "loss", True),
        ("Evaluation loss, nats per token", _evaluations, "eval_loss", False),
    ]
    drawn = [
        [_drawing(runs, *chart, width=width, height=height) for width, height in (WIDE, NARROW)] for chart in charts
    ]
    return [(wide, narrow) for wide, narrow in drawn if wide and narrow]


def small_charts(runs: Sequence[Run]) -> list[Drawing]:
    """All other charts that have data."""
    sets = list(dict.fromkeys(name for run in runs for name in run.log.evaluation_sets))[:MAX_SETS]
    charts = [
        _drawing(runs, "Token accuracy on the evaluation sets, %", _evaluations, "eval_accuracy", scale=100),
        *(_drawing(runs, f"Evaluation loss on {name}", _evaluations, f"eval_{name}_loss") for name in sets),
        _drawing(runs, "Learning rate", _steps, "lr", from_zero=True),
        _drawing(runs, "Gradient norm", _steps, "grad_norm", True, from_zero=True),
        _drawing(runs, "Tokens per second, without padding", _steps, "throughput", True, from_zero=True),
    ]
    return [drawing for drawing in charts if drawing]


def _steps(log: RunLog) -> list[dict[str, Any]]:
    return log.steps


def _evaluations(log: RunLog) -> list[dict[str, Any]]:
    return log.evaluations


def _drawing(
    runs: Sequence[Run], title: str, records: _Records, key: str, noisy: bool = False, scale: float = 1, **chart: Any
) -> Drawing | None:
    """One key of all runs that have it; None if none has."""
    lines = []
    for run in runs:
        steps, values = series(records(run.log), key)
        if steps:
            raw = len(runs) <= RAW_RUNS
            scaled = [scale * value for value in values]
            lines.append(Line(run.label, steps, scaled, run.color, noisy, raw, run.style))
    return Drawing(Chart(title, lines, **chart)) if lines else None
