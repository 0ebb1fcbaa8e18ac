"""Settings of DeepSpeed that do not come from the config alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.profiler import ProfilerActivity, profile

from raysft.train.deepspeed_config import deepspeed_settings
from raysft.train.deepspeed_import import deepspeed
from raysft.train.engine import make_engine
from raysft.train.step import train_step
from tests.training import make_config, prepare, rows_of
from tests.unit.test_uploads import Questions

LARGEST_TENSOR = 1 << 20
"""Bytes; the tensors of the tiny model, its rows and its logits have less than half as many."""


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    folder = tmp_path_factory.mktemp("zero")
    store = dist.FileStore(str(folder / "store"), 1)
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    with pytest.MonkeyPatch.context() as environment:
        for name, value in (("RANK", "0"), ("WORLD_SIZE", "1"), ("LOCAL_RANK", "0")):
            environment.setenv(name, value)
        yield prepare(folder)
    deepspeed.comm.destroy_process_group()  # DeepSpeed forgets its groups, which other tests of this process would get


def engine_of(prepared: tuple[Path, Path, Any], settings: dict[str, Any], **train: Any) -> Any:
    folder, model, _ = prepared
    config = make_config(folder, model, settings, micro_batch_size=4, **train)
    return make_engine(config, str(model), 1, 4, torch.device("cpu"))[0]


@pytest.mark.parametrize("stage", [1, 2, 3])
@pytest.mark.parametrize("finetuning", ["lora", "full"])
def test_the_reduce_bucket_takes_no_more_memory_than_the_gradients(prepared, stage, finetuning):
    """DeepSpeed's default bucket takes 2 GB, in each backward or from the start."""
    rows = rows_of(prepared[2])
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        engine = engine_of(prepared, {}, finetuning=finetuning, zero_stage=stage)
        train_step(engine, rows.batch(range(4)), float(rows.row_plan.step_weight[0]))
    allocated = [event.cpu_memory_usage for event in profiled.events()]
    assert max(allocated) < LARGEST_TENSOR
    trained = sum(p.ds_numel if stage == 3 else p.numel() for p in engine.module.parameters() if p.requires_grad)
    assert engine.zero_reduce_bucket_size() == trained


def test_a_bucket_size_in_the_config_is_used(prepared):
    given = {"zero_optimization": {"reduce_bucket_size": 7000}}
    engine = engine_of(prepared, {"train.deepspeed": given}, finetuning="lora", zero_stage=2)
    assert engine.optimizer.reduce_bucket_size == 7000
    automatic = {"zero_optimization": {"reduce_bucket_size": "auto"}}
    engine = engine_of(prepared, {"train.deepspeed": automatic}, finetuning="lora", zero_stage=2)
    assert engine.optimizer.reduce_bucket_size == sum(p.numel() for p in engine.module.parameters() if p.requires_grad)


SHARED = {"scaling.sequence_parallel": 2, "scaling.num_workers": 2}


@pytest.mark.parametrize(
    ("settings", "given", "expected"),
    [
        ({"model.dtype": "bfloat16"}, {}, None),
        ({"model.dtype": "bfloat16", **SHARED}, {}, "fp32"),
        ({"model.dtype": "bfloat16", "train.pure_bf16": True, **SHARED}, {}, "fp32"),
        ({"model.dtype": "float16", "scaling.use_gpu": True, **SHARED}, {"communication_data_type": "auto"}, "fp32"),
        ({"model.dtype": "bfloat16", **SHARED}, {"communication_data_type": "bf16"}, "bf16"),
        (SHARED, {}, None),
    ],
)
def test_gradients_of_workers_that_share_rows_are_added_up_in_float32(tmp_path, settings, given, expected):
    """Those of 16 bits; float32 needs no setting."""
    config = make_config(tmp_path, tmp_path / "model", {**settings, "train.deepspeed": given, "train.zero_stage": 1})
    assert deepspeed_settings(config, 2).get("communication_data_type") == expected


@pytest.mark.parametrize("stage", [2, 3])
def test_gradients_in_bfloat16_are_added_up_as_the_settings_say(prepared, stage):
    for given, expected in (({}, torch.bfloat16), ({"communication_data_type": "fp32"}, torch.float32)):
        engine = engine_of(prepared, {"model.dtype": "bfloat16", "train.deepspeed": given}, zero_stage=stage)
        assert set(engine.optimizer.ipg_buckets) == {expected}


def test_of_a_step_a_number_is_asked_for_once(prepared):
    """Whether the gradient is finite, for an optimizer that is not ZeRO's. The lists at the end come in one piece from a GPU, where
    they are one more; the CPU's attention asks where examples begin."""
    rows, engine = rows_of(prepared[2]), engine_of(prepared, {"model.attention": "sdpa"}, zero_stage=0)
    with Questions() as questions:
        result = train_step(
            engine, rows.batch(range(4)), float(rows.row_plan.step_weight[0]), asks=lambda: (False, True, False, True)
        )
    assert questions.found == ["_local_scalar_dense"]
    assert (result.noticed, result.late, result.over, result.rows_are_late) == (False, True, False, True)
    assert result.applied
