"""The memory of an evaluation without training: weights, what a layer computes with, and the logits of a chunk."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from raysft.cluster.placement import Node
from raysft.config import Config
from raysft.config.model import ModelSection
from raysft.config.scaling import slice_tokens
from raysft.errors import RequestError
from raysft.estimate.estimate import REFUSED, WARNED, Place, Training, place_of
from raysft.estimate.formula import Decoder, by_formula
from raysft.estimate.hardware import NodeMemory
from raysft.estimate.measure import Microbatch
from raysft.estimate.memory import CONTEXT, FRAGMENTATION, NCCL, NCCL_ONE_NODE, PROCESS
from raysft.estimate.sizes import ModelSizes, amount
from raysft.estimate.states import Setup, states


@dataclass(frozen=True)
class Evaluation:
    """What is known of an evaluation before it starts."""

    config: Config
    named: str
    """The model as messages name it, ``evaluate.model=PATH``."""
    hf_config: Any
    """The model's own config, of an adapter that of its base."""
    workers: int
    quantized: bool
    """True if the files of the weights are quantized."""
    weight_bytes: int = 0
    """Size of these files; 0 if they are not on this node."""
    adapter_bytes: int = 0
    """Size of an adapter's files."""

    @property
    def partitions(self) -> bool:
        """True if each worker holds a part of the weights."""
        return self.config.train.zero_stage == 3 and not (self.config.model.quantization or self.quantized)


@dataclass(frozen=True)
class EvaluationMemory:
    """Bytes of a worker."""

    weights: float
    """With those that ZeRO-3 gathers, or that are dequantized, while they are used."""
    activations: float
    beside: float
    """Beside those of tensors."""
    sure: float
    """Bytes that a worker needs at least."""

    @property
    def peak(self) -> float:
        """Bytes in all."""
        return self.weights + self.activations + self.beside


def evaluation_memory(asked: Evaluation, sizes: ModelSizes, place: Place) -> EvaluationMemory:
    """Compute the memory of a worker."""
    config = asked.config
    width = 4 if config.weight_dtype == "float32" else 2
    setup = Setup(
        zero_stage=3 if asked.partitions else 0,
        workers=asked.workers,
        width=width,
        offload_parameters=asked.partitions and config.train.offload.parameters != "none",
        # Of files that are not here, 4 bits are the least that methods in use keep.
        quantization=config.model.quantization or ("4bit" if asked.quantized and not asked.weight_bytes else None),
        double_quantization=config.model.double_quantization,
    )
    kept = states(replace(sizes, trained=()), setup)
    weights = kept.weights
    if asked.quantized and asked.weight_bytes:
        weights = float(asked.weight_bytes)
    weights += asked.adapter_bytes
    activations = _activations(config, asked.hf_config, width)
    gpu = place.hardware.gpu
    nccl = 0.0 if asked.workers == 1 else NCCL_ONE_NODE if place.hardware.nodes == 1 else NCCL
    beside = CONTEXT + nccl + FRAGMENTATION * activations if gpu else PROCESS
    return EvaluationMemory(weights + kept.gathered, activations, beside, weights)


def _activations(config: Config, hf_config: Any, width: int) -> float:
    """Most bytes of a forward pass without gradients: of a layer, or of the hidden states and the logits of a chunk."""
    from raysft.train.loss import CHUNK_TOKENS

    decoder, rows = Decoder.of(hf_config), config.micro_batch_size
    tokens = slice_tokens(config.data.sequence_length, config.scaling.sequence_parallel)
    found = by_formula(decoder, width, tokens, 1.0, 0, CHUNK_TOKENS, (rows,))
    layer = max(layers.forward.at(rows) for layers in found.layers)
    hidden = 2.0 * rows * tokens * width * decoder.hidden
    # The logits of a chunk in the model's type, in float32, and as log-probabilities.
    return max(layer, hidden + min(rows * tokens, CHUNK_TOKENS) * decoder.vocabulary * (width + 8.0))


def estimate_evaluation(asked: Evaluation, nodes: Sequence[Node], found: tuple[Node, NodeMemory] | None) -> str:
    """Estimate an evaluation's memory.

    Args:
        asked: what is evaluated.
        nodes: of the cluster.
        found: the node with the least memory for each worker.

    Returns:
        A line for the terminal.

    Raises:
        RequestError: it certainly does not fit.
        Exception: of any type; the model cannot be made without its weights.
    """
    config = asked.config
    training = Training(config, asked.hf_config, None, asked.workers, config.micro_batch_size, Microbatch(1, 1.0))
    place = place_of(training, nodes, found)
    needed = evaluation_memory(asked, _sizes(config, asked.hf_config), place)
    limit = place.limit
    if limit and needed.sure > REFUSED * limit + place.extra:
        raise RequestError(
            f"{asked.named}: its weights need at least {amount(needed.sure)} of memory for {place.named}, which has "
            f"{amount(limit)}; {_remedy(asked, place)}"
        )
    of = f" of {amount(limit)}" if limit else ""
    tight = f"; {_remedy(asked, place)} if it runs out" if limit and needed.peak > WARNED * limit else ""
    return (
        f"memory: about {amount(needed.peak)}{of} for {place.named} (weights {amount(needed.weights)}, "
        f"activations {amount(needed.activations)}){tight}"
    )


def _remedy(asked: Evaluation, place: Place) -> str:
    model, more = asked.config.model, "a larger GPU" if place.hardware.gpu else "nodes with more memory"
    if not model.quantization and not asked.quantized:
        partition = "" if asked.partitions else "train.zero_stage=3 with more workers, "
        return f"use {partition}model.quantization=4bit, or {more}"
    return f"use {more}, or fewer workers on a node" if not place.hardware.gpu else f"use {more}"


def _sizes(config: Config, hf_config: Any) -> ModelSizes:
    from raysft.estimate.fake_model import model_without_weights, sizes_of

    plain = copy.deepcopy(hf_config)
    for each in {id(part): part for part in (plain, plain.get_text_config())}.values():
        if getattr(each, "quantization_config", None) is not None:
            del each.quantization_config
    given = config.model
    model = ModelSection(
        path=given.path,
        dtype=given.dtype,
        attention=given.attention,
        trust_remote_code=given.trust_remote_code,
        finetuning="full",
    )
    train = config.train.model_copy(update={"gradient_checkpointing": False})
    return sizes_of(model_without_weights(config.model_copy(update={"model": model, "train": train}), plain))
