"""Some of a source's records, drawn at random."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np

from raysft.data.sources.readers import RawRecord

LocatedRecord = tuple[str, int, RawRecord]
"""(``file:position``, bytes about, record)."""


@dataclass(frozen=True)
class RandomSample:
    """``count`` records of a source, by ``seed``."""

    count: int
    seed: int

    def select(self, read: Callable[[], Iterator[LocatedRecord]], limit: int | None = None) -> Iterator[LocatedRecord]:
        """The records that are drawn, in the order of their files; one that is drawn again has a place of its own.

        They are read twice, since how many there are decides what is drawn.

        Args:
            read: gives all records, each time that it is called.
            limit: take only the first of those that are drawn.
        """
        times = self.repeats(sum(1 for _ in read()), limit)
        for (where, size, raw), number in zip(read(), times, strict=True):
            for again in range(number):
                yield f"{where}#{again + 1}" if again else where, size, raw

    def repeats(self, records: int, limit: int | None = None) -> np.ndarray:
        """[records] How often each record is drawn: numpy's legacy generator, so that it is what LLaMA-Factory draws.

        >>> RandomSample(5, seed=0).repeats(3).sum(), RandomSample(2, seed=0).repeats(3).tolist()
        (np.int64(5), [0, 1, 1])
        """
        random = np.random.RandomState(self.seed)
        drawn = random.permutation(records)[: self.count]
        if records and len(drawn) < self.count:
            drawn = np.concatenate([drawn, random.choice(records, self.count - len(drawn))])
        return np.bincount(drawn[:limit], minlength=records)
