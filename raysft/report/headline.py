"""The headline figures at the top of the page."""

from __future__ import annotations

from dataclasses import dataclass

from raysft.report.comparison import Comparison, compare_evaluations, compare_predictions
from raysft.report.read_run import RunLog, finite, series
from raysft.report.run_facts import duration

MAX_TEXT_METRICS = 5
"""Number of metrics of generated text among the headline figures."""


@dataclass(frozen=True)
class Figure:
    """One figure at the top of the page."""

    label: str
    before: str
    after: str
    note: str = ""
    better: bool | None = None


def headline(log: RunLog) -> list[Figure]:
    """The training loss, evaluations and metrics over all sources, then speed and resources."""
    metrics = [row for row in compare_predictions(log) if not row.source][:MAX_TEXT_METRICS]
    rows = [row for row in compare_evaluations(log) if not row.source] + metrics
    results = [
        Figure(
            row.metric,
            row.show(row.before) if row.before is not None else "",
            row.show(row.after),
            f"95% CI {interval_text(row, row.after_interval)}" if row.after_interval else row.change,
            row.better,
        )
        for row in rows
    ]
    return [*_training_loss(log), *results, *_effort(log)]


def interval_text(row: Comparison, ends: tuple[float, float] | None) -> str:
    """An interval as text; empty without one."""
    return f"{row.show(ends[0])} to {row.show(ends[1])}" if ends else ""


def _training_loss(log: RunLog) -> list[Figure]:
    """The loss of the first step, and the mean over the last fiftieth of the steps."""
    steps, losses = series(log.steps, "loss")
    if not losses:
        return []
    last = losses[-max(1, len(losses) // 50) :]
    mean = sum(last) / len(last)
    if len(losses) == 1:
        return [Figure("training loss", "", f"{mean:.4f}", f"step {steps[0]:,}")]
    end = f"step {steps[-1]:,}" if len(last) == 1 else f"mean of the last {len(last):,} steps"
    return [Figure("training loss", f"{losses[0]:.4f}", f"{mean:.4f}", f"step {steps[0]:,} → {end}", mean < losses[0])]


def _effort(log: RunLog) -> list[Figure]:
    """Speed, time and resources."""
    figures, last = [], log.steps[-1] if log.steps else {}
    seconds = sum(finite(record.get("step_seconds")) or 0.0 for record in log.steps)
    tokens = finite(last.get("total_tokens")) or 0.0
    speed = finite(log.trained.get("train_tokens_per_second")) or (tokens / seconds if seconds else None)
    if speed:
        figures.append(Figure("tokens per second", "", f"{speed:,.0f}", f"{tokens:,.0f} tokens" if tokens else ""))
    runtime = finite(log.trained.get("train_runtime")) or seconds
    if runtime:
        figures.append(Figure("training time", "", duration(runtime), f"{len(log.steps):,} steps"))
    workers = finite(log.plan.get("workers"))
    if workers:
        cpus, gpus = (finite(log.plan.get(f"cluster_{kind}")) for kind in ("cpus", "gpus"))
        nodes = " and ".join(f"{count:g} {kind}" for count, kind in ((gpus, "GPUs"), (cpus, "CPUs")) if count)
        figures.append(Figure("workers", "", f"{workers:.0f}", f"cluster: {nodes}" if nodes else ""))
    return figures
