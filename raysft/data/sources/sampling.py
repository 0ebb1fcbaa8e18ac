"""Choose records of a source: a slice of them, and a random sample."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice

import numpy as np

from raysft.data.sources.readers import RawRecord

LocatedRecord = tuple[str, int, RawRecord]
"""(location as ``file:position``, approximate bytes, record)."""


@dataclass(frozen=True)
class RecordSlice:
    """The records between two places in their order, as ``datasets`` writes them: ``:1000``, ``10%:20%``, ``-100:``."""

    start: str
    stop: str

    @classmethod
    def of(cls, text: str) -> RecordSlice:
        """Read a slice as the config has it."""
        start, _, stop = text.partition(":")
        return cls(start, stop)

    def select(self, read: Callable[[], Iterator[LocatedRecord]], limit: int | None = None) -> Iterator[LocatedRecord]:
        """Yield the records of the slice; arguments as ``RandomSample.select``."""
        places = (self.start, self.stop)
        in_percent = any("%" in place for place in places)
        # Records are counted only where a place depends on their number.
        records = sum(1 for _ in read()) if in_percent or any("-" in place for place in places) else 0
        start = _place(self.start, in_percent, records) if self.start else 0
        stop = max(start, _place(self.stop, in_percent, records)) if self.stop else None
        return islice(islice(read(), start, stop), limit)


def _place(text: str, in_percent: bool, records: int) -> int:
    """Convert a place to a number of records, as ``datasets`` does: percentages are rounded to the closest one.

    >>> [_place(text, "%" in text, 15) for text in ("3", "-4", "10%", "-50%", "-1%", "-99")]
    [3, 11, 2, 7, 0, 0]
    """
    number = int(text.rstrip("%"))
    number = round(number * records / 100) if in_percent else min(number, sys.maxsize)
    return max(0, records + number) if number < 0 else number


@dataclass(frozen=True)
class RandomSample:
    """A random sample of ``count`` records."""

    count: int
    seed: int
    part: RecordSlice | None = None
    """Draw from this slice of the records. Default: from all."""

    def select(self, read: Callable[[], Iterator[LocatedRecord]], limit: int | None = None) -> Iterator[LocatedRecord]:
        """Yield the sampled records in file order; repetitions get distinct locations (``file:position#2``).

        Records are read twice, as their number decides which are drawn.

        Args:
            read: returns an iterator over all records, each time it is called.
            limit: use only the first records drawn.
        """
        part = self.part
        drawn_from = read if part is None else lambda: part.select(read)
        repeats = self.repeats(sum(1 for _ in drawn_from()), limit)
        for (location, size, raw), number in zip(drawn_from(), repeats, strict=True):
            for repeat in range(number):
                yield f"{location}#{repeat + 1}" if repeat else location, size, raw

    def repeats(self, records: int, limit: int | None = None) -> np.ndarray:
        """[records] number of times that each record is drawn.

        A source with fewer than ``count`` records is used completely, and filled up with repetitions. numpy's legacy generator
        draws the same records as LLaMA-Factory does for its first source.

        >>> RandomSample(5, seed=0).repeats(3).sum(), RandomSample(2, seed=0).repeats(3).tolist()
        (np.int64(5), [0, 1, 1])
        """
        random = np.random.RandomState(self.seed)
        drawn = random.permutation(records)[: self.count]
        if records and len(drawn) < self.count:
            drawn = np.concatenate([drawn, random.choice(records, self.count - len(drawn))])
        return np.bincount(drawn[:limit], minlength=records)
