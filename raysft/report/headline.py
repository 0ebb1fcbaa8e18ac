"""What a run came to, in the figures at the head of the page."""

from __future__ import annotations

from dataclasses import dataclass

from raysft.report.comparison import Comparison
from raysft.report.read_run import RunLog, finite, series
from raysft.report.run_facts import duration

METRICS = 4
"""Metrics of the generated text among them."""


@dataclass(frozen=True)
class Face:
    """One figure at the head of the page."""

    label: str
    before: str
    after: str
    note: str = ""
    better: bool | None = None


def verdict(log: RunLog, rows: list[Comparison]) -> list[Face]:
    """The verdict in figures."""
    faces = []
    steps, losses = series(log.steps, "loss")
    if losses:
        last = losses[-max(1, len(losses) // 50) :]
        end = "last step" if len(last) == 1 else f"mean of the last {len(last):,} steps"
        mean = sum(last) / len(last)
        better = mean < losses[0] if len(losses) > 1 else None
        faces.append(
            Face(
                "training loss",
                f"{losses[0]:.4f}" if len(losses) > 1 else "",
                f"{mean:.4f}",
                f"step {steps[0]:,}, {end}",
                better,
            )
        )
    overall = [row for row in rows if not row.source]
    metrics = [row for row in overall if row.kind in ("score", "other")][:METRICS]
    for row in [row for row in overall if row not in metrics and row.kind in ("loss", "perplexity", "share")] + metrics:
        faces.append(
            Face(
                row.label,
                row.show(row.before) if row.before is not None else "",
                row.show(row.after),
                interval(row, row.after_interval) or row.change,
                row.better,
            )
        )
    return faces + _effort(log)


def _effort(log: RunLog) -> list[Face]:
    """How fast, how long, and on what."""
    faces, last = [], log.steps[-1] if log.steps else {}
    seconds = sum(finite(record.get("step_seconds")) or 0.0 for record in log.steps)
    tokens = finite(last.get("total_tokens")) or 0.0
    speed = finite(log.trained.get("train_tokens_per_second")) or (tokens / seconds if seconds else None)
    if speed:
        faces.append(Face("tokens per second", "", f"{speed:,.0f}", f"{tokens:,.0f} tokens" if tokens else ""))
    runtime = finite(log.trained.get("train_runtime")) or seconds
    if runtime:
        faces.append(Face("training time", "", duration(runtime), f"{len(log.steps):,} steps"))
    workers = finite(log.plan.get("workers"))
    if workers:
        cpus, gpus = (finite(log.plan.get(f"cluster_{kind}")) for kind in ("cpus", "gpus"))
        there = " and ".join(f"{count:g} {kind}" for count, kind in ((gpus, "GPUs"), (cpus, "CPUs")) if count)
        faces.append(Face("workers", "", f"{workers:.0f}", f"cluster: {there}" if there else ""))
    return faces


def interval(row: Comparison, ends: tuple[float, float] | None) -> str:
    """From where to where a value may lie, as text; empty where that is not known."""
    return f"{row.show(ends[0])} to {row.show(ends[1])}" if ends else ""
