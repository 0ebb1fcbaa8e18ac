"""What cannot go together is refused before anything starts, in one line with the remedy."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from raysft.config import Config, parse
from raysft.errors import RequestError
from raysft.train.deepspeed_config import deepspeed_settings
from tests.messages import holds


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
COMPARES = {
    "train__keep_best": True,
    "train__eval_every_steps": 2,
    "data__eval": [{"name": "a", "path": "a"}, {"name": "b", "path": "b"}],
}
"""Evaluations are compared, on two sets."""


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"scaling__sequence_parallel": 4, "scaling__num_workers": 6},
            "scaling.sequence_parallel=4 … scaling.num_workers=6 … use scaling.num_workers=8",
        ),
        (
            {"scaling__sequence_parallel": 2, "scaling__num_workers": [1, 4]},
            "scaling.sequence_parallel=2 … scaling.num_workers=[1, 4] … use scaling.num_workers=[2, 4]",
        ),
        (
            {"scaling__sequence_parallel": 2, "scaling__num_workers": 2, "model__attention": "eager"},
            "scaling.sequence_parallel=2 … model.attention=eager … model.attention=auto",
        ),
        ({"train__optimizer": "muon"}, "train.optimizer=muon … train.zero_stage=2 … adamw"),
        ({"generate__gpus_per_engine": 2}, "generate.gpus_per_engine=2 … scaling.use_gpu=false … remove"),
        ({"generate__num_beams": 2}, "generate.num_beams=2 … generate.do_sample=false or generate.num_beams=1"),
        (
            {"generate__gpus_per_engine": 2, "generate__batching": "continuous", **GPU},
            "generate.batching=continuous … generate.gpus_per_engine=2 … generate.batching=static",
        ),
        (
            {"generate__max_seconds": 2, "generate__batching": "continuous"},
            "generate.batching=continuous … generate.max_seconds=2 … generate.batching=static",
        ),
        (
            {"generate__engine": "vllm", "generate__batching": "static", **GPU},
            "generate.engine=vllm … generate.batching=static … remove",
        ),
        (
            {"generate__engine": "vllm", "model__quantization": "4bit", **GPU},
            "generate.engine=vllm … model.quantization=4bit … remove",
        ),
        ({"stage": "pt", "data__default_system": ""}, "data.default_system='' … stage=pt … remove it"),
        ({"stage": "pt", "data__thinking": "keep"}, "data.thinking='keep' … stage=pt … remove it"),
        ({"stage": "pt", "data__mask_history": True}, "data.mask_history=true … stage=pt … remove it"),
        ({"stage": "pt", "data__template_options": {"a": 1}}, "data.template_options={'a': 1} … stage=pt … remove it"),
        (
            {"generate__engine": "vllm", "model__finetuning": "oft", **GPU},
            "generate.engine=vllm … LoRA … model.finetuning=oft … generate.engine=transformers",
        ),
        (
            {"generate__engine": "vllm", "model__new_tokens__special": ["<|a|>"], **GPU},
            "generate.engine=vllm … LoRA … model.new_tokens … generate.engine=transformers",
        ),
        (
            {"generate__engine": "vllm", "model__lora__extra_modules": ["lm_head"], **GPU},
            "generate.engine=vllm … LoRA … model.lora.extra_modules=['lm_head'] … generate.engine=transformers",
        ),
        (
            {"generate__every_steps": 5, "stage": "pt"},
            "generate.every_steps=5 … stage=pt trains on raw text … remove it, or set stage=sft",
        ),
        (
            {"generate__every_steps": 5, "generate__enabled": False},
            "generate.every_steps=5 … generate.enabled=false … remove every_steps",
        ),
        (
            {"generate__every_steps": 5, "data__eval": [], "data__holdout": 0.0},
            "generate.every_steps=5 needs prompts … data.eval, data.holdout or generate.sources",
        ),
        (
            {"train__optimizer": "galore", "train__zero_stage": 0},
            "train.optimizer=galore … model.finetuning=lora … full or freeze",
        ),
        (
            {"train__optimizer": "galore", "train__zero_stage": 0, "model__finetuning": "oft"},
            "train.optimizer=galore … model.finetuning=oft … full or freeze",
        ),
        (
            {
                "train__optimizer": "badam",
                "train__zero_stage": 0,
                "model__finetuning": "full",
                "scaling__num_workers": 2,
            },
            "train.optimizer=badam … scaling.num_workers=2 … 1 worker",
        ),
        (
            {"train__optimizer": "alice", "train__zero_stage": 0, "scaling__num_workers": 2},
            "train.optimizer=alice … random numbers … scaling.num_workers=2 … 1 worker",
        ),
        (
            {"train__optimizer_options": {"lr": 1e-3}},
            "train.optimizer_options contains lr … set train.learning_rate",
        ),
        (
            {"train__optimizer": "lion", "train__optimizer_options": {"weight_decay": 0.1}},
            "train.optimizer_options contains weight_decay … set train.weight_decay",
        ),
        (
            {"train__optimizer_options": {"betas": [0.9, 0.95]}},
            "train.optimizer_options contains betas … set train.betas",
        ),
        ({"train__optimizer_options": {"eps": 1e-6}}, "train.optimizer_options contains eps … set train.epsilon"),
        (
            {"train__optimizer": "lion", "train__betas": [0.9, 0.95]},
            "train.betas=[0.9, 0.95] … train.optimizer=lion … remove it, and set train.optimizer_options",
        ),
        (
            {"train__optimizer": "adabelief", "train__epsilon": 1e-6},
            "train.epsilon=1e-06 … train.optimizer=adabelief … remove it, and set train.optimizer_options",
        ),
        (
            {"train__optimizer": "sm3", "train__zero_stage": 0, "train__weight_decay": 0.1},
            "train.optimizer=sm3 … train.weight_decay=0.1 … set it to 0 or use adamw",
        ),
        (
            {"train__optimizer": "prodigy", "train__zero_stage": 0},
            "train.optimizer=prodigy … train.learning_rate … 0.0001 … set train.learning_rate=1",
        ),
        (
            {"train__optimizer": "asgd", "train__zero_stage": 0},
            "train.optimizer=asgd … train.warmup_ratio=0.03 … set train.warmup_steps=0",
        ),
        (
            {"train__optimizer": "asgd", "train__zero_stage": 0, "train__warmup_steps": 5},
            "train.optimizer=asgd … train.warmup_steps=5 … set train.warmup_steps=0",
        ),
        (
            {
                "train__optimizer": "lion",
                "train__optimizer_options": {"cautious": True},
                "train__zero_stage": 0,
                "model__dtype": "float16",
                **GPU,
            },
            "train.optimizer_options.cautious … model.dtype=float16 … bfloat16",
        ),
        (
            {
                "train__optimizer": "adai",
                "train__zero_stage": 0,
                "model__dtype": "bfloat16",
                "train__pure_bf16": True,
            },
            "train.pure_bf16=true … train.optimizer=adai … another optimizer",
        ),
        (
            {"train__optimizer": "lamb"},
            "train.optimizer=lamb … train.zero_stage=2 … set train.zero_stage=0 or use adamw",
        ),
        (
            {"train__optimizer": "adan", "train__optimizer_options": {"max_grad_norm": 1.0}},
            "train.optimizer_options.max_grad_norm … train.zero_stage=2 … remove max_grad_norm",
        ),
        (
            {
                "train__optimizer": "lion",
                "train__zero_stage": 3,
                "train__offload": {"optimizer": "nvme", "folder": "/x"},
            },
            "train.offload.optimizer=nvme … train.optimizer=lion … train.offload.optimizer=cpu",
        ),
        (
            {"train__optimizer": "paged_adamw_8bit", "train__offload__optimizer": "cpu"},
            "train.optimizer=paged_adamw_8bit … train.offload.optimizer=cpu … set it to none",
        ),
        (
            {"train__optimizer": "schedulefree_adamw"},
            "train.optimizer=schedulefree_adamw … train.schedule=cosine … train.schedule=constant_with_warmup or constant",
        ),
        (
            {"train__optimizer_target": ["q_proj"]},
            "train.optimizer_target … train.optimizer=adamw … galore, fira or apollo",
        ),
        (
            {
                "train__optimizer": "apollo",
                "train__zero_stage": 0,
                "model__finetuning": "full",
                "train__optimizer_target": ["q_(proj"],
            },
            "train.optimizer_target … 'q_(proj' … regular expression … correct it",
        ),
        (
            {"train__optimizer": "adafactor", "train__zero_stage": 0, "model__dtype": "float16", **GPU},
            "train.optimizer=adafactor … model.dtype=float16 … bfloat16",
        ),
        (
            {"model__adapters": ["a"], "model__finetuning": "full"},
            "model.adapters … lora or oft … model.finetuning=full … remove",
        ),
        ({"model__new_adapter": True}, "model.new_adapter=true … model.adapters is empty … remove"),
        ({"model__lora__pissa": True, "model__lora__dora": True}, "model.lora.pissa … model.lora.dora … only one"),
        (
            {"model__lora__pissa": True, "train__zero_stage": 3},
            "model.lora.pissa=true … train.zero_stage=3 … zero_stage=2",
        ),
        ({"model__lora__pissa": True, "model__adapters": ["a"]}, "model.lora.pissa=true … set model.new_adapter=true"),
        (
            {"model__lora__loraplus_ratio": 4, "train__optimizer": "muon", "train__zero_stage": 0},
            "model.lora.loraplus_ratio … train.optimizer=muon … use adamw",
        ),
        (
            {"train__trackers": ["wandb"], "train__tracking__project": "a/b"},
            "train.tracking.project=a/b … a project name in W&B has at most 128 characters and none of / … choose another name",
        ),
        (
            {"train__trackers": ["swanlab"], "train__tracking__project": "my project"},
            "train.tracking.project=my project … a project name in SwanLab has at most 100 characters: letters",
        ),
        (
            {"train__trackers": ["trackio"], "train__tracking__project": "a.b_system"},
            "train.tracking.project=a.b_system … trackio reserves this name … choose another name",
        ),
        (
            {"train__trackers": ["mlflow"], "train__tracking__tags": ["team=a", "what?=b"]},
            "train.tracking.tags has what?=b … MLflow",
        ),
        (
            {"model__quantization": "4bit", "model__finetuning": "full"},
            "model.quantization=4bit … model.finetuning=full … lora or oft",
        ),
        (
            {"model__quantization": "8bit", "train__zero_stage": 3},
            "model.quantization=8bit … zero_stage=3 … zero_stage=2 … 4bit",
        ),
        (
            {"model__quantization": "4bit", "model__lora__pissa": True},
            "model.lora.pissa=true … model.quantization=4bit … one",
        ),
        (
            {"model__quantization": "4bit", "model__adapters": ["a", "b"]},
            "model.quantization=4bit … model.adapters … raysft export",
        ),
        ({"model__dtype": "float16"}, "model.dtype=float16 … GPUs … scaling.use_gpu=false … use bfloat16"),
        ({"train__fp8": "torchao"}, "train.fp8=torchao … GPUs … scaling.use_gpu=false … train.fp8=off"),
        (
            {"train__fp8": "torchao", "model__dtype": "float32", **GPU},
            "train.fp8=torchao … model.dtype=float32 … use bfloat16",
        ),
        ({"model__liger": True}, "model.liger=true … GPUs … scaling.use_gpu=false … model.liger=false"),
        ({"model__attention": "flash_attention_3"}, "model.attention=flash_attention_3 … GPUs … use sdpa"),
        (
            {"train__compile": True, "train__router_aux_loss_coef": 0.01},
            "train.router_aux_loss_coef=0.01 … train.compile=true … set train.compile=false",
        ),
        (
            {"train__compile": True, "train__zero_stage": 3, "model__quantization": "4bit"},
            "train.compile=true … model.quantization=4bit … train.zero_stage=3 … set train.zero_stage=2 or train.compile=false",
        ),
        ({"model__attention": "flash_attention_2"}, "model.attention=flash_attention_2 … GPUs … use sdpa"),
        ({"model__experts": "kt"}, "model.experts=kt … bfloat16 … model.dtype=float32; set model.dtype=bfloat16"),
        *(
            ({"model__experts": "kt", "model__dtype": "bfloat16", **settings}, f"model.experts=kt … {message}")
            for settings, message in (
                ({"model__finetuning": "full"}, "model.finetuning=full; set model.finetuning=lora … zero_stage=3"),
                ({"model__finetuning": "oft"}, "model.finetuning=oft; set model.finetuning=lora"),
                ({"model__quantization": "4bit"}, "model.quantization=4bit; remove one"),
                ({"train__zero_stage": 3}, "train.zero_stage=3 … set train.zero_stage=2"),
                ({"model__liger": True, **GPU}, "model.liger=true … only one"),
                (
                    {"scaling__num_workers": 2, "scaling__sequence_parallel": 2},
                    "scaling.sequence_parallel=2; set only one",
                ),
                ({"train__compile": True}, "train.compile=true; set train.compile=false"),
                ({"train__fp8": "torchao", **GPU}, "train.fp8=torchao"),
                ({"train__loss": "asft", "train__reference_model": "r"}, "train.reference_model=r is another; remove"),
            )
        ),
        ({"train__offload__parameters": "cpu"}, "train.offload.parameters=cpu … train.zero_stage=2 … set it to 3"),
        (
            {"train__offload__optimizer": "cpu", "train__zero_stage": 0},
            "train.offload.optimizer=cpu … train.zero_stage=0 … train.offload.optimizer=none",
        ),
        ({"train__offload__optimizer": "nvme"}, "train.offload.optimizer=nvme … train.zero_stage=2 … set it to 3"),
        (
            {"train__offload__optimizer": "nvme", "train__zero_stage": 3},
            "train.offload … train.offload.folder … local disk",
        ),
        (
            {"train__loss": "dft", "train__label_smoothing": 0.1},
            "train.label_smoothing=0.1 … train.loss=dft … only one",
        ),
        (
            {"train__keep_best": True},
            "train.keep_best … train.eval_every_steps is not set; set it, or … eval_every_epochs",
        ),
        (
            {"train__keep_best": True, "train__eval_every_epochs": 1},
            "train.keep_best … no evaluation data … data.holdout",
        ),
        (
            {"train__best_metric": "eval_accuracy"},
            "train.best_metric=eval_accuracy … no setting compares … train.keep_best=true or train.early_stopping.patience",
        ),
        ({"train__best_mode": "max"}, "train.best_mode=max … no setting compares … or remove best_mode"),
        ({**COMPARES, "train__best_metric": "accuracy"}, "train.best_metric=accuracy … did you mean eval_accuracy?"),
        ({**COMPARES, "train__best_metric": "rouge-l"}, "train.best_metric=rouge-l … did you mean predict_rouge-l?"),
        (
            {"train__keep_best": True, "data__holdout": 0.1, "train__best_metric": "rouge-l"},
            "train.best_metric=rouge-l … did you mean predict_rouge-l?",
        ),
        ({**COMPARES, "train__best_metric": "eval_a_los"}, "train.best_metric=eval_a_los … did you mean eval_a_loss?"),
        (
            {**COMPARES, "train__best_metric": "f"},
            "train.best_metric=f … use one of eval_loss, … eval_b_accuracy, predict_",
        ),
        ({**COMPARES, "train__best_metric": "train_loss"}, "train.best_metric=train_loss … did you mean eval_"),
        (
            {**COMPARES, "data__eval": [{"name": "b", "path": "b"}], "train__best_metric": "eval_b_loss"},
            "train.best_metric=eval_b_loss … did you mean eval_loss?",
        ),
        (
            {**COMPARES, "train__best_metric": "eval_tokens"},
            "train.best_metric=eval_tokens … train.best_mode=null; set it to min or max",
        ),
        (
            {**COMPARES, "train__best_metric": "predict_bleu-4", "generate__enabled": False},
            "train.best_metric=predict_bleu-4 … generate.enabled=false; set it to true … train.best_metric=eval_loss",
        ),
        (
            {**COMPARES, "train__best_metric": "predict_bleu-4"},
            "train.best_metric=predict_bleu-4 … during training … generate.every_steps=null … eval_loss",
        ),
        ({"train__eval_delay": 3}, "train.eval_delay=3 … train.eval_every_steps is not set; set it, or … remove"),
        (
            {"train__early_stopping": {"patience": 2}, "train__eval_every_steps": 5},
            "train.early_stopping … no evaluation data … data.holdout",
        ),
        (
            {"model__lora__dora": True, "train__zero_stage": 3},
            "model.lora.dora=true … train.zero_stage=3 … zero_stage=2",
        ),
        (
            {
                "train__optimizer": "badam",
                "train__zero_stage": 0,
                "model__finetuning": "full",
                "train__save_every_steps": 5,
            },
            "train.optimizer=badam … train.save_every_steps=5 … remove",
        ),
        (
            {
                "train__optimizer": "badam",
                "train__zero_stage": 0,
                "model__finetuning": "full",
                "train__save_every_epochs": 0.5,
            },
            "train.optimizer=badam … train.save_every_epochs=0.5 … remove",
        ),
        (
            {"train__schedule": "constant", "train__schedule_options": {"x": 1}},
            "train.schedule=constant … train.schedule_options={'x': 1} … remove",
        ),
        (
            {"train__reference_model": "o/m"},
            "train.reference_model=o/m … train.loss=cross_entropy; set train.loss=asft",
        ),
        (
            {"train__label_smoothing": 0.1, "train__loss": "asft"},
            "train.label_smoothing=0.1 … train.loss=asft … only one",
        ),
        ({"train__pure_bf16": True}, "train.pure_bf16=true … model.dtype=float32; set model.dtype=bfloat16"),
        (
            {"train__pure_bf16": True, "model__dtype": "float16", **GPU},
            "train.pure_bf16=true … model.dtype=float16; set",
        ),
        (
            {"train__pure_bf16": True, "model__dtype": "bfloat16", "train__offload__optimizer": "cpu"},
            "train.pure_bf16=true … train.offload.optimizer=cpu … none",
        ),
        (
            {
                "train__pure_bf16": True,
                "model__dtype": "bfloat16",
                "model__finetuning": "full",
                "train__zero_stage": 0,
                "train__optimizer": "badam",
            },
            "train.pure_bf16=true … train.optimizer=badam … another optimizer",
        ),
        (
            {"train__pure_bf16": True, "model__dtype": "bfloat16", "train__optimizer": "muon"},
            "train.optimizer=muon … train.zero_stage=2",
        ),
        ({"model__freeze__layers": 0}, "config: model.freeze.layers=0 … -N"),
        ({"scaling__num_workers": [4, 1]}, "config: scaling.num_workers=[4, 1] … [min, max]"),
        ({"generate__sources": ["aa"]}, "generate.sources … 'aa' … data.eval … data.train … did you mean 'a'?"),
        ({"run__storage": "ftp://h/x"}, "config: run.storage='ftp://h/x' … s3"),
    ],
)
def test_what_contradicts_itself_is_refused(settings, message):
    with pytest.raises(RequestError) as caught:
        config(**settings)
    assert holds(str(caught.value), message)


@pytest.mark.parametrize(
    "settings",
    [
        {"train__optimizer": "muon", "train__zero_stage": 0},
        {"train__optimizer": "lion", "train__zero_stage": 3, "train__offload__optimizer": "cpu"},
        {"train__optimizer": "adamw_8bit", "model__lora__loraplus_ratio": 4},
        {"train__optimizer": "adamw_8bit", "model__dtype": "float16", **GPU},
        {"train__optimizer": "schedulefree_adamw", "train__schedule": "constant"},
        {"train__optimizer": "prodigy", "train__zero_stage": 0, "train__learning_rate": 1},
        {"train__optimizer": "lion", "train__betas": [0.9, 0.999], "train__optimizer_options": {"betas": [0.9, 0.95]}},
        {"train__optimizer": "asgd", "train__zero_stage": 0, "train__warmup_steps": 0},
        {"train__optimizer": "asgd", "train__zero_stage": 0, "train__schedule": "constant"},
        {"train__optimizer": "galore", "train__zero_stage": 0, "model__finetuning": "freeze"},
        {"model__quantization": "4bit", "model__adapters": ["a"]},
        {"model__quantization": "4bit", "train__zero_stage": 3},
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
            "train.deepspeed.zero_optimization.stage=3, but the rest of the config sets it to 2",
        ),
        ({"train_batch_size": 7}, "train.deepspeed.train_batch_size=7, but the rest of the config sets it to 32"),
        ({"optimizer": {"type": "Adam"}}, "train.deepspeed.optimizer is set by raysft"),
        (
            {"sequence_parallel_size": 2},
            "train.deepspeed.sequence_parallel_size has no effect here; remove it, or set scaling.",
        ),
        ({"activation_checkpointing": {"cpu_checkpointing": True}}, "train.offload.activations"),
        ("missing.json", "cannot be read as JSON (No such file or directory)"),
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
    # An option may need whole matrices as well.
    cautious = config(
        model__dtype="bfloat16",
        train__zero_stage=0,
        train__optimizer="lion",
        train__optimizer_options={"cautious": True},
    )
    assert deepspeed_settings(cautious, 1)["zero_optimization"]["stage"] == 0
    assert deepspeed_settings(cautious, 1)["torch_autocast"]["enabled"]


def test_pure_bfloat16_has_no_float32_copies_on_any_stage():
    pure = {"model__dtype": "bfloat16", "train__pure_bf16": True}
    for stage in (1, 2, 3):
        settings = deepspeed_settings(config(train__zero_stage=stage, **pure), 1)
        assert settings["zero_optimization"]["stage"] == stage
        assert settings["bf16"] == {
            "enabled": True, "bf16_master_weights_and_grads": True, "bf16_optimizer_states": True
        }  # fmt: skip
    for optimizer in ("adamw", "muon"):
        settings = deepspeed_settings(config(train__zero_stage=0, train__optimizer=optimizer, **pure), 1)
        assert settings["zero_optimization"]["stage"] == 0
        assert [settings[name]["enabled"] for name in ("bf16", "torch_autocast")] == [False, False]


@pytest.mark.parametrize(
    ("settings", "lowest"),
    [
        ({"train__best_metric": "eval_b_perplexity"}, True),
        ({"train__best_metric": "eval_accuracy", "train__best_mode": "min"}, True),
        ({"train__best_metric": "eval_tokens", "train__best_mode": "max"}, False),
        ({"train__best_metric": "predict_rouge-l", "generate__every_steps": 2}, False),
        ({"train__best_metric": "predict_b_bleu-4_low", "generate__every_steps": 2}, False),
        (
            {"train__best_metric": "predict_errors", "train__best_mode": "min", "generate__every_steps": 2,
             "generate__metrics": ["own.py"]},
            True,
        ),
    ],
)  # fmt: skip
def test_the_best_model_may_be_chosen_by_any_result_that_there_will_be(settings, lowest):
    train = config(**COMPARES, **settings).train
    assert train.lowest_is_best is lowest


def test_a_model_may_be_chosen_by_predictions_where_nothing_is_evaluated():
    settings = {"train__keep_best": True, "train__best_metric": "predict_rouge-l", "generate__sources": ["a"]}
    assert config(**settings, generate__every_steps=2).train.comparing_key == "train.keep_best"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"train__best_metric": "predict_bleu"}, "train.best_metric=predict_bleu … did you mean predict_bleu-4?"),
        (
            {"train__best_metric": "predict_a_rouge"},
            "train.best_metric=predict_a_rouge … did you mean predict_a_rouge-",
        ),
        (
            {"train__best_metric": "predict_errors", "generate__metrics": ["own.py"]},
            "train.best_metric=predict_errors … train.best_mode=null; set it to min or max",
        ),
        (
            {"train__best_metric": "base_predict_rouge-l"},
            "train.best_metric=base_predict_rouge-l … did you mean predict_rouge-l?",
        ),
    ],
)
def test_scores_that_no_prediction_gets_choose_no_model(settings, message):
    with pytest.raises(RequestError) as caught:
        config(**COMPARES, generate__every_steps=2, **settings)
    assert holds(str(caught.value), message)
