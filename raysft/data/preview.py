"""A readable preview of packed rows: loss tokens are highlighted and examples are set apart."""

from __future__ import annotations

import html
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from rich.text import Text

from raysft.data.rows.packed_dataset import PackedDataset
from raysft.data.shards.manifest import Manifest
from raysft.data.tokenization.tokenizer import load_once
from raysft.data.types import IGNORE_INDEX, RowMedium
from raysft.media.files import Unreadable
from raysft.media.images import open_image
from raysft.media.thumbnails import thumbnail
from raysft.telemetry.terminal import Console

COLOURS = ("cyan", "yellow", "magenta", "green")
"""Colours of successive examples."""
BINS = 12
"""Bars of the length histogram."""
VISIBLE = {code: 0x2400 + code for code in range(32) if code not in b"\n\t"}
"""Control characters → their Unicode symbols: a terminal would act on the characters themselves."""


@dataclass(frozen=True)
class DecodedRow:
    """One packed row as text."""

    title: str
    examples: list[list[tuple[str, bool]]]
    """For each example its (text, has loss) segments, in order."""
    media: list[list[RowMedium]]
    """For each example its images."""


def decode_rows(rows: PackedDataset, model: str, count: int, runs_code: bool = False) -> Iterator[DecodedRow]:
    """Decode the first rows, in training order.

    Args:
        rows: the planned rows.
        model: folder or Hub id of the model whose tokenizer is used.
        count: number of rows.
        runs_code: allow code that comes with the model to run.
    """
    tokenizer = load_once(model, runs_code)
    filled = np.flatnonzero(np.diff(rows.row_plan.segments.offsets))
    for number in filled[:count].tolist():
        batch = rows.batch([number])
        tokens = int(batch["tokens"][0])
        ids, labels = (batch[name][0, :tokens] for name in ("input_ids", "labels"))
        segments = rows.row_plan.segments
        inside = slice(segments.offsets[number], segments.offsets[number + 1])
        ends = np.cumsum(segments.stops[inside] - segments.starts[inside]).tolist()
        media = batch["media"][0] if "media" in batch else ()
        spans = list(pairwise([0, *ends]))
        loss_tokens = int((labels != IGNORE_INDEX).sum())
        yield DecodedRow(
            title=f"row {number} of {rows.row_plan.rows:,}: {len(ends)} example{'s' * (len(ends) != 1)}, {tokens} of "
            f"{rows.capacity} tokens, {loss_tokens} in the loss",
            examples=[_segments(tokenizer, ids, labels, media, span) for span in spans],
            media=[[medium for medium in media if span[0] <= medium.start < span[1]] for span in spans],
        )


def _segments(
    tokenizer: Any, ids: np.ndarray, labels: np.ndarray, media: Sequence[RowMedium], span: tuple[int, int]
) -> list[tuple[str, bool]]:
    """Decode the tokens of a span; an image is named, with its size and the number of its tokens."""
    within = {medium.start: medium for medium in media if span[0] <= medium.start < span[1]}
    changes = np.flatnonzero(np.diff(labels != IGNORE_INDEX)) + 1
    edges = {*span, *(each for medium in within.values() for each in (medium.start, medium.stop))}
    edges.update(change for change in changes[(span[0] < changes) & (changes < span[1])].tolist())
    return [
        (
            _name(within[start]) if start in within else tokenizer.decode(ids[start:end].tolist()).translate(VISIBLE),
            bool(labels[start] != IGNORE_INDEX),
        )
        for start, end in pairwise(sorted(edges))
    ]


def _name(medium: RowMedium) -> str:
    name = medium.location.rpartition("/")[2].translate(VISIBLE)
    facts = f"{name}, {medium.width} × {medium.height} pixels, {medium.stop - medium.start} tokens"
    return f"⟨{facts}{f'; {medium.fault}' if medium.fault else ''}⟩"


@dataclass(frozen=True)
class LengthSummary:
    """How long examples are, and how many of their tokens are lost."""

    bars: list[tuple[int, int, int]]
    """(shortest, longest, examples) for each bar of the histogram, both bounds inclusive."""
    lines: list[str]
    """Sentences about the tokens in the rows and the tokens that were lost."""

    @classmethod
    def of(cls, rows: PackedDataset, manifests: Sequence[Manifest]) -> LengthSummary:
        """Summarize the training examples of a row plan."""
        lengths = np.concatenate([manifest.lengths for manifest in manifests])
        low, high = int(lengths.min()), int(lengths.max())
        width = -(-(high - low + 1) // BINS)
        counts = np.bincount((lengths - low) // width)
        bars = [
            (low + index * width, min(high, low + (index + 1) * width - 1), int(count))
            for index, count in enumerate(counts)
        ]
        tokens, filled = int(rows.row_plan.step_tokens.sum()), rows.row_plan.consumed(rows.row_plan.steps)
        lost = {
            name: sum(manifest.counts.get(name, 0) for manifest in manifests)
            for name in ("truncated_tokens", "dropped_tokens")
        }
        all_tokens = int(lengths.sum()) + sum(lost.values())
        rejected = sum(len(manifest.rejected) for manifest in manifests)
        records = sum(manifest.records for manifest in manifests)
        images = sum(manifest.media for manifest in manifests)
        cut = sum(manifest.counts.get("truncated_media", 0) for manifest in manifests)
        more = f"; {cut:,} more were cut off" if cut else ""
        of_images = [f"{images:,} images{more}"] if images + cut else []
        return cls(
            bars,
            [
                f"{tokens:,} tokens in {filled:,} rows; {1 - rows.row_plan.packing_efficiency:.2%} padding",
                f"of {all_tokens:,} tokens in all examples, {lost['truncated_tokens'] / all_tokens:.2%} were truncated and "
                f"{lost['dropped_tokens'] / all_tokens:.2%} were dropped with examples that are too long",
                *of_images,
                f"{rejected:,} of {records:,} records rejected ({rejected / max(1, records):.2%})",
            ],
        )


def print_rows(shown: Sequence[DecodedRow], lengths: LengthSummary, console: Console | None = None) -> None:
    """Print rows, then the length histogram: each example in a colour, loss tokens bold and underlined.

    Output without colours (a file, a pipe) marks loss tokens with ⟦ and ⟧ and separates examples with a line.
    """
    console = console or Console(highlight=False)
    for row in shown:
        console.print(Text(f"── {row.title} ──", style="bold"))
        for number, segments in enumerate(row.examples):
            text = Text()
            for segment, has_loss in segments:
                colour = COLOURS[number % len(COLOURS)]
                marked = f"⟦{segment}⟧" if has_loss and not console.is_terminal else segment
                text.append(marked, style=f"bold underline {colour}" if has_loss else f"dim {colour}")
            text.rstrip()
            console.print(text, soft_wrap=True)
            if not console.is_terminal:
                console.print("─" * 20)
    console.print(Text("── example lengths in tokens ──", style="bold"))
    most = max(count for _, _, count in lengths.bars)
    for start, end, count in lengths.bars:
        console.print(Text(f"{start:>7,} – {end:<7,} {count:>9,} {'█' * round(40 * count / most)}"), soft_wrap=True)
    for line in lengths.lines:
        console.print(Text(line), soft_wrap=True)


def write_page(shown: Sequence[DecodedRow], lengths: LengthSummary, path: Path) -> None:
    """Write the same preview as one self-contained HTML page."""
    most = max(count for _, _, count in lengths.bars)
    bars = "".join(
        f'<tr><td class="n">{start:,} – {end:,}</td><td class="n">{count:,}</td>'
        f'<td><div class="bar" style="width:{100 * count / most:.1f}%"></div></td></tr>'
        for start, end, count in lengths.bars
    )
    lines = "".join(f"<p>{html.escape(line)}</p>" for line in lengths.lines)
    rows = "".join(_section(row) for row in shown)
    path.write_text(PAGE.format(bars=bars, lines=lines, rows=rows), encoding="utf-8")


def _section(row: DecodedRow) -> str:
    examples = "".join(
        f'<div class="example e{number % len(COLOURS)}">{_pictures(media)}'
        + "".join(f"<b>{html.escape(text)}</b>" if has_loss else html.escape(text) for text, has_loss in segments)
        + "</div>"
        for number, (segments, media) in enumerate(zip(row.examples, row.media, strict=True))
    )
    return f"<h2>{html.escape(row.title)}</h2>{examples}"


def _pictures(media: Sequence[RowMedium]) -> str:
    """Show the images of an example above its text, where each is named; without those that cannot be used."""
    shown = []
    for medium in media:
        with suppress(Unreadable):
            small = thumbnail(open_image(medium.content))
            name = html.escape(medium.location.rpartition("/")[2].translate(VISIBLE))
            drawn = ' class="enlarged"' if small.enlarged else ""
            shown.append(f'<img src="{small.source}" width="{small.width}" alt="{name}" title="{name}"{drawn}>')
    return f'<div class="pictures">{"".join(shown)}</div>' if shown else ""


PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>raysft: packed rows</title>
<style>
:root {{ color-scheme: light dark; --line: #8885; --soft: light-dark(#666, #aaa); --ink: light-dark(#111, #eee); }}
body {{ font: 15px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; color: var(--ink);
       background: light-dark(#fff, #181818); }}
h1 {{ font-size: 1.4rem }} h2 {{ font-size: 1rem; margin: 2rem 0 .5rem }} p {{ margin: .3rem 0 }}
.example {{ white-space: pre-wrap; overflow-wrap: anywhere; font: 13px/1.5 ui-monospace, monospace; color: var(--soft);
            border-left: 4px solid; padding: .4rem .8rem; margin: .4rem 0; background: #8881 }}
.example b {{ color: var(--ink); background: #fc03; border-bottom: 1px solid #c90 }}
.pictures {{ display: flex; flex-wrap: wrap; gap: .5rem; align-items: end; margin-bottom: .3rem }}
.pictures img {{ height: auto; max-width: 100%; border-radius: 4px }} .enlarged {{ image-rendering: pixelated }}
.e0 {{ border-color: #0aa }} .e1 {{ border-color: #c90 }} .e2 {{ border-color: #b3b }} .e3 {{ border-color: #393 }}
table {{ border-collapse: collapse; width: 100%; margin: .5rem 0 }} td {{ padding: 1px .6rem 1px 0 }}
.n {{ text-align: right; white-space: nowrap; font-variant-numeric: tabular-nums; width: 1% }}
.bar {{ background: #0aa; height: .9em; min-width: 1px }}
</style></head><body>
<h1>Packed rows</h1>
<p><span class="example" style="border:0;padding:0 .3rem"><b>Marked</b></span> tokens are in the loss. Each box is one
example; the examples of a row do not attend to each other.</p>
<h2>Example lengths in tokens</h2>
<table>{bars}</table>
{lines}
{rows}
</body></html>
"""
