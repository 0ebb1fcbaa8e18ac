"""The model of a checkpoint, written as the training would have written it after that step; without Ray, workers or GPUs."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import torch

from raysft.config import Config
from raysft.train.checkpoint.resume import ResumePoint
from raysft.train.checkpoint.weights import read_weights
from raysft.train.export import save
from raysft.train.finetuning import load_model
from raysft.train.job import TrainJob

WRAPPED = "model."
"""What the names of weights begin with in checkpoints: the engine wraps a model in its loss (``TokenLoss.model``)."""


def trained_dtype(config: Config) -> str:
    """Return the data type of the weights that a training computes with."""
    return "float32" if config.autocast else config.dtype


def for_reading(config: Config) -> Config:
    """Return a run's config without what only its workers need: GPUs, kernels, optimizers and other packages.

    The weights keep their data type. Those that bitsandbytes quantizes stay exact: no checkpoint has them.
    """
    model = {"dtype": trained_dtype(config), "attention": "auto", "liger": False, "quantization": None}
    train = {
        "optimizer": "adamw", "deepspeed": {}, "gradient_checkpointing": False, "fp8": "off",
        "loss": "cross_entropy", "reference_model": None,
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
        RequestError: the checkpoint belongs to another model.
    """
    model = load_model(job.config, job.model, torch.device("cpu"), job.adapter)
    try:
        adapts = hasattr(model, "peft_config")
        _convert(model, job.config, adapts)
        trained = {name: parameter.data for name, parameter in model.named_parameters() if parameter.requires_grad}
        read_weights(checkpoint, {WRAPPED + name: weight for name, weight in trained.items()})
        weights = trained
        if not adapts:
            weights = {name: parameter.data for name, parameter in model.named_parameters()}
        save(model, weights, job.tokenizer(), folder, job.ends)
    finally:
        shutil.rmtree(getattr(model, "pissa_start", ""), ignore_errors=True)


def _convert(model: Any, config: Config, adapts: bool) -> None:
    """Convert weights as the engine does: all of them to the model's data type, but ZeRO-3 leaves adapters in float32."""
    dtype, partitioned = getattr(torch, config.dtype), adapts and config.train.zero_stage == 3
    for parameter in model.parameters():
        if parameter.is_floating_point() and not (partitioned and parameter.requires_grad):
            parameter.data = parameter.data.to(dtype).contiguous()
