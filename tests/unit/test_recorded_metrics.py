"""Scores are those that earlier versions computed with all predictions in memory."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from raysft.generate import metrics
from raysft.generate.metrics import blocks
from tests.unit.test_metrics import PAIRS, config, rows

RECORDED = Path(__file__).with_name("recorded_metrics.json")
"""[metric, source, value, low, high] of each row, by the code before it took predictions one at a time."""


@pytest.mark.parametrize("sizes", [(500, 100), (7, 3)])
def test_scores_of_a_stream_are_those_of_earlier_versions(monkeypatch, sizes):
    monkeypatch.setattr(blocks, "PARALLEL_FROM", sizes[0])
    monkeypatch.setattr(blocks, "_BLOCK", sizes[1])
    predictions = [*rows(PAIRS * 60, sources=("x", "y")), *rows(PAIRS[:7], sources=("z",))]
    scored = metrics.score(config(metrics=list(metrics.BUILTIN_METRICS)), iter(predictions))
    recorded = {(metric, source): numbers for metric, source, *numbers in json.loads(RECORDED.read_text())}
    assert [(row.metric, row.source) for row in scored] == list(recorded)
    for row in scored:
        value, *ends = recorded[row.metric, row.source]
        assert row.value == value
        # Sums of resamples are matrix products, whose last digit is the processor's affair.
        assert [row.low, row.high] == (ends if ends[0] is None else pytest.approx(ends, abs=1.01e-4))


def test_blocks_hold_every_example_once_and_grow_with_their_number(monkeypatch):
    monkeypatch.setattr(blocks, "_LARGEST", 300)
    texts = [(f"p{number}", f"l{number}") for number in range(9000)]
    made = list(blocks._blocks(iter(texts)))
    assert [each for block in made for each in block] == texts
    sizes = list(map(len, made))[:-1]
    assert sizes[0] == 500
    assert sizes[1:] == sorted(sizes[1:])
    assert (min(sizes), max(sizes[1:])) == (100, 300)
