"""The longest common subsequence against the table of its definition."""

from __future__ import annotations

import itertools
import random

from raysft.subsequence import common_length, common_pairs


def test_pairs_are_a_longest_common_subsequence():
    chance = random.Random(0)
    for _ in range(100):
        left, right = (chance.choices("abcd", k=chance.randrange(12)) for _ in range(2))
        table = [[0] * (len(right) + 1) for _ in range(len(left) + 1)]
        for i, j in itertools.product(range(len(left)), range(len(right))):
            both = table[i][j] + 1 if left[i] == right[j] else 0
            table[i + 1][j + 1] = max(both, table[i][j + 1], table[i + 1][j])
        pairs = common_pairs(left, right)
        assert all(left[i] == right[j] for i, j in pairs)
        assert pairs == sorted(set(pairs), reverse=True)
        assert all(a > c and b > d for (a, b), (c, d) in itertools.pairwise(pairs))
        assert len(pairs) == common_length(left, right) == table[-1][-1]
