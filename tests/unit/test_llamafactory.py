"""Files of LLaMA-Factory as configs: every key, every example, the numbers of its trainings, and what is refused."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from raysft.cli import main
from raysft.config import Config, load
from raysft.config.llamafactory import TABLE, Conversion, convert, render
from raysft.config.llamafactory.conversion import schema
from raysft.config.verb import verb_of
from raysft.data.prepare import prepare
from raysft.train.optim import make_lr_scheduler
from tests import messages
from tests.llamafactory import EXAMPLES, MINIMAL
from tests.messages import holds
from tests.tiny import tiny_model

FIELDS = json.loads((Path(__file__).parent / "llamafactory_fields.json").read_text())
"""Names of the fields of LLaMA-Factory 0.9.5's arguments, and of transformers 5.2's."""


@pytest.fixture
def write(tmp_path, monkeypatch):
    """Write ``lf.yaml`` into the working directory."""
    monkeypatch.chdir(tmp_path)

    def write(content: dict[str, Any] | str) -> str:
        Path("lf.yaml").write_text(content if isinstance(content, str) else yaml.safe_dump(content, sort_keys=False))
        return "lf.yaml"

    return write


def converted(**keys: Any) -> Conversion:
    return convert({**MINIMAL, **keys})


def value(conversion: Conversion, path: str) -> Any:
    node: Any = conversion.config
    for part in path.split("."):
        node = node[part]
    return node


@pytest.mark.parametrize("group", FIELDS)
def test_every_field_is_in_the_table(group):
    assert [name for name in FIELDS[group] if name not in TABLE] == []


def test_every_key_is_converted_or_harmless_or_refused_with_a_remedy():
    for name, key in TABLE.items():
        assert key.path or key.reason, name
        assert not key.path or key.path in schema() or key.path in LATER, name
        assert not (key.path and key.remedy), name


LATER = {
    "raysft export",
    "model.revision",
    "train.warmup_steps",
    "train.eval_delay",
}
"""Places of keys that are no keys of a config, or of configs to come."""
OTHER: dict[str, Any] = {
    "stage": "pt", "model_name_or_path": "other", "finetuning_type": "full", "output_dir": "x/y", "dataset": "b",
    "eval_dataset": "b", "flash_attn": "sdpa", "init_special_tokens": "desc_init", "infer_backend": "vllm",
    "num_train_epochs": 2, "export_dir": "x",
    "infer_dtype": "float16", "quantization_method": "hqq", "quantization_bit": 4, "quantization_type": "fp4",
    "mix_strategy": "interleave_under", "interleave_probs": "1.0", "val_size": 0.25, "packing": True,
    "galore_proj_type": "right", "apollo_scale_type": "tensor", "badam_mode": "ratio", "badam_switch_mode": "random",
    "lr_scheduler_type": "cosine", "lr_scheduler_kwargs": {"num_cycles": 2}, "optim": "adafactor",
    "report_to": "wandb", "eval_strategy": "epoch", "evaluation_strategy": "epoch", "save_strategy": "epoch",
    "train_sampling_strategy": "sequential", "deepspeed": "ds_z3_config.json", "fp8_backend": "te",
    "ray_init_kwargs": {"address": "head:6379"}, "placement_strategy": "SPREAD", "rope_scaling": "yarn",
    "apollo_proj": "svd", "apollo_proj_type": "left", "metric_for_best_model": "accuracy",
    "greater_is_better": True,
}  # fmt: skip
"""Values of keys that take neither true nor 3."""
WITH: dict[str, dict[str, Any]] = {
    **{name: {"use_galore": True} for name in TABLE if name.startswith("galore_")},
    **{name: {"use_apollo": True} for name in TABLE if name.startswith("apollo_")},
    **{name: {"use_badam": True} for name in TABLE if name.startswith("badam_")},
    **{name: {"finetuning_type": "freeze"} for name in TABLE if name.startswith("freeze_")},
    **{name: {"finetuning_type": "oft"} for name in ("module_dropout", "oft_block_size", "oft_target")},
    **{name: {"do_predict": True, "eval_dataset": "b"} for name in (
        "do_sample", "temperature", "top_p", "top_k", "num_beams", "max_new_tokens", "repetition_penalty",
        "length_penalty", "skip_special_tokens", "infer_backend")},
    "max_length": {"do_predict": True, "eval_dataset": "b", "max_new_tokens": -1},
    "infer_dtype": {"do_train": False, "do_predict": True, "eval_dataset": "b"},
    "do_train": {"do_train": False, "do_predict": True, "eval_dataset": "b"},
    "do_predict": {"eval_dataset": "b"}, "predict_with_generate": {"val_size": 0.5},
    "eval_dataset": {"do_eval": True}, "do_eval": {"eval_dataset": "b"},
    "eval_steps": {"eval_strategy": "steps", "val_size": 0.5}, "eval_delay": {"eval_strategy": "epoch", "val_size": 0.5},
    "logging_steps": {"eval_strategy": "steps", "val_size": 0.5},
    "interleave_probs": {"mix_strategy": "interleave_over"},
    "quantization_method": {"quantization_bit": 4}, "quantization_type": {"quantization_bit": 4},
    "double_quantization": {"quantization_bit": 4}, "fp8_backend": {"fp8": True},
    "pissa_iter": {"pissa_init": True}, "pissa_convert": {"pissa_init": True},
    "loraplus_lr_embedding": {"loraplus_lr_ratio": 16.0}, "adapter_folder": {"adapter_name_or_path": "x"},
    "use_llama_pro": {"finetuning_type": "freeze"},
    **{name: {"use_kt": True} for name in ("kt_weight_path", "kt_expert_checkpoint_path", "kt_use_lora_experts")},
    "ref_model": {"use_asft_loss": True}, "ref_model_adapters": {"use_asft_loss": True, "ref_model": "r"},
    "ref_model_quantization_bit": {"use_asft_loss": True, "ref_model": "r"},
    "create_new_adapter": {"adapter_name_or_path": "x"}, "gradient_checkpointing": {"disable_gradient_checkpointing": True},
    "export_dir": {"dataset": None, "do_train": None},
    "swanlab_project": {"use_swanlab": True}, "swanlab_run_name": {"use_swanlab": True},
    "metric_for_best_model": {"load_best_model_at_end": True}, "greater_is_better": {"early_stopping_steps": 3},
}  # fmt: skip
"""Key → keys without which it means nothing."""


@pytest.mark.parametrize("name", [name for name, key in TABLE.items() if key.path and name != "init_special_tokens"])
def test_no_key_is_ignored_in_silence(name):
    default = TABLE[name].default
    before = converted(**WITH.get(name, {}))
    given = OTHER.get(name, not default if isinstance(default, bool) else 3)
    after = convert({**MINIMAL, **WITH.get(name, {}), name: given})
    assert (after.config, after.notes, after.refusals) != (before.config, before.notes, before.refusals)


def test_new_tokens_are_read_from_their_file(write):
    write(MINIMAL)
    Path("tokens.yaml").write_text('"<|svg|>": begins a picture\n')
    keys = ["new_special_tokens_config=tokens.yaml"]
    tokens = load("lf.yaml", [*keys, "init_special_tokens=desc_init"]).model.new_tokens
    assert (tokens.special, tokens.noise) == (["<|svg|>"], 0.0)
    assert tokens.descriptions == {"<|svg|>": "begins a picture"}
    tokens = load("lf.yaml", keys).model.new_tokens
    assert (tokens.special, tokens.noise, tokens.descriptions) == (["<|svg|>"], 1.0, {})
    Path("tokens.yaml").write_text("- a\n")
    assert holds(messages.refusal(load, "lf.yaml", keys), "lf.yaml: new_special_tokens_config=tokens.yaml must map")


def test_experts_of_ktransformers_are_those_of_its_kernel_here():
    assert value(converted(use_kt=True), "model.experts") == "kt"
    assert converted(kt_weight_path="w", kt_use_lora_experts=True).refusals == []


@pytest.mark.parametrize("name", [name for name, key in TABLE.items() if key.remedy])
def test_a_key_without_counterpart_is_refused_by_name_with_a_remedy_and_harmless_by_default(name):
    default = TABLE[name].default
    given = OTHER.get(name, not default if isinstance(default, bool) else 3)
    (refusal,) = converted(**{name: given}).refusals
    assert refusal.key == name
    assert refusal.message.startswith(name)
    by_default = converted(**{name: [] if name == "fsdp" else default})
    assert by_default.refusals == []
    assert by_default.harmless.keys() - {"do_train"} == {name}


@pytest.mark.parametrize("name", EXAMPLES)
def test_examples_convert_and_are_valid(write, name):
    path = write(EXAMPLES[name])
    conversion = convert(EXAMPLES[name])
    assert conversion.refusals == []
    config = load(path, ["run.name=other"])
    assert config.run.name == "other"
    # What is printed is the same config.
    Path("ours.yaml").write_text(render(conversion, path))
    assert yaml.safe_load(Path("ours.yaml").read_text()) == conversion.config
    assert load("ours.yaml", ["run.name=other"]) == config
    known = {*conversion.harmless, *conversion.origins.values()}
    assert [key for key in EXAMPLES[name] if key not in known and TABLE[key].path not in conversion.origins] == []


def test_the_layers_that_a_model_was_expanded_by_are_trained(write):
    freeze = {"model_name_or_path": "m", "dataset": "a", "finetuning_type": "freeze"}
    model = load(write({**freeze, "use_llama_pro": True})).model
    assert (model.freeze.layers, model.freeze.spread) == (2, True)  # two is LLaMA-Factory's default
    for count in (0, -2):
        told = messages.refusal(load, write({**freeze, "use_llama_pro": True, "freeze_trainable_layers": count}))
        assert holds(told, f"lf.yaml … freeze_trainable_layers={count} … use_llama_pro=true … number of layers")
    for kind, remedy in {
        "full": "all layers",
        "lora": "new layers in lora_target",
        "oft": "new layers in oft_target",
    }.items():
        told = messages.refusal(load, write({**freeze, "finetuning_type": kind, "use_llama_pro": True}))
        assert holds(told, f"lf.yaml … use_llama_pro=true … finetuning_type={kind} … freeze … {remedy}")


def test_its_defaults_apply(write):
    config = load(write({"model_name_or_path": "m", "dataset": "a"}))
    assert config == load("lf.yaml", ["stage=sft"])
    expected = {
        "stage": "sft", "run.seed": 42, "run.name": "lf", "model.finetuning": "lora", "model.lora.rank": 8,
        "data.on_overflow": "truncate", "data.packing": False, "data.sequence_length": 2048, "data.max_rejected": 1.0,
        "data.registry": "data", "data.holdout": 0.0, "data.image_max_pixels": 589_824, "data.image_min_pixels": 1024,
        "model.train_parts": ["language"],
        "train.epochs": 3, "train.learning_rate": 5e-5, "train.schedule": "linear", "train.warmup_ratio": 0.0,
        "train.global_batch_size": 8, "train.micro_batch_size": 8, "train.gradient_checkpointing": True,
        "train.eval_at_start": False, "train.save_every_steps": 500, "train.trackers": [], "train.optimizer": "adamw",
        "scaling.num_workers": 1, "scaling.use_gpu": True, "generate.enabled": False,
    }  # fmt: skip
    found = {key: of(config, key) for key in expected}
    assert found == expected
    assert (config.train.keep_last, config.train.save_every_minutes) == (None, 15)


def of(config: Config, path: str) -> Any:
    node: Any = config
    for part in path.split("."):
        node = getattr(node, part)
    return node


@pytest.mark.parametrize(
    ("keys", "expected"),
    [
        ({"learning_rate": "1e-4", "weight_decay": "1e-2"}, {"train.learning_rate": 1e-4, "train.weight_decay": 0.01}),
        ({"dataset": "a, b"}, {"data.train": [{"name": "a"}, {"name": "b"}]}),
        ({"media_dir": "x", "image_max_pixels": 9999}, {"data.media_dir": "x", "data.image_max_pixels": 9999}),
        ({}, {"data.image_max_pixels": 768 * 768, "data.image_min_pixels": 32 * 32}),
        ({"freeze_vision_tower": False}, {"model.train_parts": ["language", "vision"]}),
        ({"freeze_vision_tower": False, "freeze_language_model": True}, {"model.train_parts": ["vision"]}),
        ({"freeze_multi_modal_projector": False}, {"model.train_parts": ["language"]}),
        (
            {"freeze_multi_modal_projector": False, "freeze_language_model": True, "finetuning_type": "full"},
            {"model.train_parts": ["projector"]},
        ),
        (
            {"freeze_multi_modal_projector": False, "finetuning_type": "freeze"},
            {"model.train_parts": ["language", "projector"]},
        ),
        ({"dataset": ["a", "b"]}, {"data.train": [{"name": "a"}, {"name": "b"}]}),
        ({"lora_target": "q_proj,v_proj"}, {"model.lora.target": ["q_proj", "v_proj"]}),
        ({"lora_target": ["q_proj", "v_proj"]}, {"model.lora.target": ["q_proj", "v_proj"]}),
        ({"report_to": "none"}, {"train.trackers": []}),
        ({"report_to": ["wandb", "mlflow"]}, {"train.trackers": ["wandb", "mlflow"]}),
        ({"report_to": "wandb,tensorboard"}, {"train.trackers": ["wandb", "tensorboard"]}),
        (
            {"report_to": "trackio", "project": "p", "run_name": "r", "trackio_space_id": None},
            {"train.trackers": ["trackio"], "train.tracking.project": "p", "train.tracking.run_name": "r"},
        ),
        (
            {"report_to": ["wandb"], "use_swanlab": True},
            {"train.trackers": ["wandb", "swanlab"], "train.tracking.project": "llamafactory"},
        ),
        (
            {"use_swanlab": True, "swanlab_project": "p", "swanlab_run_name": "r", "swanlab_mode": "cloud"},
            {"train.trackers": ["swanlab"], "train.tracking.project": "p", "train.tracking.run_name": "r"},
        ),
        (
            {"use_swanlab": True, "report_to": "swanlab", "project": "p"},
            {"train.trackers": ["swanlab"], "train.tracking.project": "p"},
        ),
        (
            {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4, "ray_num_workers": 3},
            {"train.global_batch_size": 24, "train.micro_batch_size": 2, "scaling.num_workers": 3},
        ),
        ({"output_dir": "saves/m/lora/sft/"}, {"run.storage": "saves/m/lora", "run.name": "sft"}),
        ({"output_dir": "/out"}, {"run.storage": "/out"}),
        ({"output_dir": "out"}, {"run.storage": ".", "run.name": "out"}),
        ({"output_dir": "s3://b/x/sft"}, {"run.storage": "s3://b/x", "run.name": "sft"}),
        ({"val_size": 0.1}, {"data.holdout": 0.1}),
        ({"val_size": 500}, {"data.holdout": 500}),
        ({"max_samples": 50}, {"data.max_examples": 50}),
        ({"disable_shuffling": True}, {"data.shuffle": False}),
        ({"stage": "pt"}, {"data.document_mask": False}),
        ({"neat_packing": True}, {"data.packing": True}),
        ({"add_tokens": "<a>,<b>", "add_special_tokens": "<|c|>"}, {
            "model.new_tokens": {"plain": ["<a>", "<b>"], "special": ["<|c|>"], "noise": 1.0}}),
        ({"warmup_steps": 0.1}, {"train.warmup_ratio": 0.1}),
        ({"max_steps": -1, "num_train_epochs": 2}, {"train.epochs": 2}),
        ({"max_steps": 100, "save_steps": 0.25}, {"train.max_steps": 100, "train.save_every_steps": 25}),
        ({"eval_strategy": "steps", "val_size": 0.1}, {"train.eval_every_steps": 500}),
        ({"eval_strategy": "steps", "logging_steps": 7, "val_size": 0.1}, {"train.eval_every_steps": 7}),
        ({"eval_strategy": "steps", "eval_steps": 20, "val_size": 0.1}, {"train.eval_every_steps": 20}),
        ({"evaluation_strategy": "steps", "eval_steps": 20, "val_size": 9}, {"train.eval_every_steps": 20}),
        ({"eval_strategy": "steps", "eval_steps": 20, "val_size": 9, "predict_with_generate": True}, {
            "train.eval_every_steps": 20, "generate.every_steps": 20, "generate.enabled": True}),
        ({"save_total_limit": 3}, {"train.keep_last": 3, "train.save_every_steps": 500}),
        ({"enable_thinking": False}, {"data.template_options": {"enable_thinking": False}}),
        ({"enable_thinking": None}, {"data.template_options": {"enable_thinking": None}}),
        ({"save_strategy": "epoch"}, {"train.save_every_epochs": 1, "train.keep_last": None}),
        ({"eval_strategy": "epoch", "val_size": 9, "eval_delay": 1}, {"train.eval_every_epochs": 1, "train.eval_delay": 1}),
        ({"warmup_steps": 20}, {"train.warmup_steps": 20}),
        ({"num_train_epochs": "0.5"}, {"train.epochs": 0.5}),
        ({"bf16": True}, {"model.dtype": "bfloat16"}),
        ({"fp16": True}, {"model.dtype": "float16"}),
        ({"disable_gradient_checkpointing": True}, {"train.gradient_checkpointing": False}),
        ({"adam_beta2": 0.95}, {"train.betas": [0.9, 0.95]}),
        ({"use_cpu": True}, {"scaling.use_gpu": False}),
        ({"deepspeed": "examples/deepspeed/ds_z3_config.json"}, {"train.zero_stage": 3}),
        (
            {"deepspeed": "/x/ds_z3_offload_config.json"},
            {"train.zero_stage": 3, "train.offload.optimizer": "cpu", "train.offload.parameters": "cpu"},
        ),
        (
            {"deepspeed": {"zero_optimization": {"stage": 1, "overlap_comm": True, "reduce_bucket_size": "auto"}}},
            {"train.zero_stage": 1, "train.deepspeed": {"zero_optimization": {"overlap_comm": True}}},
        ),
        (
            {"deepspeed": {"zero_optimization": {"stage": 2, "reduce_bucket_size": "5e8", "offload_optimizer": None}}},
            {"train.zero_stage": 2, "train.deepspeed": {"zero_optimization": {"reduce_bucket_size": 5e8}}},
        ),
        ({"deepspeed": {"zero_optimization": None}}, {"train.zero_stage": 0}),
        ({"lr_scheduler_kwargs": {"lr_end": "1e-7"}}, {"train.schedule_options": {"lr_end": 1e-7}}),
        (
            {"mix_strategy": "interleave_over", "interleave_probs": "0.7,0.3", "dataset": "a,b"},
            {
                "data.train": [{"name": "a", "weight": 0.7}, {"name": "b", "weight": 0.3}],
                "data.mixing": "all_exhausted",
            },
        ),
        (
            {"adapter_name_or_path": "x,y", "create_new_adapter": True},
            {"model.adapters": ["x", "y"], "model.new_adapter": True},
        ),
        ({"adam_epsilon": 1e-6}, {"train.epsilon": 1e-6}),
        (
            {"use_galore": True, "finetuning_type": "full", "galore_rank": 4},
            {
                "train.optimizer": "galore",
                "train.optimizer_options": {"rank": 4, "update_proj_gap": 200, "scale": 2.0, "proj_type": "std"},
                "train.zero_stage": 0,
            },
        ),
        (
            {"use_apollo": True, "finetuning_type": "full", "apollo_target": "q_proj,v_proj", "apollo_scale_front": True},
            {
                "train.optimizer": "apollo",
                "train.optimizer_target": ["q_proj", "v_proj"],
                "train.optimizer_options": {
                    "rank": 16, "update_proj_gap": 200, "scale": 32.0, "proj": "random", "proj_type": "std",
                    "scale_type": "channel", "scale_front": True,
                },
            },
        ),
        ({"optim": "adamw_bnb_8bit"}, {"train.optimizer": "adamw_8bit"}),
        ({"optim": "paged_adamw_32bit"}, {"train.optimizer": "paged_adamw"}),
        (
            {"optim": "lion_32bit", "adam_beta2": 0.98},
            {"train.optimizer": "lion", "train.optimizer_options": {"betas": [0.9, 0.98]}},
        ),
        (
            {"optim": "galore_adamw", "finetuning_type": "full", "optim_args": "rank=8, scale=0.5",
             "optim_target_modules": ["mlp"]},
            {
                "train.optimizer": "galore",
                "train.optimizer_target": ["mlp"],
                "train.optimizer_options": {"rank": 8, "update_proj_gap": 200, "scale": 0.5, "proj_type": "std"},
                "train.zero_stage": 0,
            },
        ),
        (
            {"optim": "galore_adamw", "finetuning_type": "full", "optim_target_modules": r".*layers\.\d\.mlp.*"},
            {"train.optimizer_target": [r"^(?:.*layers\.\d\.mlp.*)$"]},
        ),
        ({"optim": "schedule_free_adamw"}, {"train.optimizer": "schedulefree_adamw"}),
        (
            {"do_train": False, "do_predict": True, "eval_dataset": "b", "dataset": None, "max_new_tokens": 9},
            {"generate.model": "m", "generate.max_new_tokens": 9, "data.eval": [{"name": "b"}]},
        ),
        ({"use_asft_loss": True}, {"train.loss": "asft"}),
        (
            {"quantization_bit": 4, "deepspeed": "ds_z3_config.json", "double_quantization": False, "bf16": True},
            {"model.quantization": "4bit", "model.double_quantization": False, "train.zero_stage": 3},
        ),
        (
            {"lora_target": "1.self_attn.q_proj", "use_rslora": True, "use_dora": True, "additional_target": "embed_tokens"},
            {"model.lora": {"target": ["1.self_attn.q_proj"], "extra_modules": ["embed_tokens"], "dora": True, "rslora": True}},
        ),
        (
            {"finetuning_type": "freeze", "freeze_trainable_layers": 1, "freeze_trainable_modules": "mlp",
             "freeze_extra_modules": "lm_head"},
            {"model.freeze": {"layers": 1, "modules": ["mlp"], "extra_modules": ["lm_head"]}},
        ),
        ({"pure_bf16": True}, {"model.dtype": "bfloat16", "train.pure_bf16": True}),
        ({"pure_bf16": True, "use_badam": True, "finetuning_type": "full"}, {
            "model.dtype": "bfloat16", "train.pure_bf16": False}),
        ({"use_asft_loss": True, "asft_alpha": 0.3, "ref_model": "r"}, {
            "train.loss": "asft", "train.asft_alpha": 0.3, "train.reference_model": "r"}),
        ({"use_asft_loss": True, "ref_model": "r", "ref_model_adapters": "a", "ref_model_quantization_bit": 4,
          "quantization_bit": 4}, {"train.reference_model": "a", "model.quantization": "4bit"}),
        (
            {"do_train": False, "do_eval": True, "eval_dataset": "b", "dataset": None, "quantization_bit": 4},
            {"evaluate.model": "m", "model.quantization": "4bit", "data.eval": [{"name": "b"}],
             "data.train": [{"name": "b"}], "generate": {"enabled": False}},
        ),
        (
            {"do_train": False, "do_eval": True, "val_size": 0.5, "stage": "pt", "adapter_name_or_path": "x"},
            {"evaluate.model": "x", "model.path": "m", "data.holdout": 0.5},
        ),
        (
            {"do_train": None, "do_eval": True, "val_size": 9, "model_revision": "v2", "deepspeed": "ds_z3_offload_config.json"},
            {"evaluate.model": "m@v2", "model.revision": "v2",
             "train": {"zero_stage": 3, "offload": {"parameters": "cpu"}, "deepspeed": {}}},
        ),
        (
            {"do_train": False, "do_eval": True, "predict_with_generate": True, "eval_dataset": "b", "max_new_tokens": 9},
            {"generate.model": "m", "generate.max_new_tokens": 9},
        ),
        (
            {"do_train": False, "do_eval": True, "do_predict": True, "predict_with_generate": True, "eval_dataset": "b"},
            {"generate.model": "m"},
        ),
        ({"default_system": "Be brief."}, {"data.default_system": "Be brief."}),
        ({"default_system": ""}, {"data.default_system": ""}),
        ({"template": "qwen3", "preserve_thinking": True, "mask_history": True}, {"data.thinking": "keep"}),
        ({"template": "qwen3", "mask_history": True}, {"data.thinking": "last"}),
        (
            {"template": "qwen3", "preserve_thinking": True, "enable_thinking": False},
            {"data.template_options": {"enable_thinking": False}, "data.thinking": "empty"},
        ),
        ({"template": "qwen", "preserve_thinking": True}, {"data.thinking": "template"}),
        ({"dataset_dir": "ONLINE", "dataset": "o/d"}, {"data.train": [
            {"name": "d", "path": "hf://datasets/o/d@~parquet/default/train", "format": "alpaca",
             "columns": {"system": None, "history": None, "tools": None, "weight": None}}]}),
    ],
)  # fmt: skip
def test_what_keys_become(keys, expected):
    conversion = converted(**keys)
    assert conversion.refusals == []
    assert {path: value(conversion, path) for path in expected} == expected


def test_adams_settings_are_dropped_with_a_note_where_transformers_ignores_them():
    conversion = converted(optim="adafactor", adam_epsilon=1e-6, adam_beta2=0.95)
    assert conversion.refusals == []
    assert not {"betas", "epsilon"} & conversion.config["train"].keys()
    assert {"adam_epsilon", "adam_beta2"} <= conversion.harmless.keys()


@pytest.mark.parametrize(
    "keys", [{"eval_strategy": "epoch", "predict_with_generate": True}, {"eval_strategy": "steps", "do_predict": True}]
)
def test_predictions_that_are_not_asked_for_every_so_many_steps_come_at_the_end(keys):
    generate = converted(val_size=9, **keys).config["generate"]
    assert generate["enabled"] is True
    assert "every_steps" not in generate


@pytest.mark.parametrize(
    "keys",
    [{"do_train": True}, {"do_train": False, "predict_with_generate": True}, {"do_train": False, "do_predict": True}],
)
def test_a_training_and_predictions_are_no_evaluation_of_any_model(keys):
    conversion = converted(do_eval=True, eval_dataset="b", **keys)
    assert conversion.refusals == []
    assert "evaluate" not in conversion.config


@pytest.mark.parametrize("keys", [{"template": "qwen", "mask_history": True}, {"template": "qwen3"}])
def test_thoughts_are_left_to_templates_that_do_as_llamafactory_does(keys):
    assert "thinking" not in converted(**keys).config["data"]


def test_settings_of_deepspeed_are_read_from_a_file_that_is_there(write):
    Path(write(MINIMAL)).with_name("ds_z2_config.json").write_text(json.dumps(
        {"train_batch_size": "auto", "bf16": {"enabled": "auto"}, "fp16": {"enabled": "auto", "loss_scale": 0},
         "zero_optimization": {"stage": 1, "overlap_comm": False}}))  # fmt: skip
    config = load("lf.yaml", ["deepspeed=ds_z2_config.json"])
    assert config.train.zero_stage == 1
    assert config.train.deepspeed == {"zero_optimization": {"overlap_comm": False}}


def test_evaluation_data_that_llamafactory_would_not_read_is_left_out_and_listed():
    conversion = converted(eval_dataset="b")
    assert "eval" not in conversion.config["data"]
    assert "eval_strategy" in conversion.harmless["eval_dataset"]


def test_tokens_that_llamafactory_would_train_on_are_not_passed_over(tmp_path):
    assert converted(tokenized_path=str(tmp_path / "new")).refusals == []
    (refusal,) = converted(tokenized_path=str(tmp_path)).refusals
    assert holds(refusal.message, f"tokenized_path={tmp_path} exists … remove tokenized_path")


@pytest.mark.parametrize(
    ("keys", "verb"),
    [
        ({}, "run"),
        ({"do_eval": True, "val_size": 9}, "run"),
        ({"do_train": False, "do_eval": True, "val_size": 9}, "evaluate"),
        ({"do_train": False, "do_predict": True, "val_size": 9}, "generate"),
        ({"do_train": False, "do_eval": True, "predict_with_generate": True, "val_size": 9}, "generate"),
    ],
)
def test_the_converted_config_names_the_verb_that_takes_it(write, keys, verb):
    path = write({**MINIMAL, **keys})
    assert f"# Run it with raysft {verb}" in render(convert({**MINIMAL, **keys}), path).splitlines()[1]
    assert verb_of(load(path)) == verb


def test_keys_at_their_defaults_are_listed_as_such_and_those_of_trainings_in_other_files():
    keys = {"save_only_model": False, "resume_from_checkpoint": None, "report_to": "none"}
    conversion = convert({**MINIMAL, **keys, "do_train": False, "do_eval": True, "val_size": 9})
    assert conversion.harmless["report_to"] == "only used for training"
    assert "save_only_model, resume_from_checkpoint: have their defaults" in render(conversion, "a.yaml")
    assert converted(**keys).config["train"]["trackers"] == []
    badam = converted(use_badam=True, finetuning_type="full", save_steps=2, save_total_limit=3).harmless
    assert (
        badam["save_steps"]
        == badam["save_total_limit"]
        == "training with BAdam cannot resume, so it writes no checkpoints"
    )
    assert "needed to resume" in converted(save_only_model=True).harmless["save_only_model"]


def test_overrides_may_name_keys_of_both(write):
    config = load(write({**MINIMAL, "learning_rate": 1e-5}), ["learning_rate=1e-3", "train.global_batch_size=2"])
    assert (config.train.learning_rate, config.train.global_batch_size) == (1e-3, 2)


def test_keys_of_conversations_have_no_effect_on_raw_text_and_are_told(write):
    keys = {"default_system": "Be kind.", "enable_thinking": False, "preserve_thinking": True, "mask_history": True}
    conversion = convert({**MINIMAL, **keys, "stage": "pt"})
    assert conversion.harmless.keys() >= keys.keys()
    assert load(write({**MINIMAL, **keys, "stage": "pt"})).data == load(write({**MINIMAL, "stage": "pt"})).data


@pytest.mark.parametrize(
    ("keys", "parts"),
    [
        ({"stage": "dpo"}, "lf.yaml:4: stage=dpo is not supported … sft and pt"),
        ({"stage": "kto"}, "lf.yaml:4: stage=kto"),
        ({"stage": "rm"}, "lf.yaml:4: stage=rm"),
        ({"freeze_language_model": True}, "lf.yaml:4: freeze_language_model=true leaves nothing to train"),
        (
            {"freeze_vision_tower": False, "finetuning_type": "freeze"},
            "lf.yaml:4: freeze_vision_tower=false … set finetuning_type to full",
        ),
        ({"crop_to_patches": True}, "lf.yaml:4: crop_to_patches=true is not supported; remove it"),
        ({"stage": "ppo"}, "lf.yaml:4: stage=ppo"),
        ({"cutoff_len": "abc"}, "lf.yaml:4: cutoff_len='abc': must be a whole number"),
        ({"cutoff_len": 20.5}, "lf.yaml:4: cutoff_len=20.5: must be a whole number"),
        ({"max_samples": 0}, "lf.yaml:4: max_samples=0: must be a whole number above 0"),
        ({"max_samples": -1}, "lf.yaml:4: max_samples=-1: must be a whole number above 0"),
        ({"bf16": "false"}, "lf.yaml:4: bf16='false': must be true or false"),
        ({"learning_rate": "fast"}, "lf.yaml:4: learning_rate='fast': must be a number"),
        ({"learning_rate": True}, "lf.yaml:4: learning_rate=true: must be a number"),
        ({"learning_rate": -1}, "lf.yaml:4: train.learning_rate=-1.0: must be greater than 0"),
        ({"dataset": "a,,b"}, "lf.yaml:2: dataset='a,,b': must be names"),
        ({"task": "mmlu_test"}, "lf.yaml:4: unknown key task; it belongs to llamafactory-cli eval … use lm-evaluation-harness"),
        ({"batch_size": 2}, "lf.yaml:4: unknown key batch_size; did you mean per_device_train_batch_size, or per_device_eval"),
        ({"cp_size": 2}, "lf.yaml:4: unknown key cp_size; … remove it … scaling.sequence_parallel=N"),
        ({"save_dir": "x"}, "lf.yaml:4: unknown key save_dir; did you mean output_dir?"),
        ({"do_train": False, "do_eval": True}, "lf.yaml:4: do_eval=true … rename dataset to eval_dataset to use a"),
        ({"lora_rnak": 3}, "lf.yaml:4: unknown key lora_rnak; did you mean lora_rank?"),
        ({"report_to": "comet_ml"}, "lf.yaml:4: report_to=comet_ml … wandb, mlflow, swanlab, trackio or none"),
        ({"report_to": "all"}, "lf.yaml:4: report_to=all … name them: tensorboard, wandb"),
        ({"report_to": "trackio", "trackio_space_id": "me/s"}, "lf.yaml:5: trackio_space_id … TRACKIO_SPACE_ID=me/s"),
        ({"use_swanlab": True, "swanlab_mode": "local"}, "lf.yaml:5: swanlab_mode … SWANLAB_MODE=local in the environment"),
        ({"use_swanlab": True, "swanlab_workspace": "w"}, "lf.yaml:5: swanlab_workspace … SWANLAB_WORKSPACE=w"),
        ({"use_swanlab": True, "swanlab_lark_webhook_url": "u"}, "lf.yaml:5: swanlab_lark_webhook_url … remove it"),
        (
            {"use_swanlab": True, "project": "a", "swanlab_project": "b"},
            "lf.yaml:6: swanlab_project=b differs from project=a … remove one",
        ),
        ({"swanlab_api_key": "hidden"}, "lf.yaml:4: swanlab_api_key is not supported; remove it and set SWANLAB_API_KEY"),
        ({"report_to": "wandb", "project": "a/b"}, "train.tracking.project=a/b … a project name in W&B has at most 128 … choose"),
        ({"lr_scheduler_type": "greedy"}, "lf.yaml:4: lr_scheduler_type='greedy': must be one of linear, cosine"),
        ({"val_size": 1}, "lf.yaml:4: val_size=1 … use 2 or more"),
        ({"eval_dataset": "b", "val_size": 0.1}, "lf.yaml:5: val_size=0.1 … eval_dataset … remove one"),
        ({"eval_dataset": "b", "val_size": 1}, "lf.yaml:5: val_size=1 … eval_dataset … remove one"),
        ({"do_train": True, "do_eval": True}, "lf.yaml:4: do_eval=true … eval_dataset and val_size … set one"),
        ({"do_train": True, "do_predict": True}, "lf.yaml:4: do_predict=true … eval_dataset and val_size … set one"),
        ({"do_train": False, "do_predict": True}, "lf.yaml:4: do_predict=true … eval_dataset and val_size … rename dataset"),
        ({"predict_with_generate": True}, "lf.yaml:4: predict_with_generate=true … eval_dataset and val_size … set one"),
        ({"bf16": True, "fp16": True}, "lf.yaml:5: fp16=true, but bf16=true"),
        ({"warmup_ratio": 0.1, "warmup_steps": 5}, "lf.yaml:4: warmup_ratio and warmup_steps … remove one"),
        ({"eval_strategy": "steps"}, "lf.yaml:4: eval_strategy=steps … val_size or eval_dataset"),
        ({"eval_strategy": "steps", "eval_steps": 0.1, "val_size": 9}, "lf.yaml:5: eval_steps=0.1 … number of steps"),
        ({"dataset_dir": "REMOTE:o/d"}, "lf.yaml:4: dataset_dir=REMOTE:o/d … hf download o/d"),
        ({"deepspeed": "mine.json"}, "lf.yaml:4: deepspeed=mine.json: no such file"),
        ({"deepspeed": {"tensor_parallel": {"autotp_size": 2}}}, "lf.yaml:4: deepspeed: tensor_parallel"),
        ({"deepspeed": {"zero_optimization": [1]}}, "lf.yaml:4: deepspeed: zero_optimization must be a mapping"),
        (
            {"deepspeed": {"zero_optimization": {"offload_param": "cpu"}}},
            "lf.yaml:4: deepspeed: offload_param must be a mapping",
        ),
        ({"new_special_tokens": "<a>"}, "lf.yaml:4: unknown key new_special_tokens … add_special_tokens; rename it"),
        ({"hf_hub_token": "secret"}, "lf.yaml:4: hf_hub_token is not supported … HF_TOKEN"),
        ({"use_unsloth": True, "fsdp": "full_shard"}, "lf.yaml:4: use_unsloth=true … (and 1 more, which raysft convert lists"),
        (
            {"use_kt": True, "kt_weight_path": "w"},
            "lf.yaml:5: kt_weight_path='w' … remove it: the experts' weights come from the model itself",
        ),
        ({"use_kt": True, "kt_use_lora_experts": True}, "lf.yaml:5: kt_use_lora_experts=true … remove it"),
        ({"use_kt": True, "finetuning_type": "full"}, "model.experts=kt … model.finetuning=full … zero_stage=3"),
        ({"use_galore": True, "use_muon": True}, "lf.yaml:5: use_galore and use_muon"),
        ({"use_dft_loss": True, "use_asft_loss": True}, "lf.yaml:5: use_dft_loss and use_asft_loss"),
        ({"use_asft_loss": True, "ref_model": "r", "ref_model_adapters": "a,b"}, "lf.yaml:6: ref_model_adapters … merge"),
        (
            {"use_asft_loss": True, "ref_model": "r", "ref_model_quantization_bit": 8},
            "lf.yaml:6: ref_model_quantization_bit=8, but quantization_bit=null … set both",
        ),
        ({"use_galore": True, "optim": "adamw_8bit"}, "lf.yaml:5: use_galore with optim=adamw_8bit"),
        ({"use_badam": True, "badam_mode": "ratio"}, "lf.yaml:5: badam_mode=ratio"),
        ({"optim_target_modules": "q_proj, mlp"}, "lf.yaml:4: optim_target_modules='q_proj, mlp': is a regular … [q_proj, mlp]"),
        ({"optim": "galore_adamw_layerwise"}, "lf.yaml:4: optim='galore_adamw_layerwise': updates weights during"),
        ({"optim": "lomo"}, "lf.yaml:4: optim='lomo': this optimizer cannot be used"),
        ({"optim": "ademamix_8bit"}, "lf.yaml:4: optim='ademamix_8bit': is not supported; use ademamix"),
        ({"export_dir": "merged", "dataset": None}, "lf.yaml:4: this is an export config … raysft export m --output merged"),
        ({"export_hub_model_id": "o/n"}, "lf.yaml:4: export_hub_model_id='o/n' … raysft export RUN_DIR --push ORG/NAME"),
        ({"push_to_hub": True, "hub_model_id": "o/n"}, "lf.yaml:4: push_to_hub=true … raysft export RUN_DIR --push ORG/NAME"),
        ({"do_train": False}, "lf.yaml:3: do_train=false leaves nothing to do; set do_train: true"),
        (
            {"do_train": False, "do_eval": True, "val_size": 9, "adapter_name_or_path": "x,y"},
            "lf.yaml:6: adapter_name_or_path: evaluations accept only one adapter",
        ),
        ({"model_name_or_path": None}, "lf.yaml:1: model_name_or_path is required"),
        ({"dataset": None}, "lf.yaml:2: dataset is required"),
        ({"dataset": None, "do_train": False, "do_eval": True}, "lf.yaml:4: do_eval=true needs data … set one of them"),
        (
            {"dataset": None, "do_train": False, "do_eval": True, "val_size": 9},
            "lf.yaml:2: dataset is required … to hold a part out of",
        ),
        ({"stage": "pt", "do_train": None, "do_predict": True}, "lf.yaml:3: do_train=false leaves nothing to do"),
        ({"data": {"train": []}}, "lf.yaml:1: model_name_or_path … LLaMA-Factory key, but data … raysft section; write model.path"),
    ],
)  # fmt: skip
def test_what_is_refused(write, keys, parts):
    keys = {**MINIMAL, **keys}
    if keys.get("export_dir"):
        del keys["do_train"]
        parts = parts.replace("lf.yaml:4", "lf.yaml:3")
    message = messages.refusal(load, write(keys))
    assert holds(message, parts), message
    assert "secret" not in message


@pytest.mark.parametrize(
    ("keys", "metric", "lowest"),
    [
        ({"load_best_model_at_end": True}, "eval_loss", True),
        ({"load_best_model_at_end": True, "metric_for_best_model": "loss"}, "eval_loss", True),
        ({"early_stopping_steps": 2, "metric_for_best_model": "eval_accuracy"}, "eval_accuracy", False),
        ({"early_stopping_steps": 2, "metric_for_best_model": "accuracy", "greater_is_better": True}, "eval_accuracy", False),
        ({"load_best_model_at_end": True, "metric_for_best_model": "eval_b_loss"}, "eval_b_loss", True),
        ({"load_best_model_at_end": True, "metric_for_best_model": "perplexity", "greater_is_better": False}, "eval_perplexity",
         True),
        ({"metric_for_best_model": "eval_accuracy", "greater_is_better": True}, "eval_loss", True),
        ({"load_best_model_at_end": True, "metric_for_best_model": "rouge-l", "predict_with_generate": True}, "predict_rouge-l",
         False),
        ({"early_stopping_steps": 2, "metric_for_best_model": "eval_b_bleu-4", "predict_with_generate": True},
         "predict_b_bleu-4", False),
    ],
)  # fmt: skip
def test_the_best_model_is_chosen_by_the_metric_that_transformers_names(write, keys, metric, lowest):
    evaluates = {"eval_strategy": "steps", "eval_steps": 2, "eval_dataset": "b,c"}
    train = load(write({**MINIMAL, **evaluates, **keys})).train
    assert (train.best_metric, train.lowest_is_best) == (metric, lowest)
    assert train.comparing_key or "load_best_model_at_end" in convert({**MINIMAL, **keys}).harmless["greater_is_better"]


def test_keys_of_raysft_stay_with_raysft(write):
    message = messages.refusal(load, write("model: {path: m}\ndata: {train: [{name: a, path: a}]}\nepoch: 1\n"))
    assert "did you mean train.epochs?" in message


def test_convert_prints_or_writes_the_config_and_says_what_is_refused(write, capsys):
    path = write({**MINIMAL, "val_size": 0.1, "overwrite_cache": True})
    assert main(["convert", path]) == 0
    printed = capsys.readouterr().out
    assert "overwrite_cache: tokens are always cached" in printed
    assert "holdout: 0.1  # chosen by a hash" in printed
    assert main(["convert", path, "--output", "new.yaml"]) == 0
    assert Path("new.yaml").read_text() == printed
    assert main(["convert", path, "--output", "new.yaml"]) == 2
    assert "File exists" in capsys.readouterr().err
    assert main(["convert", write({**MINIMAL, "use_unsloth": True, "fp8": 3})]) == 2
    seen = capsys.readouterr()
    assert "\n#   fp8=3: must be true or false\n" in seen.out
    assert "\n#   use_unsloth=true is not supported; remove it" in seen.out
    assert seen.err.startswith("raysft: error: lf.yaml:5: fp8=3")
    merge = {
        "model_name_or_path": "m",
        "adapter_name_or_path": "saves/x",
        "template": "qwen",
        "export_dir": "to",
        "export_size": 5,
    }
    assert main(["convert", write(merge)]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == "raysft export m --adapters saves/x --output to --shard-size 5GB"
    assert main(["convert", write({**merge, "export_quantization_bit": 4})]) == 2
    seen = capsys.readouterr()
    assert seen.err.startswith("raysft: error: lf.yaml:6: export_quantization_bit=4 is not supported")
    assert "raysft export m" not in seen.out + seen.err
    Path("own.yaml").write_text("model: {path: m}\n")
    assert main(["convert", "own.yaml"]) == 2
    assert "contains no LLaMA-Factory keys" in capsys.readouterr().err


@pytest.mark.parametrize(("examples", "batch", "accumulation", "workers", "keys"), [
    (13, 2, 2, 1, {"warmup_ratio": 0.1}),
    (16, 4, 1, 1, {"num_train_epochs": 2}),
    (7, 1, 3, 2, {"warmup_ratio": 0.5}),
    (5, 8, 1, 1, {"num_train_epochs": 1}),
    (13, 2, 1, 1, {"num_train_epochs": 1.5, "warmup_steps": 4}),
    (5, 1, 2, 1, {"num_train_epochs": 1, "max_steps": 11, "warmup_steps": 0.2}),
])  # fmt: skip
def test_steps_and_learning_rates_are_those_of_its_trainer(
    tmp_path, write, examples, batch, accumulation, workers, keys
):
    model = tiny_model(tmp_path / "m")
    (tmp_path / "data").mkdir()
    records = [{"instruction": f"Say {n}.", "input": "", "output": "n " * (1 + n * 40 % 300)} for n in range(examples)]
    (tmp_path / "data" / "a.json").write_text(json.dumps(records))
    (tmp_path / "data" / "dataset_info.json").write_text(json.dumps({"a": {"file_name": "a.json"}}))
    config = load(write({
        **MINIMAL, "model_name_or_path": str(model), "cutoff_len": 128, "per_device_train_batch_size": batch,
        "gradient_accumulation_steps": accumulation, "ray_num_workers": workers, "learning_rate": 2e-4, **keys,
    }), ["scaling.use_gpu=false"])  # fmt: skip
    plan = prepare(config, str(model)).train_rows.row_plan
    # transformers' Trainer: batches of all workers, then steps of several of them; the last ones of an epoch may be short.
    batches = math.ceil(examples / (batch * workers))
    steps = keys.get("max_steps") or math.ceil(keys.get("num_train_epochs", 3) * math.ceil(batches / accumulation))
    assert plan.steps == steps
    assert int(plan.epoch_ends[0]) == examples
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=config.train.learning_rate)
    schedule = make_lr_scheduler(optimizer, config.train, plan.steps)
    warmup = keys.get("warmup_ratio", keys.get("warmup_steps", 0))
    rising = warmup if warmup >= 1 else math.ceil(warmup * steps)
    for step in range(steps):
        expected = 2e-4 * (step / rising if step < rising else (steps - step) / (steps - rising))
        assert schedule.get_last_lr()[0] == pytest.approx(expected)
        optimizer.step()
        schedule.step()


def test_the_loss_of_routers_is_kept():
    assert value(converted(moe_aux_loss_coef=0.01), "train.router_aux_loss_coef") == 0.01
    assert value(converted(moe_aux_loss_coef=0), "train.router_aux_loss_coef") is None
    (refused,) = converted(moe_aux_loss_coef=-0.1).refusals
    assert "moe_aux_loss_coef=-0.1" in refused.message
