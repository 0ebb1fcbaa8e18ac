"""Truncation and splitting of examples that are longer than a row."""

from __future__ import annotations

import numpy as np
import pytest

from raysft.data.tokenization.truncation import split, truncate, truncated_lengths


@pytest.mark.parametrize(
    ("source", "target", "kept"),
    [
        (3000, 2000, (600, 400)),
        (2000, 3000, (400, 600)),
        (1000, 100, (900, 100)),
        (100, 1000, (100, 900)),
        (100, 500, (100, 500)),
        (500, 100, (500, 100)),
        (10, 10, (10, 10)),
    ],
)
def test_prompt_and_answer_are_shortened_as_llama_factory_does_it(source, target, kept):
    assert truncated_lengths(source, target, 1000) == kept


def test_one_turn_keeps_the_head_or_the_tail_of_its_prompt_and_the_head_of_its_answer():
    turns = [(3000, 5000)]
    head = truncate(5000, turns, 1000, tail=False, last_first=False)
    tail = truncate(5000, turns, 1000, tail=True, last_first=False)
    assert head.tolist() == [*range(600), *range(3000, 3400)]
    assert tail.tolist() == [*range(2400, 3000), *range(3000, 3400)]


@pytest.mark.parametrize("tail", [False, True])
@pytest.mark.parametrize("last_first", [False, True])
@pytest.mark.parametrize("seed", range(20))
def test_kept_tokens_fit_and_are_in_order_and_the_first_side_is_served_first(seed, last_first, tail):
    random = np.random.default_rng(seed)
    borders = np.sort(random.choice(np.arange(1, 400), 2 * random.integers(1, 6), replace=False))
    turns = [tuple(pair) for pair in borders.reshape(-1, 2).tolist()]
    tokens, capacity = int(borders[-1]) + 5, int(random.integers(10, 300))
    kept = truncate(tokens, turns, capacity, tail=tail, last_first=last_first)
    assert len(kept) <= capacity
    assert (np.diff(kept) > 0).all()
    assert kept.min() >= 0
    assert kept.max() < tokens
    start, end = turns[-1] if last_first else turns[0]
    first = [token for token in kept.tolist() if start <= token < end]
    before = turns[-2][1] if last_first and len(turns) > 1 else 0
    assert len(first) == truncated_lengths(start - before, end - start, capacity)[1]
    assert first == list(range(start, start + len(first)))


def test_turns_that_do_not_fit_are_left_out():
    kept = truncate(100, [(10, 50), (60, 100)], 50, tail=False, last_first=False)
    assert kept.tolist() == list(range(50))
    assert truncate(100, [(10, 50), (60, 100)], 50, tail=False, last_first=True).tolist() == list(range(50, 100))


@pytest.mark.parametrize(("tokens", "capacity"), [(2, 8), (8, 8), (9, 8), (100, 8), (15, 8), (16, 8), (1, 8)])
def test_pieces_of_a_split_predict_each_token_but_the_first_once(tokens, capacity):
    pieces = split(tokens, capacity)
    assert all(0 < stop - start <= capacity for start, stop in pieces)
    assert [token for start, stop in pieces for token in range(start + 1, stop)] == list(range(1, tokens))
