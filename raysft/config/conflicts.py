"""Settings of a training that cannot go together, found before anything starts."""

from __future__ import annotations

import difflib
from collections.abc import Iterator

from raysft.config.config import Config
from raysft.config.train import ZERO_OPTIMIZERS
from raysft.errors import RequestError


def refuse(config: Config) -> None:
    """Raise what speaks against a config first.

    Raises:
        RequestError: two of its settings contradict each other.
    """
    for problem in _problems(config):
        raise RequestError(problem)


def _problems(config: Config) -> Iterator[str]:
    yield from _of_optimizers(config)
    yield from _of_adapters(config)
    yield from _of_precision(config)
    yield from _of_offload(config)
    yield from _of_schedule(config)
    yield from _of_losses(config)
    yield from _of_evaluation(config)
    yield from _of_generation(config)
    yield from _of_sources(config)


def _of_optimizers(config: Config) -> Iterator[str]:
    train, finetuning = config.train, config.model.finetuning
    trains_adapter = config.model.adapter is not None
    name = train.optimizer
    if name not in ZERO_OPTIMIZERS:
        if train.zero_stage:
            yield (
                f"train.optimizer={name} needs whole matrices and train.zero_stage={train.zero_stage} cuts them into parts; "
                "set train.zero_stage=0, or take adamw"
            )
        if config.dtype == "float16":
            yield f"train.optimizer={name} has no loss scaling for model.dtype=float16; use bfloat16 or float32"
    if name in ("galore", "apollo", "badam") and trains_adapter:
        yield (
            f"train.optimizer={name} saves memory where whole matrices are trained, and model.finetuning={finetuning} trains "
            "small ones; set model.finetuning to full or freeze, or take adamw"
        )
    if name == "apollo" and config.scaling.most_workers > 1:
        yield (
            f"train.optimizer=apollo draws random projections, in each worker other ones, and scaling.num_workers="
            f"{config.scaling.num_workers}; use 1 worker, or another optimizer"
        )
    if not train.resumes and train.save_every_steps:
        yield (
            f"train.optimizer=badam keeps the state of one block at a time and cannot go on from a checkpoint, and "
            f"train.save_every_steps={train.save_every_steps}; take it out, or use another optimizer"
        )
    if name == "badam" and config.scaling.most_workers > 1:
        yield (
            f"train.optimizer=badam trains one block at a time in one worker and scaling.num_workers={config.scaling.num_workers}; "
            "use 1 worker, or another optimizer"
        )


def _of_generation(config: Config) -> Iterator[str]:
    generate = config.generate
    if generate.enabled and generate.num_beams > 1 and generate.do_sample:
        yield (
            f"generate.num_beams={generate.num_beams} searches and generate.do_sample=True draws; "
            "set generate.do_sample=false, or generate.num_beams=1"
        )
    if generate.enabled and generate.gpus_per_engine > 1 and not config.scaling.use_gpu:
        yield f"generate.gpus_per_engine={generate.gpus_per_engine} goes with scaling.use_gpu=true; set it, or take it out"
    if generate.enabled and generate.batching == "continuous":
        if generate.num_beams > 1:
            yield (
                f"generate.batching=continuous has no beams and generate.num_beams={generate.num_beams}; "
                "set generate.batching=static, or generate.num_beams=1"
            )
        if generate.gpus_per_engine > 1:
            yield (
                f"generate.batching=continuous keeps its cache on one GPU and generate.gpus_per_engine="
                f"{generate.gpus_per_engine}; set generate.batching=static, or generate.gpus_per_engine=1"
            )
        if generate.max_seconds is not None:
            yield (
                f"generate.batching=continuous has no batches to time and generate.max_seconds={generate.max_seconds:g}; "
                "set generate.batching=static, or take max_seconds out"
            )
    if generate.enabled and generate.engine == "vllm":
        yield from _of_vllm(config)


def _of_vllm(config: Config) -> Iterator[str]:
    generate, model, other = config.generate, config.model, "or generate.engine=transformers"
    if not config.scaling.use_gpu:
        yield f"generate.engine=vllm needs GPUs and scaling.use_gpu=False; set scaling.use_gpu=true, {other}"
    if generate.num_beams > 1:
        yield f"generate.engine=vllm has no beams and generate.num_beams={generate.num_beams}; use generate.num_beams=1, {other}"
    if generate.max_seconds is not None:
        yield (
            f"generate.engine=vllm has no batches to time and generate.max_seconds={generate.max_seconds:g}; "
            f"take max_seconds out, {other}"
        )
    if generate.batching != "auto":
        yield f"generate.engine=vllm batches by itself and generate.batching={generate.batching}; take batching out, {other}"
    if model.quantization:
        yield f"generate.engine=vllm loads weights as they are and model.quantization={model.quantization}; take it out, {other}"
    if config.stage != "sft" or model.adapter is None:
        return
    adapter = "oft" if model.finetuning == "oft" else "lora.dora" if model.lora.dora else ""
    adapter = adapter or ("lora.extra_modules" if model.lora.extra_modules else "")
    if adapter:
        yield f"generate.engine=vllm takes plain LoRA adapters alone and the config asks for {adapter}; leave it out, {other}"


def _of_sources(config: Config) -> Iterator[str]:
    known = [source.name for source in (*config.data.eval, *config.data.train)]
    for name in config.generate.sources:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"there are {', '.join(known):.200}"
            yield f"generate.sources names {name!r}, which is no source of data.eval or data.train; {hint}"


def _of_adapters(config: Config) -> Iterator[str]:
    model, train = config.model, config.train
    lora = model.lora
    if model.adapters and model.adapter is None:
        yield f"model.adapters goes with model.finetuning lora or oft, and it is {model.finetuning}; set one of them"
    if model.new_adapter and not model.adapters:
        yield "model.new_adapter=True and model.adapters names none to merge; name them, or take new_adapter out"
    if model.finetuning == "lora":
        if lora.pissa and lora.dora:
            yield "model.lora.pissa and model.lora.dora both change what an adapter begins with; set one of them"
        if lora.dora and train.zero_stage == 3:
            yield "model.lora.dora needs the norms of whole weights and train.zero_stage=3 shares them out; use zero_stage 2"
        if lora.pissa and train.zero_stage == 3:
            yield "model.lora.pissa takes whole weights apart and train.zero_stage=3 shares them out; use zero_stage 2"
        if lora.pissa and model.adapters and not model.new_adapter:
            yield "model.lora.pissa begins a new adapter and model.adapters goes on with one; set model.new_adapter=true"
        if lora.loraplus_ratio is not None and train.optimizer != "adamw":
            yield f"model.lora.loraplus_ratio goes with train.optimizer=adamw and it is {train.optimizer}; use adamw"
    if model.quantization:
        if model.adapter is None:
            yield (
                f"model.quantization={model.quantization} freezes the weights and model.finetuning={model.finetuning} trains them; "
                "use lora or oft"
            )
        if train.zero_stage == 3:
            yield (
                f"model.quantization={model.quantization} and train.zero_stage=3: quantized weights cannot be shared out; "
                "use zero_stage 2"
            )
        if model.finetuning == "lora" and lora.pissa:
            yield f"model.lora.pissa needs exact weights and model.quantization={model.quantization} rounds them; set one of them"
        if len(model.adapters) > 1 or (model.adapters and model.new_adapter):
            yield (
                f"model.quantization={model.quantization} takes one adapter to go on with and cannot merge others; "
                "merge them first (raysft export)"
            )


def _of_precision(config: Config) -> Iterator[str]:
    if config.dtype == "float16" and not config.scaling.use_gpu:
        yield "model.dtype=float16 trains on GPUs only; use bfloat16 or float32, or set scaling.use_gpu=true"
    if config.train.fp8 != "off":
        if not config.scaling.use_gpu:
            yield f"train.fp8={config.train.fp8} needs a GPU of the Hopper generation or later; set train.fp8=off"
        if config.dtype != "bfloat16":
            yield f"train.fp8={config.train.fp8} goes with model.dtype=bfloat16 and it is {config.dtype}; use bfloat16"
        if config.model.quantization:
            yield f"train.fp8={config.train.fp8} and model.quantization={config.model.quantization} both set types; set one"
    if config.model.liger and not config.scaling.use_gpu:
        yield "model.liger=True needs GPUs; set scaling.use_gpu=true, or model.liger=false"
    if config.model.attention == "flash_attention_2" and not config.scaling.use_gpu:
        yield "model.attention=flash_attention_2 needs GPUs; use sdpa, or set scaling.use_gpu=true"
    if config.model.attention == "flash_attention_2" and config.dtype == "float32":
        yield "model.attention=flash_attention_2 computes in 16 bits and model.dtype=float32; use bfloat16, or sdpa"


def _of_offload(config: Config) -> Iterator[str]:
    train = config.train
    optimizer, parameters = train.offload.optimizer, train.offload.parameters
    if parameters != "none" and train.zero_stage != 3:
        yield (
            f"train.offload.parameters={parameters} goes with train.zero_stage=3 and it is {train.zero_stage}; "
            "use 3, or offload the optimizer alone"
        )
    if optimizer != "none" and train.zero_stage == 0:
        yield f"train.offload.optimizer={optimizer} goes with train.zero_stage 1 to 3 and it is 0; use one of them"
    if optimizer == "nvme" and train.zero_stage != 3:
        yield f"train.offload.optimizer=nvme goes with train.zero_stage=3 and it is {train.zero_stage}; use 3, or cpu"
    if "nvme" in (optimizer, parameters) and not train.offload.folder:
        yield "train.offload on nvme has no folder; set train.offload.folder to one on a local disk"


def _of_schedule(config: Config) -> Iterator[str]:
    train = config.train
    if train.schedule in ("constant", "constant_with_warmup") and train.schedule_options:
        yield (
            f"train.schedule={train.schedule} takes no options and train.schedule_options={train.schedule_options}; "
            "take them out"
        )


def _of_losses(config: Config) -> Iterator[str]:
    if config.train.label_smoothing and config.train.loss != "cross_entropy":
        yield (
            f"train.label_smoothing={config.train.label_smoothing:g} and train.loss={config.train.loss}: both change what is "
            "asked of a token; set one of them"
        )


def _of_evaluation(config: Config) -> Iterator[str]:
    train = config.train
    wanted = [
        f"train.{name}"
        for name, on in (("early_stopping", train.early_stopping.patience), ("keep_best", train.keep_best))
        if on
    ]
    if wanted and not train.eval_every_steps:
        yield f"{wanted[0]} compares evaluations and train.eval_every_steps is not set; set it"
    if wanted and not config.data.eval and not config.data.holdout:
        yield f"{wanted[0]} compares evaluations and there is nothing to evaluate on; name data.eval or set data.holdout above 0"
