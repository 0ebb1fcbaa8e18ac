"""Truncation and splitting of examples that are longer than a row."""

from __future__ import annotations

import numpy as np
import pytest

from raysft.data.tokenization.overflow import fit_to_row
from raysft.data.tokenization.tokenized_example import Overflow, TokenizedExample
from raysft.data.tokenization.truncation import split, truncate, truncated_lengths
from raysft.data.types import IGNORE_INDEX, TokenizedMedium
from tests.shards import tokenize_options


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


def with_images(random: np.random.Generator, largest: int) -> tuple[TokenizedExample, list[tuple[int, int]]]:
    """An example of some turns with images of some tokens, and its turns; each of its tokens is another one."""
    size, turns, images = 0, [], []
    labelled: list[bool] = []
    for number in range(2 * int(random.integers(1, 5))):
        start = size
        for _ in range(random.integers(0, 5)):
            tokens = int(random.integers(1, largest if (image := random.random() < 0.5) else 12))
            if image:
                images.append((size, size + tokens))
            labelled += tokens * [bool(number % 2) and not image]
            size += tokens
        size += 1
        labelled.append(bool(number % 2))
        if number % 2:
            turns.append((start, size))
    ids = np.arange(size, dtype=np.int32)
    media = tuple(TokenizedMedium("image", f"{start}.png", "", 1, 1, start, stop) for start, stop in images)
    labels = np.where(labelled, ids, IGNORE_INDEX).astype(np.int32)
    return TokenizedExample("s", "f:1", ids, labels, media=media), turns


def assert_whole(example: TokenizedExample, pieces: list[TokenizedExample]) -> None:
    """Each image of a piece has all its tokens, in place; of an image that is not there, no token is."""
    for piece in pieces:
        assert (np.diff(piece.input_ids) > 0).all()
        kept = {f"{medium.location}": medium for medium in piece.media}
        assert list(kept) == [medium.location for medium in example.media if medium.location in kept]
        for medium in example.media:
            tokens = list(range(medium.start, medium.stop))
            if there := kept.get(medium.location):
                assert piece.input_ids[there.start : there.stop].tolist() == tokens
            else:
                assert not set(tokens).intersection(piece.input_ids.tolist())


@pytest.mark.parametrize("keep_prompt", ["head", "tail"])
@pytest.mark.parametrize("mask_history", [False, True])
@pytest.mark.parametrize("seed", range(40))
def test_truncation_leaves_images_whole_or_out(seed, mask_history, keep_prompt):
    random = np.random.default_rng(seed)
    capacity = int(random.integers(20, 120))
    example, turns = with_images(random, capacity)
    options = tokenize_options(
        sequence_length=capacity, on_overflow="truncate", keep_prompt=keep_prompt, mask_history=mask_history
    )
    for piece in fit_to_row(example, turns, options):
        if not isinstance(piece, TokenizedExample):
            continue  # nothing of an answer is left
        assert len(piece.input_ids) <= capacity
        assert_whole(example, [piece])
        counts = dict(piece.counts)
        assert counts.get("truncated_media", 0) == len(example.media) - len(piece.media)
        assert counts.get("truncated_tokens", 0) == len(example.input_ids) - len(piece.input_ids)
        assert piece.labels.tolist() == example.labels[piece.input_ids].tolist()


def test_what_follows_an_image_that_is_left_out_takes_its_room():
    kept = truncate(100, [(90, 100)], 50, [(5, 60)], tail=False, last_first=False)
    assert kept.tolist() == [*range(5), *range(60, 100)]
    kept = truncate(100, [(90, 100)], 50, [(40, 89)], tail=True, last_first=False)
    assert kept.tolist() == [*range(1, 40), 89, *range(90, 100)]


@pytest.mark.parametrize("seed", range(100))
def test_pieces_of_a_split_have_whole_images_and_predict_each_label_once(seed):
    random = np.random.default_rng(seed)
    capacity = int(random.integers(8, 60))
    example, turns = with_images(random, capacity)
    pieces = list(fit_to_row(example, turns, tokenize_options(sequence_length=capacity, on_overflow="split")))
    assert all(isinstance(piece, TokenizedExample) and len(piece.input_ids) <= capacity for piece in pieces)
    found: list[TokenizedExample] = pieces  # type: ignore[assignment]
    assert_whole(example, found)
    predicted = [label for piece in found for label in piece.labels[1:].tolist() if label != IGNORE_INDEX]
    assert predicted == [label for label in example.labels[1:].tolist() if label != IGNORE_INDEX]
    places = [medium.location for piece in found for medium in piece.media]
    assert len(places) == len(set(places))
    lost = sum(dict(piece.counts).get("truncated_media", 0) for piece in found)
    assert lost == (len(example.media) - len(places) if len(example.input_ids) > capacity else 0)


@pytest.mark.parametrize("on_overflow", ["truncate", "split", "drop", "error"])
def test_an_image_that_is_longer_than_a_row_leaves_its_record_out(on_overflow):
    ids = np.arange(60, dtype=np.int32)
    media = (TokenizedMedium("image", "a.png", "", 1, 1, 5, 40),)
    example = TokenizedExample("s", "f:1", ids, np.where(ids > 45, ids, IGNORE_INDEX), media=media)
    (found,) = fit_to_row(example, [(45, 60)], tokenize_options(sequence_length=34, on_overflow=on_overflow))
    assert isinstance(found, Overflow)
    assert found.tokens == 60
    if on_overflow in ("truncate", "split"):
        assert found.rejected.reason.startswith("a.png: its 35 tokens do not fit into data.sequence_length=34")
