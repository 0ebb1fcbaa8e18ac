"""What cannot go together is refused before anything starts, in one line with the remedy."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from raysft.config import Config, parse
from raysft.errors import RequestError
from raysft.train.deepspeed_config import deepspeed_settings


def config(**settings) -> Config:
    raw: dict = {"model": {"path": "m"}, "data": {"train": [{"name": "a", "path": "a"}]}}
    for key, value in settings.items():
        *sections, name = key.split("__")
        at = raw
        for section in sections:
            at = at.setdefault(section, {})
        at[name] = value
    return parse(raw)


GPU = {"scaling__use_gpu": True}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"train__optimizer": "muon"}, "train.optimizer=muon needs whole matrices and train.zero_stage=2"),
        ({"generate__gpus_per_engine": 2}, "generate.gpus_per_engine=2 goes with scaling.use_gpu=true"),
        (
            {"generate__gpus_per_engine": 2, "generate__batching": "continuous", **GPU},
            "generate.batching=continuous keeps its cache on one GPU and generate.gpus_per_engine=2",
        ),
        (
            {"train__optimizer": "galore", "train__zero_stage": 0},
            "train.optimizer=galore saves memory where whole matrices are trained, and model.finetuning=lora",
        ),
        (
            {
                "train__optimizer": "badam",
                "train__zero_stage": 0,
                "model__finetuning": "full",
                "scaling__num_workers": 2,
            },
            "train.optimizer=badam trains one block at a time in one worker and scaling.num_workers=2",
        ),
        (
            {
                "train__optimizer": "apollo",
                "train__zero_stage": 0,
                "model__finetuning": "full",
                "scaling__num_workers": 2,
            },
            "train.optimizer=apollo draws random projections",
        ),
        (
            {"train__optimizer": "adafactor", "train__zero_stage": 0, "model__dtype": "float16", **GPU},
            "has no loss scaling for model.dtype=float16",
        ),
        (
            {"model__adapters": ["a"], "model__finetuning": "full"},
            "model.adapters goes with model.finetuning lora or oft",
        ),
        ({"model__new_adapter": True}, "model.adapters names none to merge"),
        ({"model__lora__pissa": True, "model__lora__dora": True}, "both change what an adapter begins with"),
        ({"model__lora__pissa": True, "train__zero_stage": 3}, "train.zero_stage=3 shares them out; use zero_stage 2"),
        ({"model__lora__pissa": True, "model__adapters": ["a"]}, "set model.new_adapter=true"),
        (
            {"model__lora__loraplus_ratio": 4, "train__optimizer": "muon", "train__zero_stage": 0},
            "model.lora.loraplus_ratio goes with train.optimizer=adamw and it is muon",
        ),
        ({"model__quantization": "4bit", "model__finetuning": "full"}, "freezes the weights and model.finetuning=full"),
        ({"model__quantization": "8bit", "train__zero_stage": 3}, "quantized weights cannot be shared out"),
        ({"model__quantization": "4bit", "model__lora__pissa": True}, "needs exact weights"),
        ({"model__quantization": "4bit", "model__adapters": ["a", "b"]}, "takes one adapter to go on with"),
        ({"model__dtype": "float16"}, "model.dtype=float16 trains on GPUs only"),
        ({"train__fp8": "torchao"}, "train.fp8=torchao needs a GPU"),
        (
            {"train__fp8": "torchao", "model__dtype": "float32", **GPU},
            "goes with model.dtype=bfloat16 and it is float32",
        ),
        ({"model__liger": True}, "model.liger=True needs GPUs"),
        ({"model__attention": "flash_attention_2"}, "needs GPUs; use sdpa"),
        ({"train__offload__parameters": "cpu"}, "goes with train.zero_stage=3 and it is 2"),
        ({"train__offload__optimizer": "cpu", "train__zero_stage": 0}, "goes with train.zero_stage 1 to 3 and it is 0"),
        ({"train__offload__optimizer": "nvme"}, "train.offload.optimizer=nvme goes with train.zero_stage=3"),
        ({"train__offload__optimizer": "nvme", "train__zero_stage": 3}, "set train.offload.folder"),
        ({"train__loss": "dft", "train__label_smoothing": 0.1}, "both change what is asked of a token"),
        ({"train__keep_best": True}, "train.keep_best compares evaluations and train.eval_every_steps is not set"),
        (
            {"train__early_stopping": {"patience": 2}, "train__eval_every_steps": 5},
            "train.early_stopping compares evaluations and there is nothing to evaluate on",
        ),
        ({"model__lora__dora": True, "train__zero_stage": 3}, "needs the norms of whole weights"),
        (
            {
                "train__optimizer": "badam",
                "train__zero_stage": 0,
                "model__finetuning": "full",
                "train__save_every_steps": 5,
            },
            "cannot go on from a checkpoint",
        ),
        ({"train__schedule": "constant", "train__schedule_options": {"x": 1}}, "takes no options"),
        ({"model__freeze__layers": 0}, "0 layers train nothing"),
        ({"generate__sources": ["aa"]}, "no source of data.eval or data.train; did you mean 'a'?"),
    ],
)
def test_what_contradicts_itself_is_refused(settings, message):
    with pytest.raises(RequestError) as caught:
        config(**settings)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "settings",
    [
        {"train__optimizer": "muon", "train__zero_stage": 0},
        {"train__optimizer": "galore", "train__zero_stage": 0, "model__finetuning": "freeze"},
        {"model__quantization": "4bit", "model__adapters": ["a"]},
        {"model__lora__dora": True, "model__lora__rslora": True, "train__zero_stage": 2},
        {"model__adapters": ["a", "b"], "model__new_adapter": True},
        {"train__offload": {"optimizer": "nvme", "parameters": "cpu", "folder": "/x"}, "train__zero_stage": 3},
        {"train__fp8": "torchao", **GPU},
    ],
)
def test_what_goes_together_is_taken(settings):
    config(**settings)


def test_settings_of_deepspeed_are_merged_from_a_mapping_or_a_file(tmp_path):
    given = {"zero_optimization": {"stage": "auto", "overlap_comm": False}, "comms_logger": {"enabled": True}}
    (tmp_path / "ds.json").write_text(json.dumps(given))
    for source in (given, str(tmp_path / "ds.json")):
        settings = deepspeed_settings(config(train__deepspeed=source, train__global_batch_size=32), 2)
        assert settings["zero_optimization"] == {"stage": 2, "overlap_comm": False}
        assert settings["comms_logger"] == {"enabled": True}
        assert settings["train_batch_size"] == 32


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (
            {"zero_optimization": {"stage": 3}},
            "train.deepspeed.zero_optimization.stage=3 and the rest of the config makes it 2",
        ),
        ({"train_batch_size": 7}, "train.deepspeed.train_batch_size=7 and the rest of the config makes it 32"),
        ({"optimizer": {"type": "Adam"}}, "train.deepspeed.optimizer: raysft sets this itself"),
        ("missing.json", "is no JSON file that can be read (No such file or directory)"),
    ],
)
def test_settings_of_deepspeed_that_contradict_the_config_are_refused(given, message):
    with pytest.raises(RequestError) as caught:
        deepspeed_settings(config(train__deepspeed=given, train__global_batch_size=32), 1)
    assert message in str(caught.value)


def test_offload_is_passed_on():
    offload = {"optimizer": "nvme", "parameters": "cpu", "folder": "/nvme"}
    zero = deepspeed_settings(config(train__offload=offload, train__zero_stage=3), 1)["zero_optimization"]
    assert zero["offload_optimizer"] == {"device": "nvme", "pin_memory": False, "nvme_path": str(Path("/nvme"))}
    assert zero["offload_param"] == {"device": "cpu", "pin_memory": False}


def test_weights_of_16_bits_are_kept_in_32_by_zero():
    assert (
        deepspeed_settings(config(model__dtype="bfloat16", train__zero_stage=0), 1)["zero_optimization"]["stage"] == 1
    )
    half = deepspeed_settings(config(model__dtype="float16", train__zero_stage=0, **GPU), 1)
    assert half["fp16"]["enabled"]
    assert half["zero_optimization"]["stage"] == 1
    muon = deepspeed_settings(config(model__dtype="bfloat16", train__zero_stage=0, train__optimizer="muon"), 1)
    assert muon["torch_autocast"] == {"enabled": True, "dtype": "bfloat16"}
    assert muon["zero_optimization"]["stage"] == 0
    assert not muon["bf16"]["enabled"]
