"""The charts of a sweep: results by trial and by setting, learning curves, and the Pareto front."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import numpy as np

from raysft.report.axes import Axis, robust_limit
from raysft.report.curves import Chart, Drawing, Line, number_text
from raysft.report.read_run import finite, series
from raysft.report.run_charts import NARROW, WIDE
from raysft.report.runs import COLORS, DASHES
from raysft.report.scatter import Point, Scatter
from raysft.report.sweep import Configuration, Sweep, Trial, evaluations
from raysft.report.text import shortened, visible

MAX_DRAWN = 400
"""Number of trials that a chart draws: the best ones, and others evenly over the sweep."""
NAMED_CURVES = 8
"""Largest number of learning curves that have their own colors."""
MANY_CURVES = 40
"""Number of curves from which they are fainter."""
MAX_SLICES = 24
"""Number of settings with their own chart."""


def drawn(sweep: Sweep) -> list[Configuration]:
    """The configurations that charts show: all, or the best ones and others evenly over the sweep."""
    found = sweep.configurations
    if len(found) <= MAX_DRAWN:
        return found
    best, rest = found[: MAX_DRAWN // 4], found[MAX_DRAWN // 4 :]
    picked = np.linspace(0, len(rest) - 1, MAX_DRAWN - len(best)).astype(int)
    return [*best, *(rest[place] for place in picked)]


def objective_charts(sweep: Sweep, configurations: Sequence[Configuration]) -> list[Scatter]:
    """The first objective by number of the trial with the best so far, for a wide page and for a narrow one."""
    (metric, lowest) = sweep.objectives[0]
    pick = min if lowest else max
    results = [(trial, row[0]) for one in configurations for trial, row in zip(one.trials, one.results, strict=True)]
    if not results:
        return []
    results.sort(key=lambda found: found[0].number)
    y, last = sweep.result_axis, max(trial.number for trial in sweep.trials)
    x = Axis.of_numbers(last)
    best: list[tuple[int, float]] = []
    for trial, value in results:
        if not best or pick(best[-1][1], value) != best[-1][1]:
            best.append((trial.number, value))
    steps = [(number, value) for number, value in best if not y.beyond(value)]
    steps += [(last, steps[-1][1])] if steps else []
    points = [
        Point(
            trial.number,
            value,
            f"trial {trial.number}: {metric} {number_text(value)}\n{described(trial)}",
            _style(trial),
        )
        for trial, value in results
    ]
    title = f"{visible(metric)} by trial"
    return [Scatter(title, "trial", x, y, points, steps, width, height) for width, height in (WIDE, NARROW)]


def slices(sweep: Sweep, configurations: Sequence[Configuration]) -> list[Scatter]:
    """The mean of the first objective by the value of each setting; repeats have an interval of ± one standard deviation."""
    if not configurations:
        return []
    metric, y, charts = sweep.objectives[0][0], sweep.result_axis, []
    for key in sweep.keys:
        having = [one for one in configurations if key in one.values]
        if len({repr(one.values[key]) for one in having}) < 2:
            continue
        x = sweep.axis(key)
        points = [
            Point(
                one.values[key],
                one.means[0],
                summary_of(one, metric),
                "c1 top" if one is sweep.configurations[0] else _style(one.trials[0]),
                one.spreads[0] if one.spreads else None,
                _shift(place) / len(x.categories) if x.categories else 0.04 * _shift(place) if x.named else 0.0,
            )
            for place, one in reversed(list(enumerate(having)))
        ]
        charts.append(Scatter(f"{visible(metric)} by {visible(key)}", visible(key), x, y, points))
    return charts[:MAX_SLICES]


def pareto(sweep: Sweep, configurations: Sequence[Configuration]) -> list[Scatter]:
    """The second and later objectives by the first, with the front as a line in its own color; empty with one objective."""
    if len(sweep.objectives) < 2 or not configurations:
        return []
    charts, (first, first_lowest) = [], sweep.objectives[0]
    names = sweep.results.get("front")
    front = {str(name) for name in names} if isinstance(names, list) else set()
    for place, (metric, lowest) in enumerate(sweep.objectives[1:], start=1):
        points = [
            Point(
                one.means[0],
                one.means[place],
                f"{first} {number_text(one.means[0])}, {metric} {number_text(one.means[place])}\n{described(one.trials[0])}",
                "c1 top" if one.name in front else "c0 faint",
            )
            for one in sorted(configurations, key=lambda one: one.name in front)
        ]
        x = Axis.of_results([point.x for point in points], first_lowest)
        points = [point for point in points if not x.beyond(point.x)]
        y = Axis.of_results([point.y for point in points], lowest)
        sizes = (WIDE, NARROW) if place == 1 else (NARROW,)
        title = f"{visible(metric)} by {visible(first)}"
        charts += [Scatter(title, visible(first), x, y, points, (), width, height) for width, height in sizes]
    return charts


def learning_curves(sweep: Sweep) -> list[Drawing]:
    """The objective at each evaluation, or the evaluation loss, for a wide page and for a narrow one."""
    chosen = {trial.name for one in drawn(sweep) for trial in one.trials}
    others = [trial for trial in sweep.trials if trial.name not in chosen]
    records = [
        (trial, evaluations(sweep, trial))
        for trial in sweep.trials
        if trial.name in chosen or trial in others[:MAX_DRAWN]
    ]
    metric, lowest = sweep.objectives[0]
    key = metric if any(finite(row.get(metric)) is not None for _, rows in records for row in rows) else "eval_loss"
    found = [(trial, *series(rows, key)) for trial, rows in records]
    found = [(trial, steps, values) for trial, steps, values in found if steps]
    if not found:
        return []
    best = {trial.name for trial in sweep.configurations[0].trials} if sweep.configurations else set()
    found.sort(key=lambda curve: (curve[0].name in best, -curve[0].number))
    lines = [
        _curve(trial, steps, values, trial.name in best, len(found), place)
        for place, (trial, steps, values) in enumerate(found)
    ]
    if len(found) <= NAMED_CURVES:
        lines.reverse()
    highest = None
    if key != metric or lowest:
        firsts, lasts = (
            np.array([values[0] for _, _, values in found]),
            np.array([values[-1] for _, _, values in found]),
        )
        highest = max(float(np.median(firsts)), robust_limit(lasts))
    title, tooltips = f"{visible(key)} by step", len(found) <= NAMED_CURVES
    return [
        Drawing(Chart(title, lines, (), False, width, height, tooltips, highest)) for width, height in (WIDE, NARROW)
    ]


def _curve(trial: Trial, steps: list[int], values: list[float], best: bool, count: int, place: int) -> Line:
    label = f"trial {trial.number}{' (best)' if best else ''}"
    if count <= NAMED_CURVES:
        number = count - 1 - place
        return Line(label, steps, values, number % COLORS, style=DASHES[number // COLORS])
    style = "thin top" if best else "thin many" if count > MANY_CURVES else "thin many few"
    return Line(label, steps, values, 1 if best else 0, style=style)


def described(trial: Trial) -> str:
    """Values and state of a trial on one line."""
    values = ", ".join(f"{key}={setting_text(value)}" for key, value in trial.values.items())
    return visible(shortened(f"{values}{f', seed {trial.seed}' if trial.seed is not None else ''}, {trial.state}", 300))


def summary_of(one: Configuration, metric: str) -> str:
    """Objective and values of a configuration, for a tooltip."""
    spread = f" ± {number_text(one.spreads[0])} over {len(one.trials)} seeds" if one.spreads else ""
    values = ", ".join(f"{key}={setting_text(value)}" for key, value in one.values.items())
    return visible(f"{metric} {number_text(one.means[0])}{spread}\n{shortened(values, 300)}")


def setting_text(value: Any, length: int = 60) -> str:
    """Value of a setting on one line: numbers with four digits, text without quotes."""
    number = finite(value)
    if number is not None and not isinstance(value, int):
        return f"{number:.4g}"
    return visible(shortened(value if isinstance(value, str) else json.dumps(value, ensure_ascii=False), length))


def _style(trial: Trial) -> str:
    return {"done": "c0", "stopped": "c4 faint"}.get(trial.state, "c5")


def _shift(number: int) -> float:
    """Where a point stands next to its category, from -0.3 to 0.3, evenly in every part of the sequence.

    The golden ratio's multiples, modulo 1, never cluster.
    """
    return 0.6 * ((number * 0.6180339887498949) % 1.0 - 0.5)
