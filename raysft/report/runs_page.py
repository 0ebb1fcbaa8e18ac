"""Several runs on one page, ``comparison.html``, and as a summary for the terminal."""

from __future__ import annotations

import io
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from raysft.errors import RunFailed
from raysft.report.comparison import metric_name
from raysft.report.html import template
from raysft.report.read_run import finite
from raysft.report.run_charts import loss_charts, small_charts
from raysft.report.run_differences import MAX_KEYS, differences
from raysft.report.run_metrics import Cell, MetricTable, Paired, metric_tables
from raysft.report.run_predictions import key_of, predictions, shared_predictions
from raysft.report.runs import Run, notes, read_runs
from raysft.report.summary import WIDTH
from raysft.report.text import shortened, visible
from raysft.storage.json_files import write_atomically
from raysft.storage.run_directory import RunDirectory

COLUMNS = 3
"""Largest number of runs that are columns of the table on the terminal."""
METRICS = 6
"""Number of metrics in a table that has runs as rows."""
Texts = tuple[Sequence[str], Sequence[str]]
PairedIntervals = Callable[[Sequence[str], Sequence[str], Texts, Iterable[Texts], int], Iterator[Paired]]
"""``raysft.generate.metrics.paired.paired_intervals``, which the report's layer cannot import."""


def compare_runs(
    directories: Sequence[RunDirectory], output: Path, paired_intervals: PairedIntervals, notify: Callable[[str], None]
) -> str:
    """Write a page that compares runs with the first of them.

    Args:
        directories: the run directories, at least two.
        output: the page.
        paired_intervals: computes intervals of differences over the same prompts.
        notify: receives a line before what takes long with many predictions.

    Returns:
        The summary for the terminal, with the path of the page.

    Raises:
        RequestError: a folder is not a run directory, or is named twice.
    """
    runs = read_runs(directories)
    seed = int(finite(runs[0].log.option("run.seed")) or 0)
    shared = shared_predictions(runs, seed)
    paired, unpaired = _paired(runs, seed, paired_intervals, notify)
    tables = metric_tables(runs, paired)
    changed, lines = differences(runs), [*notes(runs), *unpaired]
    page = template("comparison").render(
        name="Comparison of runs",
        runs=runs,
        notes=lines,
        configs=_oriented(runs, changed[:MAX_KEYS]),
        more_keys=[key for key, _ in changed[MAX_KEYS:]],
        losses=loss_charts(runs),
        charts=small_charts(runs),
        tables=tables,
        tests={cell.test for table in tables for _, cells in table.rows for cell in cells if cell},
        predictions=shared,
    )
    write_atomically(output, page)
    return _summary(runs, tables, lines, output)


def _paired(
    runs: Sequence[Run], seed: int, paired_intervals: PairedIntervals, notify: Callable[[str], None]
) -> tuple[dict[int, Paired], list[str]]:
    """Intervals of differences for the runs that answer the first run's prompts, and a line about those that do not."""
    # Metrics skip prompts without a reference.
    first = {key: row for row in predictions(runs[0]) if (key := key_of(row))[1]}
    names = runs[0].log.option("generate.metrics", [])
    if len(first) < 2 or not runs[0].log.metrics or not isinstance(names, list):
        return {}, []
    others = [run for run in runs[1:] if run.log.metrics and any(True for _ in predictions(run))]
    same = [run for run in others if {key for row in predictions(run) if (key := key_of(row))[1]} == first.keys()]
    lines = [
        f"{run.label}: its predictions are for other prompts than those of {runs[0].label}, so differences in metrics of "
        "generated text are judged by intervals that overlap or not."
        for run in others
        if run not in same
    ]

    if same:
        notify(f"comparing {len(first):,} predictions of {len(same) + 1} runs, prompt by prompt")

    def texts() -> Iterator[Texts]:
        for run in same:
            rows = {key_of(row): row for row in predictions(run)}
            yield [str(rows[key].get("predict") or "") for key in first], [key[1] for key in first]

    base = [str(row.get("predict") or "") for row in first.values()], [key[1] for key in first]
    sources = [str(row.get("source") or "") for row in first.values()]
    try:
        found = list(paired_intervals([str(name) for name in names], sources, base, texts(), seed)) if same else []
    except RunFailed as error:
        return {}, [*lines, f"Differences are not judged prompt by prompt: {visible(str(error))}"]
    shown = [{(visible(s), visible(metric_name(m))): ends for (s, m), ends in run.items()} for run in found]
    return {run.number: intervals for run, intervals in zip(same, shown, strict=True)}, lines


def _oriented(
    runs: Sequence[Run], changed: Sequence[tuple[str, list[str]]]
) -> tuple[list[str], list[tuple[str, list[str], Run | None]]]:
    """Header and rows of the table of settings, with runs as rows if they are more than the settings."""
    if len(changed) <= len(runs):
        rows: list[tuple[str, list[str], Run | None]] = [
            (run.label, [values[run.number] for _, values in changed], run) for run in runs
        ]
        return [key for key, _ in changed], rows
    return [run.label for run in runs], [(key, values, None) for key, values in changed]


def _summary(runs: Sequence[Run], tables: Sequence[MetricTable], lines: Sequence[str], output: Path) -> str:
    console = Console(
        file=io.StringIO(), width=WIDTH, force_terminal=sys.stdout.isatty(), highlight=False, legacy_windows=False
    )
    with console.capture() as capture:
        for table in tables[:1]:
            _print_table(console, table)
        if not tables:
            console.print("No results yet: no run has evaluations or scored predictions.")
        for line in lines:
            console.print(Text(f"- {line}"), soft_wrap=True)
        console.print(Text(f"\n{len(runs)} runs compared in {output}"), soft_wrap=True)
    return "\n".join(line.rstrip() for line in capture.get().splitlines()).strip("\n")


def _print_table(console: Console, table: MetricTable) -> None:
    """Metrics as rows and runs as columns if there are few runs; runs as rows, with the metrics that fit, otherwise."""
    shown = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False)
    shown.add_column("", no_wrap=True, max_width=30)
    labels = [run.label for run, _ in table.rows]
    cells = [[_cell_text(cell) for cell in row] for _, row in table.rows]
    heads, side = table.metrics, labels
    if len(labels) <= COLUMNS:
        heads, side, cells = labels, table.metrics, [list(column) for column in zip(*cells, strict=True)]
    for head in heads[:METRICS]:
        shown.add_column(Text(head), justify="right")
    for label, row in zip(side, cells, strict=True):
        shown.add_row(Text(shortened(label, 30)), *row[:METRICS])
    console.print(shown)
    if len(heads) > METRICS:
        console.print(Text(f"metrics that are only on the page: {len(heads) - METRICS}", style="dim"))
    if any(cell and cell.differs for _, row in table.rows for cell in row):
        console.print(Text(f"* differs from {labels[0]} by more than chance: see the page.", style="dim"))


def _cell_text(cell: Cell | None) -> Text:
    if cell is None:
        return Text("–")
    style = ("green" if cell.better else "red") if cell.differs and cell.better is not None else ""
    return Text(f"{cell.value}{' *' if cell.differs else ''}", style=style)
