"""Where the examples of a microbatch lie: found before its rows are on the device, which would otherwise have to be asked."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import Any

import numpy as np
import torch


@dataclass(frozen=True)
class Slice:
    """The part of some rows that a worker computes, all rows one after another."""

    processes: Any
    """Process group of the workers that have the other parts."""
    workers: int
    """Their number, with this one."""
    start: int
    """The first token of the part."""
    stop: int
    """The token after the last."""


@dataclass(frozen=True)
class Examples:
    """The examples of some rows, one after another."""

    lengths: tuple[int, ...]
    """Tokens of each; padding counts as one."""
    several: bool
    """True if a row has more than one."""
    bounds: torch.Tensor
    """[examples + 1] int32: where each begins, and the last one ends."""
    lengths_of_tokens: torch.Tensor
    """[rows, tokens] tokens of the example that each token is of; [1, tokens of the part] of a part."""
    part: Slice | None = None
    """If other workers have other tokens of the rows: which of them are here."""

    @classmethod
    def of_rows(cls, positions: np.ndarray) -> Examples:
        """Find the examples of whole rows.

        >>> found = Examples.of_rows(np.array([[0, 1, 2, 0], [0, 1, 0, 1]]))
        >>> found.lengths, found.bounds.tolist(), found.several
        ((3, 1, 2, 2), [0, 3, 4, 6, 8], True)
        >>> found.lengths_of_tokens.tolist()
        [[3, 3, 3, 1], [2, 2, 2, 2]]

        Args:
            positions: [rows, tokens], starting at 0 in each example, and where padding begins.
        """
        lengths = example_lengths(positions)
        of_tokens = np.repeat(lengths, lengths).reshape(positions.shape)
        return cls._of(lengths.tolist(), len(lengths) > len(positions), of_tokens)

    @classmethod
    def of_part(cls, lengths: Sequence[int], part: Slice) -> Examples:
        """Say where examples of some lengths lie, of whose tokens a part is here."""
        return cls._of(lengths, len(lengths) > 1, np.repeat(lengths, lengths)[None, part.start : part.stop], part)

    @classmethod
    def _of(cls, lengths: Sequence[int], several: bool, of_tokens: np.ndarray, part: Slice | None = None) -> Examples:
        bounds = torch.tensor([0, *accumulate(lengths)], dtype=torch.int32)
        return cls(tuple(lengths), several, bounds, torch.as_tensor(of_tokens, dtype=torch.long), part)

    def with_tensors(self, change: Callable[[torch.Tensor], torch.Tensor]) -> Examples:
        """Return the same with other tensors, such as copies on a device."""
        return replace(self, bounds=change(self.bounds), lengths_of_tokens=change(self.lengths_of_tokens))


def example_lengths(positions: np.ndarray) -> np.ndarray:
    """Return how many tokens each example of some rows has, one row after the other; padding counts as an example.

    >>> example_lengths(np.array([[0, 1, 2, 0], [4, 5, 0, 1]])).tolist()
    [3, 1, 2, 2]

    Args:
        positions: [rows, tokens], starting at 0 in each example, and where padding begins. Each row begins with an example,
            regardless of its first position.
    """
    begins = positions == 0
    begins[:, 0] = True
    return np.diff(np.append(np.flatnonzero(begins), positions.size))


class _Current:
    """What is computed now. It stays until the next forward pass, for layers that are computed again in the backward pass, which
    may run in another thread."""

    examples: Examples | None = None
    positions: torch.Tensor | None = None


def begin(examples: Examples | None, positions: torch.Tensor | None = None) -> None:
    """Say what the forward pass that follows computes.

    Args:
        examples: of its rows; None: all their tokens are here, and nothing is known of them.
        positions: [rows, tokens], or planes of them of which the first one tells examples apart, as the model is given them. They
            are kept until the next pass, so that no other tensor can lie in their memory.
    """
    _Current.examples, _Current.positions = examples, positions


def current() -> Examples | None:
    """Return what ``begin`` was told."""
    return _Current.examples


def known_lengths(positions: torch.Tensor) -> list[int] | None:
    """Return the tokens of each example of whole rows; None if ``begin`` was not told of the rows that have these positions.

    Numbers of an earlier pass are never taken: that they fit is seen from where the positions lie, not from how many they are.
    """
    examples, told = _Current.examples, _Current.positions
    if examples is None or examples.part is not None or told is None or told.device != positions.device:
        return None
    same = told.data_ptr() == positions.data_ptr() and told.dtype == positions.dtype
    return list(examples.lengths) if same and sum(examples.lengths) == positions.numel() else None
