"""The most images that a microbatch can have, to estimate what they need."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from raysft.data.rows.collate import open_media
from raysft.data.rows.row_layouts import Segments

MOST_SEGMENTS, MOST_SHARDS = 1 << 20, 16
"""Segments and shards that are examined; examples in other shards count like those of an average shard."""


@dataclass(frozen=True)
class ImageLoad:
    """The images of the microbatch that has the most, as images of one size."""

    width: int
    """Pixels of one of the images that have the most tokens."""
    height: int
    per_row: float
    """How many of that size have as many tokens as the images of an average row of the microbatch."""


def image_load(paths: Sequence[str], shard_ends: np.ndarray, segments: Segments, rows: int) -> ImageLoad | None:
    """Find the microbatch of ``rows`` rows whose images have the most tokens.

    Args:
        paths: of the shards.
        shard_ends: [shards] index of the example after each shard's last.
        segments: of the row plan.
        rows: rows of a microbatch.

    Returns:
        Its images; None if no examined shard has any.
    """
    count = int(np.searchsorted(segments.offsets, min(MOST_SEGMENTS, int(segments.offsets[-1])), side="right")) - 1
    count = max(1, count)
    offsets = np.asarray(segments.offsets[: count + 1])
    examples = np.asarray(segments.examples[: offsets[-1]])
    lengths = np.asarray(segments.stops[: offsets[-1]]) - np.asarray(segments.starts[: offsets[-1]])
    shards = np.searchsorted(shard_ends, examples, side="right")
    used = np.unique(shards)
    chosen = used[np.linspace(0, len(used) - 1, min(MOST_SHARDS, len(used))).astype(int)]
    tokens, known = np.zeros(len(examples)), np.isin(shards, chosen)
    largest = (0, 0, 0)
    for shard in map(int, chosen):
        of_examples, size = _tokens(paths[shard])
        largest = max(largest, size)
        if len(of_examples):
            here = shards == shard
            tokens[here] = of_examples[examples[here] - (shard_ends[shard - 1] if shard else 0)]
    if not largest[0]:
        return None
    tokens = np.minimum(tokens, lengths)  # of an example that continues in the next row
    tokens[~known] = tokens[known].mean()
    of_rows = np.add.reduceat(np.append(tokens, 0.0), offsets[:-1]) * (np.diff(offsets) > 0)
    of_rows = np.append(of_rows, np.zeros(-len(of_rows) % rows)).reshape(-1, rows)
    most, width, height = largest
    return ImageLoad(width, height, float(of_rows.sum(1).max()) / rows / most)


def _tokens(path: str) -> tuple[np.ndarray, tuple[int, int, int]]:
    """Return the image tokens of each example of a shard, and (tokens, width, height) of the largest image."""
    column, counts = open_media(path)
    media: Any = column.flatten() if len(counts) else ()
    if not len(media):
        return np.empty(0), (0, 0, 0)
    start, stop, width, height = (media.field(name).to_numpy() for name in ("start", "stop", "width", "height"))
    tokens = stop - start
    largest = np.lexsort((width * height, tokens))[-1]
    of_examples = np.bincount(np.repeat(np.arange(len(counts)), counts), tokens, minlength=len(counts))
    return of_examples, (int(tokens[largest]), int(width[largest]), int(height[largest]))
