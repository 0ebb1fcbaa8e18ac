"""The ``model`` and ``train`` sections: what is trained, and how."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from raysft.config.section import Beta, Count, Fraction, Positive, Section, Text


class LoraSection(Section):
    rank: Positive = 8
    """Rank of the adapter matrices."""
    alpha: Annotated[float, Field(gt=0)] | None = None
    """Scale of the adapter; the update is multiplied by alpha / rank. Default: 2 · rank."""
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Dropout on the adapter's input."""
    target: Literal["all"] | list[str] = "all"
    """``all``: every linear layer but the output head; or a list of module names."""


class ModelSection(Section):
    path: Text
    """Model folder, Hugging Face hub id, ``*.gguf`` file, or ``package:NAME/FILE`` inside an installed Python package."""
    chat_template: Text | None = None
    """Chat template to use instead of the tokenizer's own, and to save with the model: a name (``chatml``, ``llama3``,
    ``gemma``, ``alpaca``, ``vicuna``) or a ``*.jinja`` file."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Type of the weights in training and generation. ``auto``: bfloat16 on GPU, float32 on CPU."""
    finetuning: Literal["full", "lora"] = "lora"
    """What is trained: all weights, or low-rank adapters."""
    lora: LoraSection = LoraSection()
    """Adapter settings, used when ``finetuning`` is lora."""


class TrainSection(Section):
    epochs: Positive = 1
    """Times that every example is trained on."""
    max_steps: Positive | None = None
    """Stop after this many optimizer steps, if that comes before the end of the epochs."""
    rows_per_step: Positive = 32
    """Rows in one optimizer step over all workers together, whatever their number."""
    rows_per_device: Positive = 1
    """Rows that one worker computes at once; more are accumulated."""
    learning_rate: Annotated[float, Field(gt=0)] = 1e-4
    """Highest learning rate of the schedule."""
    optimizer: Literal["adamw"] = "adamw"
    """The optimizer."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    """Decoupled weight decay."""
    betas: tuple[Beta, Beta] = (0.9, 0.999)
    """Adam's decay rates of the first and second moment."""
    epsilon: Annotated[float, Field(gt=0)] = 1e-8
    """Adam's term that keeps the division finite."""
    max_grad_norm: Annotated[float, Field(ge=0)] = 1.0
    """Gradients are scaled down to this global norm; 0 switches clipping off."""
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    """Course of the learning rate after warm-up, over the exact number of steps."""
    warmup_ratio: Fraction = 0.03
    """Share of the steps in which the learning rate rises from 0."""
    loss: Literal["cross_entropy"] = "cross_entropy"
    """Loss of a trained token; a step's loss is the sum over its trained tokens divided by their number."""
    zero_stage: Literal[0, 1, 2, 3] = 2
    """DeepSpeed ZeRO stage: what the workers share out: nothing, optimizer states, gradients too, weights too."""
    eval_at_start: bool = True
    """Evaluate before the first step as well, so that a run shows what it changed."""
    eval_every_steps: Positive | None = None
    """Evaluate every N steps; always at the end."""
    save_every_steps: Positive | None = None
    """Write a checkpoint to resume from every N steps, and at the end. Default: only the trained model is written."""
    max_failures: Count = 3
    """How often the workers are started again from the newest checkpoint after one of them died."""
