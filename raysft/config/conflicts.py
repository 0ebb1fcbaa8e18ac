"""Settings that cannot be combined, found before anything starts.

Each message says which setting requires what, the value that conflicts with it, and what to change.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterator

from raysft.config.config import Config
from raysft.config.conflicts_best import best_model
from raysft.config.conflicts_experts import experts_conflicts
from raysft.config.conflicts_generation import step_generation
from raysft.config.conflicts_loss import loss_conflicts
from raysft.config.conflicts_optimizer import optimizer_conflicts
from raysft.config.conflicts_pure_bf16 import pure_bf16_conflicts
from raysft.config.conflicts_sequence import sequence_conflicts
from raysft.config.conflicts_tracking import tracking
from raysft.config.data import OF_CONVERSATIONS, DataSection
from raysft.errors import RequestError, as_yaml


def refuse_conflicts(config: Config) -> None:
    """Refuse a config whose settings contradict each other.

    Raises:
        RequestError: names the first conflict.
    """
    for problem in _conflicts(config):
        raise RequestError(problem)


def _conflicts(config: Config) -> Iterator[str]:
    yield from _raw_text(config)
    yield from optimizer_conflicts(config)
    yield from _adapters(config)
    yield from _parts(config)
    if config.model.finetuning == "lora":
        yield from _lora(config)
    if config.model.quantization:
        yield from _quantization(config)
    yield from _precision(config)
    yield from pure_bf16_conflicts(config)
    yield from experts_conflicts(config)
    yield from _offload(config)
    yield from _schedule(config)
    yield from loss_conflicts(config)
    yield from sequence_conflicts(config)
    yield from step_generation(config)
    yield from tracking(config)
    yield from _evaluation(config)
    if config.generate.enabled:
        yield from _generation(config)
        if config.generate.engine == "vllm":
            yield from _vllm(config)
    yield from _generation_sources(config)


def _raw_text(config: Config) -> Iterator[str]:
    for key in OF_CONVERSATIONS if config.stage == "pt" else ():
        value = getattr(config.data, key)
        if value != DataSection.model_fields[key].default:
            yield f"data.{key}={as_yaml(value)} is for conversations, but stage=pt trains on raw text; remove it"


def _adapters(config: Config) -> Iterator[str]:
    model = config.model
    if model.adapters and model.adapter is None:
        yield (
            f"model.adapters requires model.finetuning=lora or oft, but model.finetuning={model.finetuning}; "
            "use one of them or remove model.adapters"
        )
    if model.new_adapter and not model.adapters:
        yield (
            "model.new_adapter=true requires adapters to merge, but model.adapters is empty; "
            "list them or remove model.new_adapter"
        )


def _parts(config: Config) -> Iterator[str]:
    model, named = config.model, f"model.train_parts={as_yaml(config.model.train_parts)}"
    if model.adapter is not None and model.train_parts == ["projector"]:
        yield (
            f"model.finetuning={model.finetuning} needs language or vision, which can have adapters, but {named}; set "
            "model.finetuning=full, which trains only the projector, or add one of them"
        )
    if "language" in model.train_parts:
        return
    if model.finetuning == "freeze":
        yield (
            f"model.finetuning=freeze trains layers of the language model, but {named}; set model.finetuning=full, which "
            "trains only these parts, or add language"
        )
    if model.new_tokens.tokens:
        yield f"model.new_tokens requires trained embeddings, but {named}; add language, or remove model.new_tokens"
    if model.new_layers:
        yield (
            f"model.new_layers={model.new_layers} adds layers to the language model, but {named}; "
            "add language, or remove model.new_layers"
        )


def _lora(config: Config) -> Iterator[str]:
    lora, model, train = config.model.lora, config.model, config.train
    if lora.pissa and lora.dora:
        yield "model.lora.pissa and model.lora.dora both change how an adapter is initialized; set only one of them"
    if lora.dora and train.zero_stage == 3:
        yield (
            "model.lora.dora=true requires the norms of whole weights, but train.zero_stage=3 partitions the weights; set "
            "train.zero_stage=2"
        )
    if lora.pissa and train.zero_stage == 3:
        yield (
            "model.lora.pissa=true decomposes whole weights, but train.zero_stage=3 partitions them; set train.zero_stage=2"
        )
    if lora.pissa and model.adapters and not model.new_adapter:
        yield (
            "model.lora.pissa=true initializes a new adapter, but model.adapters continues an existing one; "
            "set model.new_adapter=true or model.lora.pissa=false"
        )


def _quantization(config: Config) -> Iterator[str]:
    model = config.model
    named = f"model.quantization={model.quantization}"
    trains = config.evaluate.model is None  # else no verb does
    if trains and model.adapter is None:
        yield (
            f"{named} freezes the weights, but model.finetuning={model.finetuning} trains them; "
            "set model.finetuning to lora or oft"
        )
    if trains and config.train.zero_stage == 3 and model.quantization == "8bit":
        yield (
            f"{named} keeps whole weights on each worker, but train.zero_stage=3 partitions them; set train.zero_stage=2, or "
            "use 4bit"
        )
    if model.finetuning == "lora" and model.lora.pissa:
        yield f"model.lora.pissa=true requires unquantized weights, but {named}; set only one of them"
    if len(model.adapters) > 1 or (model.adapters and model.new_adapter):
        yield (
            f"{named} cannot merge adapters, but model.adapters lists adapters to merge; merge them first with raysft export, "
            "or list only the one to continue training"
        )


def _precision(config: Config) -> Iterator[str]:
    model, train, use_gpu = config.model, config.train, config.scaling.use_gpu
    if config.dtype == "float16" and not use_gpu:
        yield (
            "model.dtype=float16 requires GPUs, but scaling.use_gpu=false; "
            "use bfloat16 or float32, or set scaling.use_gpu=true"
        )
    if train.fp8 != "off":
        if not use_gpu:
            yield f"train.fp8={train.fp8} requires GPUs, but scaling.use_gpu=false; set train.fp8=off or scaling.use_gpu=true"
        if config.dtype != "bfloat16":
            yield f"train.fp8={train.fp8} requires model.dtype=bfloat16, but model.dtype={config.dtype}; use bfloat16"
        if model.quantization:
            yield (
                f"train.fp8={train.fp8} requires unquantized weights, but model.quantization={model.quantization}; "
                "set only one of them"
            )
    if train.compile and train.zero_stage == 3 and model.quantization:
        yield (
            f"train.compile=true compiles whole layers, but model.quantization={model.quantization} and train.zero_stage=3 "
            "gather the weights of one matrix at a time; set train.zero_stage=2 or train.compile=false"
        )
    if train.compile and train.router_aux_loss_coef:
        yield (
            f"train.router_aux_loss_coef={train.router_aux_loss_coef:g} reads the routers' outputs inside layers, but "
            "train.compile=true compiles the layers; set train.compile=false"
        )
    if model.liger and not use_gpu:
        yield "model.liger=true requires GPUs, but scaling.use_gpu=false; set scaling.use_gpu=true or model.liger=false"
    if model.attention.startswith("flash_") and not use_gpu:
        yield (
            f"model.attention={model.attention} requires GPUs, but scaling.use_gpu=false; use sdpa or set scaling.use_gpu=true"
        )
    if model.attention.startswith("flash_") and config.dtype == "float32":
        yield (
            f"model.attention={model.attention} requires a 16-bit data type, but model.dtype=float32; use bfloat16, or use sdpa"
        )


def _offload(config: Config) -> Iterator[str]:
    train = config.train
    optimizer, parameters = train.offload.optimizer, train.offload.parameters
    if parameters != "none" and train.zero_stage != 3:
        yield (
            f"train.offload.parameters={parameters} requires train.zero_stage=3, but train.zero_stage={train.zero_stage}; "
            "set it to 3, or offload only the optimizer"
        )
    if optimizer != "none" and train.zero_stage == 0:
        yield (
            f"train.offload.optimizer={optimizer} requires train.zero_stage=1, 2 or 3, but train.zero_stage=0; "
            "use one of them or set train.offload.optimizer=none"
        )
    if optimizer == "nvme" and train.zero_stage != 3:
        yield (
            f"train.offload.optimizer=nvme requires train.zero_stage=3, but train.zero_stage={train.zero_stage}; "
            "set it to 3, or use cpu"
        )
    for key, value, usual in (
        ("train.offload.activations", train.offload.activations, "none"),
        ("train.recompute_layers", train.recompute_layers, None),
    ):
        if value != usual and not train.gradient_checkpointing:
            yield (
                f"{key}={value} applies to recomputed layers, but train.gradient_checkpointing=false; set it to true, or "
                f"remove {key}"
            )
    if "nvme" in (optimizer, parameters) and not train.offload.folder:
        yield (
            "train.offload to nvme requires a folder, but train.offload.folder is not set; set it to a folder on a local disk"
        )


def _schedule(config: Config) -> Iterator[str]:
    train = config.train
    if train.schedule in ("constant", "constant_with_warmup") and train.schedule_options:
        yield (
            f"train.schedule={train.schedule} has no options, but train.schedule_options={train.schedule_options}; remove them"
        )


def _evaluation(config: Config) -> Iterator[str]:
    train = config.train
    if train.eval_delay and not train.evaluates_on_the_way:
        yield (
            f"train.eval_delay={train.eval_delay:g} delays the evaluations during training, but train.eval_every_steps is not "
            "set; set it, or train.eval_every_epochs, or remove eval_delay"
        )
    yield from best_model(config)


def _generation(config: Config) -> Iterator[str]:
    generate = config.generate
    if generate.num_beams > 1 and generate.do_sample:
        yield (
            f"generate.num_beams={generate.num_beams} (beam search) requires generate.do_sample=false, but it is True; "
            "set generate.do_sample=false or generate.num_beams=1"
        )
    if generate.gpus_per_engine > 1 and not config.scaling.use_gpu:
        yield (
            f"generate.gpus_per_engine={generate.gpus_per_engine} requires GPUs, but scaling.use_gpu=false; "
            "set scaling.use_gpu=true or remove gpus_per_engine"
        )
    if generate.batching != "continuous":
        return
    remedy = "set generate.batching=static or"
    if generate.num_beams > 1:
        yield (
            f"generate.batching=continuous does not support beam search, but generate.num_beams={generate.num_beams}; "
            f"{remedy} generate.num_beams=1"
        )
    if generate.gpus_per_engine > 1:
        yield (
            f"generate.batching=continuous supports one GPU per engine, but generate.gpus_per_engine="
            f"{generate.gpus_per_engine}; {remedy} generate.gpus_per_engine=1"
        )
    if generate.max_seconds is not None:
        yield (
            "generate.batching=continuous cannot limit the time of a batch, but "
            f"generate.max_seconds={generate.max_seconds:g}; {remedy} remove max_seconds"
        )


def _vllm(config: Config) -> Iterator[str]:
    generate, model = config.generate, config.model
    alternative = "or set generate.engine=transformers"
    if generate.num_beams > 1:
        yield (
            f"generate.engine=vllm does not support beam search, but generate.num_beams={generate.num_beams}; "
            f"set generate.num_beams=1, {alternative}"
        )
    if generate.max_seconds is not None:
        yield (
            f"generate.engine=vllm cannot limit the time of a batch, but generate.max_seconds={generate.max_seconds:g}; remove "
            f"max_seconds, {alternative}"
        )
    if generate.batching != "auto":
        yield (
            f"generate.engine=vllm does its own batching, but generate.batching={generate.batching}; "
            f"remove batching, {alternative}"
        )
    if model.quantization:
        yield (
            f"generate.engine=vllm loads weights unquantized, but model.quantization={model.quantization}; "
            f"remove it, {alternative}"
        )
    unsupported = ""
    if config.stage == "sft" and model.finetuning == "oft":
        unsupported = "model.finetuning=oft"
    elif config.stage == "sft" and model.finetuning == "lora" and model.lora.dora:
        unsupported = "model.lora.dora=true"
    elif config.stage == "sft" and model.finetuning == "lora" and model.lora.extra_modules:
        unsupported = f"model.lora.extra_modules={model.lora.extra_modules}"
    elif config.stage == "sft" and model.finetuning == "lora" and model.new_tokens.tokens:
        unsupported = "model.new_tokens trains the embeddings along with them"
    if unsupported:
        yield f"generate.engine=vllm supports only plain LoRA adapters, but {unsupported}; change that, {alternative}"


def _generation_sources(config: Config) -> Iterator[str]:
    known = [source.name for source in (*config.data.eval, *config.data.train)]
    for name in config.generate.sources:
        if name not in known:
            close = difflib.get_close_matches(name, known, n=1)
            hint = f"did you mean {close[0]!r}?" if close else f"use one of {', '.join(known):.200}"
            yield f"generate.sources contains {name!r}, but neither data.eval nor data.train has such a source; {hint}"
