"""The summary that a run prints at its end."""

from __future__ import annotations

import io
import itertools
import sys
from collections.abc import Sequence

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from raysft.report.comparison import INTERVALS, compare, unfinished
from raysft.report.pictures import locations
from raysft.report.read_run import RunLog, read_lines
from raysft.report.run_facts import generation_facts, training_facts
from raysft.report.text import last_user_turn, masked, shortened

WIDTH = 100
SAMPLES = 3

_FILES = {
    "README.md": "model card",
    "report.html": "this report with curves and predictions, for a browser",
    "model": "the trained model; load it with {library}",
    "checkpoints": "checkpoints to resume from",
    "config.yaml": "the resolved config",
    "plan.json": "planned rows, steps, tokens and padding, and resolved settings",
    "trainer_log.jsonl": "metrics of every step and evaluation",
    "trainer_state.json": "the same in Hugging Face's format",
    "train_results.json": "training loss, time and speed",
    "eval_results.json": "loss and accuracy on the evaluation sets",
    "predict_results.json": "metrics of generated text, with LLaMA-Factory's keys",
    "metrics.jsonl": "the same as one row per metric, source and model",
    "all_results.json": "all results in one file",
    "generated_predictions.jsonl": "prompts, predictions and references",
    "generated_predictions_base.jsonl": "the same for the model before training",
    "rejected.jsonl": "rejected and dropped records",
    "changes.jsonl": "settings that changed during the run",
    "diagnosis.jsonl": "workers that kept the others waiting",
    "diagnosis": "stacks of workers that made no progress",
}


def summary(log: RunLog, warnings: Sequence[str] = ()) -> str:
    """Results before and after training, warnings, samples, and the files of the run, 100 columns wide.

    It is colored if stdout is a terminal, and plain text otherwise.
    """
    terminal = sys.stdout.isatty()
    console = Console(file=io.StringIO(), width=WIDTH, force_terminal=terminal, highlight=False, legacy_windows=False)
    with console.capture() as capture:
        _comparison(console, log)
        _warnings(console, warnings)
        _samples(console, log)
        _facts(console, log)
        _files(console, log)
    return "\n".join(line.rstrip() for line in capture.get().splitlines()).strip("\n")


def _comparison(console: Console, log: RunLog) -> None:
    rows = compare(log)
    base = shortened(masked(log.option("model.path", "?")), 60)
    title = f"{base}, {log.finetuning} {log.option('stage', '')}"
    if log.other_model:
        title = f"{' and '.join(log.other_work)} of {shortened(masked(log.other_model), 60)}"
    console.print(Text(f"{log.name}: {title}", style="bold"))
    if not rows:
        console.print(f"\n{no_scores(log)}")
        return
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False)
    table.add_column("")
    for column in ("score",) if log.other_model else ("before", "after", "change"):
        table.add_column(column, justify="right")
    for row in rows:
        style = {True: "green", False: "red", None: ""}[row.better]
        cells = (row.shown_before, Text(row.shown_after, "bold"), Text(row.change, style=style))
        table.add_row(Text(row.label), *(cells[1:2] if log.other_model else cells))
    console.print()
    console.print(table)
    if any(row.after_interval for row in rows):
        console.print(Text(f"Values in brackets are {INTERVALS}.", style="dim"))
    if unfinished(log):
        console.print(Text(unfinished(log)))


def no_scores(log: RunLog) -> str:
    """Say why a run without evaluations has no metrics."""
    unscored = [
        row.get("value") for row in log.metrics if row.get("metric") == "unscored" and row.get("model") != "base"
    ]
    if unscored:
        return f"No metrics: none of the {unscored[0]:,} prompts has an answer to compare predictions with."
    return "No results yet: the run has neither evaluations nor scored predictions."


def _warnings(console: Console, warnings: Sequence[str]) -> None:
    if warnings:
        console.print(Text("\nWarnings", style="bold"))
    for line in warnings:
        console.print(Text(f"- {line}"))


def _samples(console: Console, log: RunLog) -> None:
    """A few predictions, next to the reference and the prediction before training."""
    rows = list(itertools.islice(read_lines(log.directory.predictions), SAMPLES))
    ids = {row.get("id") for row in rows} - {None}
    before = {row["id"]: row for row in read_lines(log.directory.base_predictions) if row.get("id") in ids}
    for number, row in enumerate(rows, start=1):
        base = before.get(row.get("id"))
        texts = {
            "images": ", ".join(masked(location) for location in locations(row)) or None,
            "prompt": last_user_turn(str(row.get("prompt", ""))),
            "reference": row.get("label", ""),
            "before": base.get("predict", "") if base else None,
            "predicted" if log.other_model else "after": row.get("predict", ""),
        }
        pairs = [(label, shortened(text) or "(empty)") for label, text in texts.items() if text is not None]
        console.print(Text(f"\nSample {number}", style="bold"))
        console.print(_grid(pairs, style="dim"))


def _facts(console: Console, log: RunLog) -> None:
    lines = [*training_facts(log), *generation_facts(log)]
    if lines:
        console.print(Text("\nMeasured", style="bold"))
        console.print(_grid(lines))


def _files(console: Console, log: RunLog) -> None:
    """The files that the run wrote, with their content."""
    folder = log.directory.path
    remote = log.directory.remote.entries() if log.directory.remote else {}
    names = [
        name
        for name in _FILES
        if (path := folder / name).is_dir() or (path.is_file() and path.stat().st_size) or name in remote
    ]
    lines = [(name, _FILES[name].format(library=log.library)) for name in names]
    plots = sorted(path.name for path in folder.glob("training_*.png"))
    if plots:
        listed = ", ".join(name.removeprefix("training_").removesuffix(".png") for name in plots)
        lines.insert(1, ("training_*.png", f"plots: {listed}"))
    console.print(Text(f"\nFiles in {log.directory.place}", style="bold"), soft_wrap=True)
    console.print(_grid(lines))


def _grid(lines: list[tuple[str, str]], style: str = "") -> Table:
    grid = Table.grid(padding=(0, 2))
    grid.add_column()
    grid.add_column(overflow="fold")  # a long path loses nothing
    for left, right in lines:
        grid.add_row(Text(left, style=style), Text(right))
    return grid
