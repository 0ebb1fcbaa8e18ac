"""Choose the tokens to keep of an example that is longer than a row."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

Span = tuple[int, int]


def truncated_lengths(source: int, target: int, cutoff: int) -> tuple[int, int]:
    """Divide a row between a prompt and its answer, as LLaMA-Factory's ``cutoff_len`` does.

    A side that takes less than half of the row stays whole if possible; two long sides are shortened in proportion.

    Args:
        source: tokens of the prompt.
        target: tokens of the answer.
        cutoff: tokens that both may have together.

    Returns:
        Tokens to keep of the prompt and of the answer.

    >>> truncated_lengths(3000, 2000, 1000), truncated_lengths(100, 1000, 1000)
    ((600, 400), (100, 900))
    """
    if 2 * target < cutoff:
        max_target = cutoff
    elif 2 * source < cutoff:
        max_target = cutoff - source
    else:
        max_target = cutoff * target // (source + target)
    target = min(target, max_target)
    return min(source, cutoff - target), target


def truncate(
    tokens: int, turns: Sequence[Span], capacity: int, media: Sequence[Span] = (), *, tail: bool, last_first: bool
) -> np.ndarray:
    """Choose the tokens of a conversation to keep: a part of each turn, until the row is full.

    An image stays whole or goes as a whole; what comes after one that goes takes its room.

    Args:
        tokens: length of the conversation.
        turns: [start, end) in tokens of each assistant turn; what precedes a turn, back to the turn before, is its prompt.
        capacity: tokens in a row.
        media: [start, end) in tokens of each image.
        tail: keep the end of prompts instead of the beginning. Answers always keep their beginning.
        last_first: start with the last turn, because it is the only one to train on.

    Returns:
        Indices of the tokens to keep, in order.
    """
    prompt_starts = [0, *(end for _, end in turns[:-1])]
    pairs = [(prompt_start, start, end) for prompt_start, (start, end) in zip(prompt_starts, turns, strict=True)]
    kept: list[np.ndarray] = []
    available = capacity
    for prompt_start, start, end in reversed(pairs) if last_first else pairs:
        if available <= 0:
            break
        source, target = truncated_lengths(start - prompt_start, end - start, available)
        prompt = _part((prompt_start, start), source, media, tail)
        answer = _part((start, end), target, media, False)
        kept += (prompt, answer)
        available -= len(prompt) + len(answer)
    return np.sort(np.concatenate(kept)) if kept else _part((0, tokens), capacity, media, False)


def _part(whole: Span, size: int, media: Sequence[Span], tail: bool) -> np.ndarray:
    """Choose ``size`` tokens of a part from its beginning or its end, fewer if what is left of it is an image that does not fit."""
    tokens = np.arange(*whole)
    while True:
        kept = tokens[len(tokens) - size :] if tail and size < len(tokens) else tokens[:size]
        cut = next((span for span in media if 0 < np.count_nonzero(_inside(kept, span)) < span[1] - span[0]), None)
        if cut is None:
            return kept
        tokens = tokens[~_inside(tokens, cut)]


def _inside(tokens: np.ndarray, span: Span) -> np.ndarray:
    return (span[0] <= tokens) & (tokens < span[1])


def split(
    tokens: int, capacity: int, media: Sequence[Span] = (), labelled: Sequence[bool] | np.ndarray = ()
) -> list[Span]:
    """Cut a sequence into pieces of at most ``capacity`` tokens.

    Each piece begins with the last token of the piece before, so that every token but the first is predicted once. An image is not
    cut: a piece may end early before one, and one that begins after an image begins with a token of its own.

    Args:
        tokens: length of the sequence.
        capacity: tokens in a row.
        media: [start, end) in tokens of each image, none longer than a row.
        labelled: [tokens] True for tokens to predict; a piece begins with one of its own only where nothing else is possible.

    >>> split(10, 4)
    [(0, 4), (3, 7), (6, 10)]
    >>> split(10, 4, media=[(2, 5)])
    [(0, 2), (1, 5), (5, 9), (8, 10)]
    """
    within = np.zeros(tokens + 1, np.bool_)
    strictly = np.zeros(tokens + 1, np.bool_)
    for start, end in media:
        within[start:end] = strictly[start + 1 : end] = True
    pieces, start = [], 0
    while True:
        end = min(start + capacity, tokens)
        if end == tokens:
            return [*pieces, (start, end)]
        ends = [at for at in range(end, start, -1) if not strictly[at]] if media else [end]
        # The token at the end of a piece is predicted from the one before, which must be in the same piece.
        lossless = (
            at for at in ends if (at - 1 > start and not within[at - 1]) or not len(labelled) or not labelled[at]
        )
        end = next(lossless, ends[0])
        pieces.append((start, end))
        start = end - 1 if end - 1 > start and not within[end - 1] else end
