"""What becomes of an example that is longer than a row."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

Span = tuple[int, int]


def truncated_lengths(source: int, target: int, cutoff: int) -> tuple[int, int]:
    """How much of a prompt and of its answer is kept where both together are too long.

    A short side is kept whole as far as possible, and two long ones are shortened in proportion, as LLaMA-Factory does it
    with its ``cutoff_len``, so that figures compare.

    Args:
        source: tokens of the prompt.
        target: tokens of the answer.
        cutoff: tokens that both may have together.

    Returns:
        Tokens of the prompt and of the answer that are kept.

    >>> truncated_lengths(3000, 2000, 1000), truncated_lengths(100, 1000, 1000)
    ((600, 400), (100, 900))
    """
    if 2 * target < cutoff:
        most = cutoff
    elif 2 * source < cutoff:
        most = cutoff - source
    else:
        most = cutoff * target // (source + target)
    target = min(target, most)
    return min(source, cutoff - target), target


def truncate(tokens: int, turns: Sequence[Span], capacity: int, *, tail: bool, last_first: bool) -> np.ndarray:
    """Which tokens of a conversation are kept in a row: of each turn a part, as long as there is room.

    Args:
        tokens: length of the conversation.
        turns: [start, end) of each assistant turn, in tokens; what lies between two is the prompt of the second.
        capacity: tokens that a row holds.
        tail: keep the end of a prompt and not its beginning. Of answers the beginning is always kept.
        last_first: let the last turns have room first, as only they are trained on.

    Returns:
        Indices of the tokens that are kept, in order.
    """
    starts = [0, *(end for _, end in turns[:-1])]
    pairs = [(before, start, end) for before, (start, end) in zip(starts, turns, strict=True)]
    kept: list[np.ndarray] = []
    room = capacity
    for before, start, end in reversed(pairs) if last_first else pairs:
        if room <= 0:
            break
        source, target = truncated_lengths(start - before, end - start, room)
        prompt = np.arange(start - source, start) if tail else np.arange(before, before + source)
        kept.append(np.concatenate([prompt, np.arange(start, start + target)]))
        room -= source + target
    return np.sort(np.concatenate(kept)) if kept else np.arange(min(tokens, capacity))


def split(tokens: int, capacity: int) -> list[Span]:
    """Pieces of at most ``capacity`` tokens; each begins with the last token of the one before, so that every token but the
    first is predicted once.

    >>> split(10, 4)
    [(0, 4), (3, 7), (6, 10)]
    """
    return [(start, min(start + capacity, tokens)) for start in range(0, max(1, tokens - 1), capacity - 1)]
