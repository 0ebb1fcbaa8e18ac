"""Packed rows as text: what is trained on stands out, and so does where one example ends and the next begins."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
from rich.text import Text

from raysft.data.stream import Rows
from raysft.data.tokenize import load_tokenizer
from raysft.log import Console
from raysft.records import IGNORED

COLOURS = ("cyan", "yellow", "magenta", "green")
"""Colours of examples, by turns."""


def print_rows(rows: Rows, model: str, count: int, console: Console | None = None) -> None:
    """Print the first rows in their training order: examples in colours by turns, trained tokens bold and underlined.

    Without colours (a file, a pipe) trained tokens stand between ⟦ and ⟧ and examples are separated by a line.

    Args:
        rows: the schedule and its shards.
        model: folder or hub id of the tokenizer.
        count: how many rows.
        console: where to print.
    """
    console = console or Console(highlight=False)
    tokenizer = load_tokenizer(model)
    shown = min(count, rows.schedule.rows)
    for number in range(shown):
        batch = rows.batch([number])
        tokens = int(batch["tokens"][0])
        ids, labels, positions = (batch[name][0, :tokens] for name in ("input_ids", "labels", "position_ids"))
        starts = [*np.flatnonzero(positions == 0).tolist(), tokens]
        trained = int((labels != IGNORED).sum())
        console.print(
            Text(
                f"── row {number} of {rows.schedule.rows:,}: {len(starts) - 1} examples, {tokens} of {rows.capacity} tokens, "
                f"{trained} trained ──",
                style="bold",
            )
        )
        for example, (start, end) in enumerate(pairwise(starts)):
            console.print(
                _example(tokenizer, ids[start:end], labels[start:end], COLOURS[example % 4], console.is_terminal),
                soft_wrap=True,
            )
            if not console.is_terminal:
                console.print("─" * 20)


def _example(tokenizer: object, ids: np.ndarray, labels: np.ndarray, colour: str, coloured: bool) -> Text:
    text = Text()
    edges = [0, *(np.flatnonzero(np.diff(labels != IGNORED)) + 1).tolist(), len(ids)]
    for start, end in pairwise(edges):
        trained = bool(labels[start] != IGNORED)
        piece = tokenizer.decode(ids[start:end].tolist())  # type: ignore[attr-defined]
        if trained and not coloured:
            piece = f"⟦{piece}⟧"
        text.append(piece, style=f"bold underline {colour}" if trained else f"dim {colour}")
    text.rstrip()
    return text
