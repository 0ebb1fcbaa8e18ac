"""Slices of rows: together they are the rows, with what each token is to predict."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from raysft.data.types import IGNORE_INDEX
from raysft.train.sequence_group import SequenceGroup
from raysft.train.step import microbatches
from raysft.train.step_rows import with_targets


def batch() -> dict[str, np.ndarray]:
    """Three rows of 22 tokens: two examples and padding, one example, a filler."""
    positions = np.stack([[*range(9), *range(8), *range(5)], range(22), range(22)])
    draw = np.random.default_rng(0)
    ids = draw.integers(3, 90, (3, 22))
    labels = np.where(positions > 2, ids, IGNORE_INDEX)
    labels[0, 17:] = labels[2] = IGNORE_INDEX
    weights, sources = draw.random((3, 22)).astype(np.float32), draw.integers(0, 2, (3, 22))
    return {"row": np.array([4, 5, -1]), "tokens": np.array([17, 22, 0]), "input_ids": ids, "labels": labels,
            "position_ids": positions, "weights": weights, "sources": sources}  # fmt: skip


@pytest.mark.parametrize("size", [2, 3, 4])
def test_slices_are_the_rows(size):
    whole, cpu = with_targets(batch()), torch.device("cpu")
    made = [next(iter(microbatches(batch(), 3, cpu, group=SequenceGroup(size, place)))) for place in range(size)]
    examples = [each.pop("examples") for each in made]
    parts = [each.part for each in examples]
    (width,) = {each["input_ids"].shape[1] for each in made}
    assert width % 8 == 0
    assert [(part.start, part.stop) for part in parts] == [(n * width, (n + 1) * width) for n in range(size)]
    missing = size * width - 66
    (lengths,) = {each.lengths for each in examples}
    assert lengths == (9, 8, 5, 22, 22, *([missing] if missing else []))
    for name in ("input_ids", "position_ids", "targets", "weights", "sources"):
        joined = np.concatenate([each[name].numpy()[0] for each in made])
        assert np.array_equal(joined[:66], whole[name].reshape(-1)), name
    ends = np.concatenate([each["targets"].numpy()[0] for each in made])[66:]
    assert (ends == IGNORE_INDEX).all()
    found = torch.cat([each.lengths_of_tokens[0] for each in examples])[:66]
    assert found.tolist() == [9] * 9 + [8] * 8 + [5] * 5 + [22] * 44


def test_each_token_has_the_label_weight_and_source_of_the_next():
    given, made = batch(), with_targets(batch())
    assert made.keys() == given.keys() - {"labels"} | {"targets"}
    assert np.array_equal(made["targets"][:, :-1], given["labels"][:, 1:])
    assert (made["targets"][:, -1] == IGNORE_INDEX).all()
    for name in ("weights", "sources"):
        assert np.array_equal(made[name][:, :-1], given[name][:, 1:])
