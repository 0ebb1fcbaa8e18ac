"""The charts of a run, for the page."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from raysft.report.comparison import metric_name
from raysft.report.curves import Chart, Drawing, Line
from raysft.report.read_run import RunLog, finite, series
from raysft.report.text import visible

NO_SCORES = ("_low", "_high", "examples", "unscored", "_runtime", "_per_second")
"""Ends of the names of results that are not scores."""
MAX_SOURCES = 6
"""Number of sources whose training loss is drawn, one for each color of the page."""


def loss_charts(log: RunLog) -> list[Drawing]:
    """Training and evaluation loss, once for a wide page and once for a narrow one."""
    steps, values = series(log.steps, "loss")
    lines = [Line("training", steps, values, 0, noisy=True)] if steps else []
    eval_steps, eval_values = series(log.evaluations, "eval_loss")
    lines += [Line("evaluation", eval_steps, eval_values, 1)] if eval_steps else []
    if not lines:
        return []
    missing = _missing(log, "loss")
    sizes = ((940, 340), (440, 280))
    return [
        Drawing(Chart("Loss, nats per token", lines, missing, width=width, height=height)) for width, height in sizes
    ]


def small_charts(log: RunLog) -> list[Drawing]:
    """All other charts that have data."""
    step_seconds = [("step", "step_seconds", 0), ("waiting for data", "data_wait_seconds", 1)]
    charts = [
        _evaluation_chart(log, "Evaluation loss, nats per token", "loss"),
        _evaluation_chart(log, "Token accuracy on the evaluation sets, %", "accuracy", scale=100),
        *_generation_charts(log),
        _source_chart(log),
        _step_chart(log, "Load balancing loss of the routers", [("routers", "router_aux_loss", 4)]),
        _step_chart(log, "Learning rate", [("learning rate", "lr", 3)], noisy=False),
        _step_chart(log, "Gradient norm", [("gradient norm", "grad_norm", 4)]),
        _step_chart(log, "Tokens per second, without padding", [("tokens/s", "throughput", 2)]),
        _step_chart(log, "Model FLOPs utilization (MFU), %", [("MFU", "mfu", 5)], scale=100),
        _step_chart(log, "Seconds per step", step_seconds),
        _step_chart(log, "Memory, GiB", [("memory", "memory_gib", 5)], noisy=False),
    ]
    return [Drawing(chart) for chart in charts if chart]


def _evaluation_chart(log: RunLog, title: str, result: str, scale: float = 1) -> Chart | None:
    """One result of the evaluations, over all sets and, if there are several, for each of them."""
    sets = log.evaluation_sets
    keys = [("all sets" if sets else "evaluation", f"eval_{result}", 1)]
    keys += [(name, f"eval_{name}_{result}", 2 + index) for index, name in enumerate(sets)]
    lines = _lines(log.evaluations, keys, scale, noisy=False)
    return Chart(title, lines) if lines else None


def _generation_charts(log: RunLog) -> Iterator[Chart]:
    """The scores of predictions during the training over all sources: a chart for those of each scale."""
    records = [
        {key.removeprefix("predict_"): value for key, value in record.items() if not key.endswith(NO_SCORES)}
        for record in log.generations
    ]
    sources = tuple(
        f"{key.removeprefix('predict_').removesuffix('_examples')}_"
        for key in dict.fromkeys(key for record in log.generations for key in record)
        if key.endswith("_examples") and key != "predict_examples"
    )
    scored = {
        key.removeprefix("predict_") for record in log.generations for key in record if key.startswith("predict_")
    }
    names = [name for name in dict.fromkeys(key for record in records for key in record) if name in scored]
    names = [name for name in names if not (sources and name.startswith(sources))]
    fractions = [name for name in names if max((abs(value) for value in series(records, name)[1]), default=0.0) <= 1]
    for some in ([name for name in names if name not in fractions], fractions):
        for start in range(0, len(some), MAX_SOURCES):
            part = some[start : start + MAX_SOURCES]
            keys = [(visible(metric_name(name)), name, index) for index, name in enumerate(part)]
            if lines := _lines(records, keys, 1, noisy=False):
                yield Chart("Scores of predictions", lines)


def _source_chart(log: RunLog) -> Chart | None:
    """The training loss of each source, if the run logs it."""
    records = [
        {"current_steps": record["current_steps"], **record["source_losses"]}
        for record in log.steps
        if record.get("source_losses")
    ]
    names = list(dict.fromkeys(name for record in records for name in record if name != "current_steps"))[:MAX_SOURCES]
    lines = _lines(records, [(name, name, index) for index, name in enumerate(names)], 1, noisy=True)
    return Chart("Training loss by source, nats per token", lines) if lines else None


def _step_chart(
    log: RunLog, title: str, keys: list[tuple[str, str, int]], scale: float = 1, noisy: bool = True
) -> Chart | None:
    """Values of the steps, with the axis from zero."""
    lines = _lines(log.steps, keys, scale, noisy)
    missing = _missing(log, "grad_norm") if any(key == "grad_norm" for _, key, _ in keys) else ()
    return Chart(title, lines, missing, from_zero=True) if lines else None


def _lines(records: list[dict[str, Any]], keys: list[tuple[str, str, int]], scale: float, noisy: bool) -> list[Line]:
    """A line for each (label, key, color) that has values."""
    found = ((label, color, *series(records, key)) for label, key, color in keys)
    return [
        Line(visible(label), steps, [scale * value for value in values], color, noisy)
        for label, color, steps, values in found
        if steps
    ]


def _missing(log: RunLog, key: str) -> list[int]:
    """Steps at which a value is logged, but not finite."""
    return [record["current_steps"] for record in log.steps if key in record and finite(record[key]) is None]
