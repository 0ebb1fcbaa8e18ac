"""The summary that a run ends with, as text for the terminal."""

from __future__ import annotations

import io
import itertools
import re
import sys
from collections.abc import Sequence
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from raysft.report.card import masked
from raysft.report.comparison import INTERVALS, compare, unfinished
from raysft.report.read_run import RunLog, read_lines
from raysft.report.run_facts import generated, went

WIDTH = 100
SAMPLES = 3
SAMPLE_LENGTH = 240
"""Characters of a text in a sample."""

_SPECIAL = re.compile(r"<[|｜][^<>]*?[|｜]>|</?(?:s|bos|eos|pad|think|start_of_turn|end_of_turn)>|\[/?INST\]")
"""Special tokens of the usual chat templates: what stands between a prompt's turns."""
_ROLE = re.compile(r"\s*(?:system|user|assistant|model|tool|human)\s*(?:\n|$)")
"""A role's name where a template writes it before a turn."""

_FILES = {
    "README.md": "model card",
    "report.html": "all of this with curves and predictions, for a browser",
    "model": "the trained model, loads with {library}",
    "checkpoints": "to resume from",
    "config.yaml": "the resolved config",
    "plan.json": "rows, steps, tokens and padding as planned",
    "trainer_log.jsonl": "every step and evaluation",
    "trainer_state.json": "the same in Hugging Face's form",
    "train_results.json": "how training went",
    "eval_results.json": "loss and accuracy on the evaluation sets",
    "predict_results.json": "scores of the generated text",
    "all_results.json": "all results in one",
    "generated_predictions.jsonl": "what the model wrote",
    "generated_predictions_base.jsonl": "what the model wrote before training",
    "rejected.jsonl": "records that could not be used",
    "changes.jsonl": "what was changed on the way",
}


def summary(log: RunLog, warnings: Sequence[str] = ()) -> str:
    """Before and after, warnings, samples, and which file holds what, 100 columns wide.

    Coloured if stdout is a terminal, plain text otherwise.
    """
    terminal = sys.stdout.isatty()
    console = Console(file=io.StringIO(), width=WIDTH, force_terminal=terminal, highlight=False, legacy_windows=False)
    with console.capture() as capture:
        _comparison(console, log)
        _warnings(console, warnings)
        _samples(console, log)
        _course(console, log)
        _files(console, log)
    return "\n".join(line.rstrip() for line in capture.get().splitlines()).strip("\n")


def last_user_turn(prompt: str) -> str:
    """The last turn of a prompt, without the template around it; the whole prompt where no template is recognised.

    >>> last_user_turn("<|im_start|>user\\nWho are you?<|im_end|>\\n<|im_start|>assistant\\n")
    'Who are you?'
    """
    turns = (_ROLE.sub("", part, count=1) if _ROLE.match(part) else part for part in _SPECIAL.split(prompt))
    written = [turn.strip() for turn in turns if turn.strip()]
    return written[-1] if written else prompt


def shortened(text: Any, length: int = SAMPLE_LENGTH) -> str:
    """A text on one line, with its middle left out if it is long: what a prompt asks often stands at its end.

    >>> shortened("one two  three four", 13)
    'one two … our'
    """
    line = "".join(letter if letter.isprintable() else " " for letter in str(text))
    line = " ".join(line.split())
    if len(line) <= length:
        return line
    tail = (length - 3) // 3
    return f"{line[: length - 3 - tail].rstrip()} … {line[len(line) - tail :].lstrip()}"


def _comparison(console: Console, log: RunLog) -> None:
    rows = compare(log)
    base = shortened(masked(log.option("model.path", "?")), 60)
    what = f"{base}, {log.option('model.finetuning', '')} {log.option('stage', '')}"
    if log.other_model:
        what = f"predictions of {shortened(masked(log.other_model), 60)}"
    console.print(Text(f"{log.name}: {what}", style="bold"))
    if not rows:
        console.print("\nNothing to compare: the run has neither evaluations nor scored predictions.")
        return
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False)
    table.add_column("")
    columns = ("score",) if log.other_model else ("before", "after", "change")
    for column in columns:
        table.add_column(column, justify="right")
    for row in rows:
        style = {True: "green", False: "red", None: ""}[row.better]
        shown = (row.shown_before, Text(row.shown_after, "bold"), Text(row.change, style=style))
        table.add_row(Text(row.label), *(shown[1:2] if log.other_model else shown))
    console.print()
    console.print(table)
    if any(row.after_interval for row in rows):
        console.print(Text(f"In brackets: {INTERVALS}.", style="dim"))
    if unfinished(log):
        console.print(Text(unfinished(log)))


def _warnings(console: Console, warnings: Sequence[str]) -> None:
    if warnings:
        console.print(Text("\nWarnings", style="bold"))
    for line in warnings:
        console.print(Text(f"- {line}"))


def _samples(console: Console, log: RunLog) -> None:
    """A few predictions beside what the data says and what the model wrote before training."""
    rows = list(itertools.islice(read_lines(log.directory.predictions), SAMPLES))
    wanted = {row.get("id") for row in rows} - {None}
    before = {row["id"]: row for row in read_lines(log.directory.base_predictions) if row.get("id") in wanted}
    for number, row in enumerate(rows, start=1):
        base = before.get(row.get("id"))
        texts = {
            "prompt": last_user_turn(str(row.get("prompt", ""))),
            "reference": row.get("label", ""),
            "before": base.get("predict", "") if base else None,
            "predicted" if log.other_model else "after": row.get("predict", ""),
        }
        grid = Table.grid(padding=(0, 2))
        for label, text in texts.items():
            if text is not None:
                grid.add_row(Text(label, style="dim"), Text(shortened(text) or "(empty)"))
        console.print(Text(f"\nSample {number}", style="bold"))
        console.print(grid)


def _course(console: Console, log: RunLog) -> None:
    lines = [*went(log), *generated(log)]
    if lines:
        console.print(Text("\nHow it went", style="bold"))
        console.print(_grid(lines))


def _files(console: Console, log: RunLog) -> None:
    """Every file of the run that is there, with what it holds."""
    folder = log.directory.path
    elsewhere = log.directory.remote.entries() if log.directory.remote else {}
    library = "peft" if log.option("model.finetuning") == "lora" else "transformers"
    there = [
        name
        for name in _FILES
        if (path := folder / name).is_dir() or (path.is_file() and path.stat().st_size) or name in elsewhere
    ]
    lines = [(name, _FILES[name].format(library=library)) for name in there]
    plots = sorted(path.name for path in folder.glob("training_*.png"))
    if plots:
        lines.insert(1, ("training_*.png", f"plots: {', '.join(name[9:-4] for name in plots)}"))
    console.print(Text(f"\nEverything lies in {log.directory.place}", style="bold"), soft_wrap=True)
    console.print(_grid(lines))


def _grid(lines: list[tuple[str, str]]) -> Table:
    grid = Table.grid(padding=(0, 2))
    for left, right in lines:
        grid.add_row(Text(left), Text(right))
    return grid
