"""Workers whose rows differ in all that rows can differ in make the same collectives, and train as one worker does."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from raysft.config import Config
from raysft.data.stream import Batch, Rows
from raysft.records import IGNORED
from tests.shards import the_set, write_records, written
from tests.tiny import tiny_model
from tests.training import Case, Result, assert_same, make_config, train_all

CAPACITY = 96
CHUNK_TOKENS = 16
"""So that a row takes from one to six chunks."""
SHARED_OUT = {"zero_optimization": {"stage3_param_persistence_threshold": 0}}
"""With ZeRO-3 also what is small."""
WAYS: dict[str, dict[str, Any]] = {
    "nothing shared out": {"zero_stage": 0},
    "optimizer states": {"zero_stage": 1},
    "gradients": {"zero_stage": 2},
    "weights": {"zero_stage": 3},
    "weights, row by row": {"zero_stage": 3, "rows_per_device": 1},
    "weights, activations computed twice": {"zero_stage": 3, "gradient_checkpointing": True},
}


class SomeUnlabelled(Rows):
    """Rows of which the last worker's have no label in the first step."""

    def batch(self, rows):
        made: Batch = super().batch(rows)
        made["labels"][np.isin(made["row"], (2, 3))] = IGNORED
        return made


def examples(count: int, seed: int) -> list[dict[str, Any]]:
    """Short and long ones in turn, trained on from some token on, with weights."""
    draw = random.Random(seed)
    made = []
    for index in range(count):
        ids = [draw.randrange(3, 390) for _ in range(draw.randint(8, 20) if index % 2 else draw.randint(80, CAPACITY))]
        trained = draw.randrange(1, len(ids))
        labels = [IGNORED] * trained + ids[trained:]
        made.append({"input_ids": ids, "labels": labels, "weight": draw.choice([0.5, 1.0, 3.0])})
    return made


@pytest.fixture(scope="module")
def prepared(tmp_path_factory) -> tuple[Path, Path, Rows, Rows]:
    """(folder, model, training rows, evaluation rows); the last step of both leaves a worker with fillers alone."""
    folder = tmp_path_factory.mktemp("collectives")
    model = tiny_model(folder / "model")
    manifests = []
    for name, count in (("d", 7), ("e", 3), ("f", 5)):
        write_records(folder / f"{name}.jsonl", examples(count, seed=count))
        source = {"name": name, "path": str(folder / f"{name}.jsonl")}
        config = make_config(folder, model, {"data.train": [source]})
        manifests.append(written(the_set(config, str(model)), str(model)).directory)
    paths = [f"{directory}/manifest.parquet" for directory in manifests]
    train_rows = SomeUnlabelled(tuple(paths[:2]), CAPACITY, 4, seed=3, layout="single")
    eval_rows = Rows((paths[2],), CAPACITY, 4, layout="single", shuffle=False)
    assert [each.schedule.rows for each in (train_rows, eval_rows)] == [10, 5]
    return folder, model, train_rows, eval_rows


def case(prepared: tuple[Path, Path, Rows, Rows], way: dict[str, Any], **more: Any) -> Case:
    folder, model, train_rows, eval_rows = prepared
    settings = {
        "data.packing": False,
        "data.eval": [{"name": "f", "path": str(folder / "f.jsonl")}],
        "train.max_steps": None,
        "train.eval_every_steps": 1,
        "train.keep_best": True,
        "train.deepspeed": SHARED_OUT,
    }
    config: Config = make_config(folder, model, settings, **{"rows_per_device": 2, **way, **more})
    return Case(config, train_rows, eval_rows=eval_rows, chunk_tokens=CHUNK_TOKENS)


def test_workers_whose_rows_differ_train_as_one_worker_does(prepared):
    (one,) = train_all([case(prepared, {"zero_stage": 0, "rows_per_device": 4})])
    two = train_all([case(prepared, way) for way in WAYS.values()], world=2)
    assert len(one.losses) == 3
    for name, result in zip(WAYS, two, strict=True):
        compare(name, one, result)


def compare(name: str, one: Result, other: Result) -> None:
    try:
        assert_same(one[:4], other[:4])
    except AssertionError as error:
        raise AssertionError(f"shared out: {name}") from error
