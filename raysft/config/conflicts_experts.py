"""Settings that experts in KTransformers' kernel (``model.experts: kt``) cannot be combined with."""

from __future__ import annotations

from collections.abc import Iterator

from raysft.config.config import Config


def experts_conflicts(config: Config) -> Iterator[str]:
    """Yield what contradicts the experts' kernel."""
    model, train = config.model, config.train
    if model.experts != "kt":
        return
    named = "model.experts=kt"
    trains = config.evaluate.model is None  # else no verb does
    if trains and model.finetuning != "lora":
        yield (
            f"{named} freezes the experts and trains LoRA adapters on them, but model.finetuning={model.finetuning}; set "
            "model.finetuning=lora, or model.experts=auto with train.zero_stage=3 and train.offload.parameters=cpu"
        )
    if model.quantization:
        yield f"{named} computes with bfloat16 weights, but model.quantization={model.quantization}; remove one of them"
    if config.dtype != "bfloat16":
        yield f"{named} computes in bfloat16, but model.dtype={config.dtype}; set model.dtype=bfloat16"
    if train.zero_stage == 3:
        yield f"{named} needs whole experts on each node, but train.zero_stage=3 partitions them; set train.zero_stage=2"
    if model.liger:
        yield f"{named} and model.liger=true both replace the experts' computation; set only one of them"
    if (size := config.scaling.sequence_parallel) > 1:
        yield f"{named} has not been tested with scaling.sequence_parallel={size}; set only one of them"
    if train.compile:
        yield f"{named} runs the experts outside of compiled layers, but train.compile=true; set train.compile=false"
    if train.fp8 != "off":
        yield f"{named} computes in bfloat16, but train.fp8={train.fp8}; remove one of them"
    if train.reference_model is not None:
        yield (
            f"{named} holds the experts of one model, but train.reference_model={train.reference_model} is another; remove "
            "train.reference_model to use the model that training starts from, or set model.experts=auto"
        )
