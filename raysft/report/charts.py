"""The curves of a run, for the page."""

from __future__ import annotations

from typing import Any

from raysft.report.curves import Chart, Drawing, Line
from raysft.report.predictions import visible
from raysft.report.read_run import RunLog, finite, series


def loss_charts(log: RunLog) -> list[Drawing]:
    """The training loss with the evaluations, once for a wide page and once for a narrow one."""
    steps, values = series(log.steps, "loss")
    lines = [Line("training", steps, values, 0, noisy=True)] if steps else []
    at, points = series(log.evaluations, "eval_loss")
    lines += [Line("evaluation", at, points, 1)] if at else []
    missing = _missing(log, "loss")
    if not lines:
        return []
    title = "Loss, nats per token"
    return [
        Drawing(Chart(title, lines, missing, width=width, height=height)) for width, height in ((940, 340), (440, 280))
    ]


def small_charts(log: RunLog) -> list[Drawing]:
    """The small charts."""
    charts, sets = [], log.evaluation_sets
    for measure, title, scale in (
        ("loss", "Evaluation loss, nats per token", 1),
        ("accuracy", "Token accuracy on the evaluation data, %", 100),
    ):
        keys = [("all sets" if sets else "evaluation", f"eval_{measure}", 1)]
        keys += [(name, f"eval_{name}_{measure}", 2 + place) for place, name in enumerate(sets)]
        charts.append((title, log.evaluations, keys, scale, False, False))
    several = list(dict.fromkeys(name for record in log.steps for name in record.get("source_losses") or {}))
    by_source = (
        [{"current_steps": record["current_steps"], **(record.get("source_losses") or {})} for record in log.steps]
        if several
        else []
    )
    charts += [
        (
            "Training loss of each source",
            by_source,
            [(name, name, place) for place, name in enumerate(several[:6])],
            1,
            True,
            False,
        ),
        ("Learning rate", log.steps, [("learning rate", "lr", 3)], 1, False, True),
        ("Gradient norm", log.steps, [("gradient norm", "grad_norm", 4)], 1, True, True),
        ("Tokens per second, without padding", log.steps, [("tokens/s", "throughput", 2)], 1, True, True),
        ("Model FLOPs utilisation, %", log.steps, [("MFU", "mfu", 5)], 100, True, True),
        (
            "Seconds a step",
            log.steps,
            [("whole step", "step_seconds", 0), ("waiting for data", "data_wait_seconds", 1)],
            1,
            True,
            True,
        ),
        ("Memory, GiB", log.steps, [("memory", "memory_gib", 5)], 1, False, True),
    ]
    drawn = (_chart(log, *arguments) for arguments in charts)
    return [Drawing(chart) for chart in drawn if chart]


def _chart(
    log: RunLog,
    title: str,
    records: list[dict[str, Any]],
    keys: list[tuple[str, str, int]],
    scale: float,
    noisy: bool,
    from_zero: bool,
) -> Chart | None:
    lines = []
    for label, key, colour in keys:
        steps, values = series(records, key)
        if steps:
            lines.append(Line(visible(label), steps, [scale * value for value in values], colour, noisy))
    missing = _missing(log, "grad_norm") if any(key == "grad_norm" for _, key, _ in keys) else ()
    return Chart(title, lines, missing, from_zero) if lines else None


def _missing(log: RunLog, key: str) -> list[int]:
    """Steps whose value is logged and not finite."""
    return [record["current_steps"] for record in log.steps if key in record and finite(record[key]) is None]
