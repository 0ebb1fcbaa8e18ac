"""Workers whose rows differ in every possible way make the same collectives, and train as one worker does."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from raysft.config import Config
from raysft.data.rows.collate import Batch
from raysft.data.rows.packed_dataset import PackedDataset
from raysft.data.types import IGNORE_INDEX
from tests.shards import the_set, write_records, written
from tests.tiny import tiny_mixture, tiny_model
from tests.training import Case, Result, assert_same, make_config, train_all

CAPACITY = 96
CHUNK_TOKENS = 16
"""Makes one to six chunks of a row."""
PARTITION_ALL = {"zero_optimization": {"stage3_param_persistence_threshold": 0}}
"""With ZeRO-3, small parameters are partitioned too."""
MIXTURES: dict[str, dict[str, Any]] = {
    "qwen3_moe": {"num_experts": 4, "moe_intermediate_size": 16, "mlp_only_layers": [0]},
    "deepseek_v3": {
        "n_routed_experts": 4, "moe_intermediate_size": 16, "n_shared_experts": 1, "first_k_dense_replace": 1,
        "n_group": 1, "topk_group": 1, "q_lora_rank": 8, "kv_lora_rank": 8, "qk_rope_head_dim": 4, "qk_nope_head_dim": 4,
        "v_head_dim": 8, "head_dim": 4,
    },
}  # fmt: skip
"""Mixture-of-experts models; a short row does not use all of their experts."""
ALONE: dict[str, dict[str, Any]] = {"zero_stage": 0, "micro_batch_size": 4}
WAYS: list[tuple[str, dict[str, Any]]] = [
    ("llama", {"zero_stage": 0}),
    ("llama", {"zero_stage": 1}),
    ("llama", {"zero_stage": 2}),
    ("llama", {"zero_stage": 3}),
    ("llama", {"zero_stage": 3, "micro_batch_size": 1}),
    ("llama", {"zero_stage": 3, "gradient_checkpointing": True}),
    ("qwen3_moe", {"zero_stage": 3}),
    ("qwen3_moe", {"zero_stage": 2, "finetuning": "lora"}),
    ("qwen3_moe", {"zero_stage": 3, "finetuning": "lora"}),
    ("deepseek_v3", {"zero_stage": 3}),
    ("deepseek_v3", {"zero_stage": 3, "finetuning": "lora"}),
]
"""(model, settings of two workers), compared with one worker."""


class SomeUnlabelled(PackedDataset):
    """In the first step, the last worker's rows have no labels."""

    def batch(self, rows):
        made: Batch = super().batch(rows)
        made["labels"][np.isin(made["row"], (2, 3))] = IGNORE_INDEX
        return made


def examples(count: int, seed: int) -> list[dict[str, Any]]:
    """Make short and long examples in turn, with labels from some token on, and weights."""
    draw = random.Random(seed)
    made = []
    for index in range(count):
        ids = [draw.randrange(3, 390) for _ in range(draw.randint(8, 20) if index % 2 else draw.randint(80, CAPACITY))]
        trained = draw.randrange(1, len(ids))
        labels = [IGNORE_INDEX] * trained + ids[trained:]
        made.append({"input_ids": ids, "labels": labels, "weight": draw.choice([0.5, 1.0, 3.0])})
    return made


@pytest.fixture(scope="module")
def rows(tmp_path_factory) -> tuple[Path, PackedDataset, PackedDataset]:
    """(folder, training rows, evaluation rows); in the last step of both, one worker has fillers only."""
    folder = tmp_path_factory.mktemp("collectives")
    model = tiny_model(folder / "llama")
    manifests = []
    for name, count in (("d", 7), ("e", 3), ("f", 5)):
        write_records(folder / f"{name}.jsonl", examples(count, seed=count))
        source = {"name": name, "path": str(folder / f"{name}.jsonl")}
        config = make_config(folder, model, {"data.train": [source]})
        manifests.append(written(the_set(config, str(model)), str(model)).directory)
    paths = [f"{directory}/manifest.parquet" for directory in manifests]
    train_rows = SomeUnlabelled(tuple(paths[:2]), CAPACITY, 4, seed=3, layout="single")
    eval_rows = PackedDataset((paths[2],), CAPACITY, 4, layout="single", shuffle=False)
    assert [dataset.row_plan.rows for dataset in (train_rows, eval_rows)] == [10, 5]
    return folder, train_rows, eval_rows


@pytest.fixture(scope="module")
def trained(rows) -> list[tuple[Result, Result]]:
    """For each way: the results of one worker and of two."""
    for model_type, settings in MIXTURES.items():
        tiny_mixture(rows[0] / model_type, model_type, **settings)
    alone = list(dict.fromkeys((model, way.get("finetuning", "full")) for model, way in WAYS))
    one = train_all([case(rows, model, {**ALONE, "finetuning": finetuning}) for model, finetuning in alone])
    two = train_all([case(rows, model, way) for model, way in WAYS], world=2)
    known = dict(zip(alone, one, strict=True))
    return [(known[model, way.get("finetuning", "full")], both) for (model, way), both in zip(WAYS, two, strict=True)]


def case(rows: tuple[Path, PackedDataset, PackedDataset], model: str, way: dict[str, Any]) -> Case:
    folder, train_rows, eval_rows = rows
    settings = {
        "data.packing": False,
        "data.eval": [{"name": "f", "path": str(folder / "f.jsonl")}],
        "train.max_steps": None,
        "train.eval_every_steps": 2,
        "train.keep_best": True,
        "train.deepspeed": PARTITION_ALL,
    }
    config: Config = make_config(folder, folder / model, settings, **{"micro_batch_size": 2, **way})
    return Case(config, train_rows, eval_rows=eval_rows, chunk_tokens=CHUNK_TOKENS)


@pytest.mark.parametrize("way", range(len(WAYS)), ids=[str(way) for way in WAYS])
def test_workers_whose_rows_differ_train_as_one_worker_does(trained, way):
    one, two = trained[way]
    assert len(one.losses) == 3
    assert_same(one[:4], two[:4])
