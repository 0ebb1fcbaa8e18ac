"""Workers that share each row train as one worker with whole rows does (``scaling.sequence_parallel``)."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest

from raysft.data.rows.collate import Batch
from raysft.data.rows.packed_dataset import PackedDataset
from raysft.data.types import IGNORE_INDEX
from raysft.telemetry.events import StepRecord
from tests.invariants.test_collectives import MIXTURES, PARTITION_ALL
from tests.shards import the_set, write_records, written
from tests.tiny import tiny_mixture, tiny_model
from tests.training import Case, Result, assert_same, make_config, train_all

CAPACITY, HALF = 96, 48
LORA = {"finetuning": "lora"}
WAYS: list[tuple[str, int, int, dict[str, Any]]] = [
    ("llama", 2, 2, {"zero_stage": 0, "loss": "asft"}),
    ("llama", 2, 2, {"zero_stage": 1, "loss": "dft", "micro_batch_size": 1}),
    ("llama", 2, 2, {"zero_stage": 2, "z_loss": 1e-3, "label_smoothing": 0.1, **LORA}),
    ("llama", 2, 2, {"zero_stage": 3, "gradient_checkpointing": True}),
    ("one key head", 2, 2, {"zero_stage": 0, "loss": "eaft"}),
    ("deepseek_v3", 2, 2, {"zero_stage": 3, **LORA}),
    ("qwen3_moe", 2, 2, {"zero_stage": 1}),
    ("llama", 4, 2, {"zero_stage": 0, "gradient_checkpointing": True}),
    ("qwen3_moe", 4, 2, {"zero_stage": 3, "micro_batch_size": 1}),
    ("llama", 4, 4, {"zero_stage": 2}),
]
"""(model, workers, of which so many share each row, settings), compared with one worker. The models have 4 query heads and 2 key
heads, unless the name says otherwise."""

MORE = {"deepseek_v3": {"num_key_value_heads": 4}}
"""As all of its models have it: it expands keys for all heads."""


class LabelsInOneSlice(PackedDataset):
    """Of the first rows, one has labels in its first half alone, one in its second half, and one has none."""

    def batch(self, rows):
        made: Batch = super().batch(rows)
        for row, masked in ((0, slice(HALF, None)), (1, slice(0, HALF)), (2, slice(None))):
            made["labels"][made["row"] == row, masked] = IGNORE_INDEX
        return made


def examples(count: int, seed: int) -> list[dict[str, Any]]:
    """Make examples of a few tokens to nearly a row, with labels from some token on, and weights."""
    draw = random.Random(seed)
    made = []
    for _ in range(count):
        ids = [draw.randrange(3, 390) for _ in range(draw.randint(5, 88))]
        trained = draw.randrange(1, len(ids))
        labels = [IGNORE_INDEX] * trained + ids[trained:]
        made.append({"input_ids": ids, "labels": labels, "weight": draw.choice([0.5, 1.0, 3.0])})
    return made


class Prepared:
    """Models, and rows of two sources with weights; in the last step, some workers have fillers alone."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        tiny_model(folder / "llama")
        tiny_mixture(folder / "one key head", "llama", num_key_value_heads=1)
        for model_type, settings in MIXTURES.items():
            tiny_mixture(folder / model_type, model_type, **{**settings, **MORE.get(model_type, {})})
        paths = []
        for name, count in (("d", 13), ("e", 8), ("f", 9)):
            write_records(folder / f"{name}.jsonl", examples(count, seed=count))
            source = {"name": name, "path": str(folder / f"{name}.jsonl")}
            config = make_config(folder, folder / "llama", {"data.train": [source]})
            model = str(folder / "llama")
            paths.append(f"{written(the_set(config, model), model).directory}/manifest.parquet")
        self.rows = LabelsInOneSlice(tuple(paths[:2]), CAPACITY, 4, seed=3)
        self.eval_rows = PackedDataset((paths[2],), CAPACITY, 4, shuffle=False)

    def case(self, model: str, share: int = 1, **settings: Any) -> Case:
        way = {
            "data.eval": [{"name": "f", "path": str(self.folder / "f.jsonl")}],
            "train.max_steps": None,
            "train.eval_every_steps": 2,
            "train.deepspeed": PARTITION_ALL,
            "scaling.sequence_parallel": share,
            "scaling.num_workers": share,
        }
        own = {key: settings.pop(key) for key in list(settings) if "." in key}
        config = make_config(self.folder, self.folder / model, {**way, **own}, **{"micro_batch_size": 2, **settings})
        return Case(config, self.rows, eval_rows=self.eval_rows, chunk_tokens=16)


@pytest.fixture(scope="module")
def prepared(tmp_path_factory) -> Prepared:
    return Prepared(tmp_path_factory.mktemp("sequence"))


ALONE = {"zero_stage": 0, "micro_batch_size": 4, "gradient_checkpointing": False}


@pytest.fixture(scope="module")
def trained(prepared) -> list[tuple[Result, Result]]:
    """For each way: the results of one worker, and of those that share rows."""
    alone = [prepared.case(model, **{**settings, **ALONE}) for model, _, _, settings in WAYS]
    known, shared = train_all(alone), {}
    for world in (2, 4):
        ways = [number for number, way in enumerate(WAYS) if way[1] == world]
        cases = [prepared.case(WAYS[number][0], WAYS[number][2], **WAYS[number][3]) for number in ways]
        shared |= dict(zip(ways, train_all(cases, world), strict=True))
    return [(one, shared[number]) for number, one in enumerate(known)]


def test_rows_are_what_the_ways_must_get_right(prepared):
    plan = prepared.rows.row_plan
    assert plan.rows % 4 in (1, 2), "no worker has fillers alone"
    batch = prepared.rows.batch(range(plan.rows))
    crossing = batch["position_ids"][:, HALF] > 0
    assert crossing.sum() > 2, "no example crosses the seam"
    assert len({*batch["sources"].reshape(-1).tolist()}) == 2
    assert len({*batch["weights"].reshape(-1).tolist()}) > 2


@pytest.mark.parametrize("way", range(len(WAYS)), ids=[f"{way[0]}, {way[1]} by {way[2]}, {way[3]}" for way in WAYS])
def test_workers_that_share_rows_train_as_one_worker_does(trained, way):
    one, shared = trained[way]
    assert (one.failure, shared.failure) == ("", "")
    assert len(one.losses) > 2
    assert_same(one[:4], shared[:4])
    ours, theirs = ([e for e in result.events if isinstance(e, StepRecord)] for result in (shared, one))
    for name in ("total_tokens", "loss_tokens", "rows", "packing_efficiency"):
        assert [getattr(e, name) for e in ours] == [getattr(e, name) for e in theirs], name
    for mine, other in zip(ours, theirs, strict=True):
        assert mine.source_losses == pytest.approx(other.source_losses, rel=1e-5)
