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


def truncate(tokens: int, turns: Sequence[Span], capacity: int, *, tail: bool, last_first: bool) -> np.ndarray:
    """Choose the tokens of a conversation to keep: a part of each turn, until the row is full.

    Args:
        tokens: length of the conversation.
        turns: [start, end) in tokens of each assistant turn; what precedes a turn, back to the turn before, is its prompt.
        capacity: tokens in a row.
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
        prompt = np.arange(start - source, start) if tail else np.arange(prompt_start, prompt_start + source)
        kept.append(np.concatenate([prompt, np.arange(start, start + target)]))
        available -= source + target
    return np.sort(np.concatenate(kept)) if kept else np.arange(min(tokens, capacity))


def split(tokens: int, capacity: int) -> list[Span]:
    """Cut a sequence into pieces of at most ``capacity`` tokens.

    Each piece begins with the last token of the piece before, so that every token but the first is predicted once.

    >>> split(10, 4)
    [(0, 4), (3, 7), (6, 10)]
    """
    return [(start, min(start + capacity, tokens)) for start in range(0, max(1, tokens - 1), capacity - 1)]
