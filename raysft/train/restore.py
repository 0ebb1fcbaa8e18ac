"""The model of a checkpoint, written as the training would have written it after that step; without Ray, workers or GPUs."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import torch

from raysft.config import Config
from raysft.config.optimizers import kind_of
from raysft.train.checkpoint.parts import read_state
from raysft.train.checkpoint.resume import ResumePoint
from raysft.train.checkpoint.weights import read_weights
from raysft.train.export import save
from raysft.train.finetuning import load_model
from raysft.train.job import TrainJob
from raysft.train.optim import make_optimizer

AVERAGED = "z"
"""The state of schedule-free optimizers from which, with the trained weights, their average is computed."""
WRAPPED = "model."
"""Prefix of weight names in checkpoints: the engine wraps a model in its loss (``TokenLoss.model``)."""


def for_reading(config: Config) -> Config:
    """Return a run's config without what only its workers need: GPUs, kernels, optimizers and other packages.

    The weights keep their data type. Those that bitsandbytes quantizes stay exact: no checkpoint has them. An optimizer that
    averages weights also stays: a checkpoint has the weights being trained, and the model is their average.
    """
    averages = kind_of(config.train.optimizer).averages
    model = {"dtype": config.weight_dtype, "attention": "auto", "liger": False, "quantization": None}
    train = {
        "optimizer": config.train.optimizer if averages else "adamw", "deepspeed": {}, "gradient_checkpointing": False,
        "recompute_layers": None, "offload": config.train.offload.model_copy(update={"activations": "none"}),
        "fp8": "off", "loss": "cross_entropy", "reference_model": None,
    }  # fmt: skip
    sections: dict[str, dict[str, Any]] = {
        "model": model, "train": train, "scaling": {"use_gpu": False}, "generate": {"enabled": False},
    }  # fmt: skip
    changed = {name: getattr(config, name).model_copy(update=values) for name, values in sections.items()}
    return config.model_copy(update=changed)


def write_model(job: TrainJob, checkpoint: ResumePoint, folder: Path) -> None:
    """Write the model or adapter of a checkpoint.

    Args:
        job: the training, with a config from ``for_reading``.
        checkpoint: a complete one.
        folder: a new local folder.

    Raises:
        CorruptCheckpoint: a file differs from what was written.
        RequestError: the checkpoint belongs to another model, or the package of an optimizer that averages is not installed.
    """
    model = load_model(job.config, job.model, torch.device("cpu"), job.adapter)
    try:
        adapts = hasattr(model, "peft_config")
        if kind_of(job.config.train.optimizer).averages:
            _average(model, job.config, checkpoint)
        else:
            _convert(model, job.config, adapts)
            read_weights(checkpoint, _trained(model))
        _convert(model, job.config, adapts)
        weights = {
            name: parameter.data
            for name, parameter in model.named_parameters()
            if parameter.requires_grad or not adapts
        }
        save(model, weights, job.tokenizer(), folder, job.ends)
    finally:
        shutil.rmtree(getattr(model, "pissa_start", ""), ignore_errors=True)


def _trained(model: Any) -> dict[str, torch.Tensor]:
    return {WRAPPED + name: weight.data for name, weight in model.named_parameters() if weight.requires_grad}


def _average(model: Any, config: Config, checkpoint: ResumePoint) -> None:
    """Read the trained weights in the data type that the optimizer uses, and have it average them."""
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.to(torch.bfloat16 if config.train.pure_bf16 else torch.float32).contiguous()
    trained = _trained(model)
    read_weights(checkpoint, trained)
    optimizer: Any = make_optimizer(model, config.train)
    if kind_of(config.train.optimizer).elementwise:
        start = {name: weight.clone() for name, weight in trained.items()}  # their average is the weights themselves
        read_weights(checkpoint, start, AVERAGED)
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                optimizer.state[parameter][AVERAGED] = start[WRAPPED + name]
    else:
        optimizer.load_state_dict(read_state(checkpoint.path, checkpoint.path, 0)["optimizer"])
    optimizer.eval()


def _convert(model: Any, config: Config, adapts: bool) -> None:
    """Convert weights as the engine does: all of them to the model's data type, except that ZeRO-3 leaves adapters in float32."""
    dtype, partitioned = getattr(torch, config.dtype), adapts and config.train.zero_stage == 3
    for parameter in model.parameters():
        if parameter.is_floating_point() and not (partitioned and parameter.requires_grad):
            parameter.data = parameter.data.to(dtype).contiguous()
