"""Draw random samples of a source's records."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np

from raysft.data.sources.readers import RawRecord

LocatedRecord = tuple[str, int, RawRecord]
"""(location as ``file:position``, approximate bytes, record)."""


@dataclass(frozen=True)
class RandomSample:
    """A random sample of ``count`` records."""

    count: int
    seed: int

    def select(self, read: Callable[[], Iterator[LocatedRecord]], limit: int | None = None) -> Iterator[LocatedRecord]:
        """Yield the sampled records in file order; repetitions get distinct locations (``file:position#2``).

        Records are read twice, as their number decides which are drawn.

        Args:
            read: returns an iterator over all records, each time it is called.
            limit: use only the first records drawn.
        """
        repeats = self.repeats(sum(1 for _ in read()), limit)
        for (location, size, raw), number in zip(read(), repeats, strict=True):
            for repeat in range(number):
                yield f"{location}#{repeat + 1}" if repeat else location, size, raw

    def repeats(self, records: int, limit: int | None = None) -> np.ndarray:
        """[records] number of times that each record is drawn.

        A source with fewer than ``count`` records is used completely, and filled up with repetitions. numpy's legacy generator
        draws the same records as LLaMA-Factory.

        >>> RandomSample(5, seed=0).repeats(3).sum(), RandomSample(2, seed=0).repeats(3).tolist()
        (np.int64(5), [0, 1, 1])
        """
        random = np.random.RandomState(self.seed)
        drawn = random.permutation(records)[: self.count]
        if records and len(drawn) < self.count:
            drawn = np.concatenate([drawn, random.choice(records, self.count - len(drawn))])
        return np.bincount(drawn[:limit], minlength=records)
