"""Fit tokenized examples into rows, as ``data.on_overflow`` says."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

import numpy as np

from raysft.data.tokenization.span_search import Span
from raysft.data.tokenization.tokenized_example import (
    NO_IDS,
    Overflow,
    TokenizedExample,
    TokenizeOptions,
    TokenizeResult,
)
from raysft.data.tokenization.truncation import split, truncate
from raysft.data.tokenization.turn_ends import truncate_observations
from raysft.data.types import IGNORE_INDEX, Rejected, TokenizedMedium


def fit_to_row(
    example: TokenizedExample, turns: Sequence[Span], options: TokenizeOptions, differ_alone: bool = False
) -> Iterator[TokenizeResult]:
    """Yield an example if it fits into a row, else what ``data.on_overflow`` makes of it.

    Args:
        example: a tokenized example.
        turns: [start, end) in tokens of each assistant turn.
        options: they decide what happens to a longer example.
        differ_alone: one of its images would have other tokens if it were the only one.
    """
    tokens = len(example.input_ids)
    largest = max(example.media, key=lambda medium: medium.stop - medium.start, default=None)
    if tokens <= options.sequence_length:
        fitted = [example]
    elif options.on_overflow in ("drop", "error"):
        reason = f"{tokens} tokens do not fit into data.sequence_length={options.sequence_length}"
        yield Overflow(Rejected(example.source, example.record, reason), tokens)
        return
    elif (
        largest
        and (size := largest.stop - largest.start) > options.sequence_length
        and not (options.on_overflow == "truncate" and options.with_prompts)  # its prompt stays whole
    ):
        reason = f"{largest.location}: its {size} tokens do not fit into data.sequence_length={options.sequence_length}"
        yield Overflow(Rejected(example.source, example.record, f"{reason}; lower data.image_max_pixels"), tokens)
        return
    elif options.on_overflow == "split":
        fitted = _split(example, options.sequence_length)
    else:
        fitted = [_truncate(example, turns, options)]
    if differ_alone and any(len(piece.media) == 1 < len(example.media) for piece in fitted):
        reason = (
            f"{tokens} tokens do not fit into data.sequence_length={options.sequence_length}, and truncation would separate "
            "images, which changes their tokens"
        )
        yield Overflow(Rejected(example.source, example.record, reason), tokens)
    elif fitted and fitted[0].loss_tokens:
        yield from fitted
    else:
        yield Rejected(example.source, example.record, "contains no token to train on")


def _split(example: TokenizedExample, capacity: int) -> list[TokenizedExample]:
    """Cut an example into pieces; the first carries the counts and the observations. Pieces without loss tokens are left out."""
    # A piece may begin in the middle of a turn, so that there is no prompt to generate from.
    plain = replace(example, prompt="", prompt_ids=NO_IDS, reference="", prompt_media=())
    labelled = example.labels != IGNORE_INDEX
    pieces = [
        replace(
            plain,
            input_ids=example.input_ids[start:stop],
            labels=example.labels[start:stop],
            media=tuple(
                replace(medium, start=medium.start - start, stop=medium.stop - start)
                for medium in example.media
                if start <= medium.start and medium.stop <= stop
            ),
        )
        for start, stop in split(len(example.input_ids), capacity, _spans(example.media), labelled)
    ]
    pieces = [piece for piece in pieces if piece.loss_tokens]
    lost = _lost(example, pieces)
    counts = (*example.counts, ("split", 1), ("split_pieces", len(pieces)), *lost)
    return [
        replace(piece, counts=counts) if index == 0 else replace(piece, counts=(), observations=())
        for index, piece in enumerate(pieces)
    ]


def _truncate(example: TokenizedExample, turns: Sequence[Span], options: TokenizeOptions) -> TokenizedExample:
    kept = truncate(
        len(example.input_ids),
        turns,
        options.sequence_length,
        _spans(example.media),
        tail=options.keep_prompt == "tail",
        last_first=options.mask_history,
    )
    starts = np.searchsorted(kept, [medium.start for medium in example.media]).tolist()
    media = tuple(
        replace(medium, start=start, stop=start + medium.stop - medium.start)
        for medium, start in zip(example.media, starts, strict=True)
        if start < len(kept) and kept[start] == medium.start
    )
    counts = {
        "truncated": 1,
        "truncated_tokens": len(example.input_ids) - len(kept),
    }
    truncated = replace(
        example,
        input_ids=example.input_ids[kept],
        labels=example.labels[kept],
        media=media,
        observations=truncate_observations(example.observations, kept),
    )
    return replace(truncated, counts=(*example.counts, *counts.items(), *_lost(example, [truncated])))


def _lost(example: TokenizedExample, kept: Sequence[TokenizedExample]) -> list[tuple[str, int]]:
    """Count the media of an example that are in nothing that is kept of it."""
    lost = len(example.media) - sum(len(piece.media) for piece in kept)
    return [("truncated_media", lost)] if lost else []


def _spans(media: Sequence[TokenizedMedium]) -> list[Span]:
    return [(medium.start, medium.stop) for medium in media]
