"""Activations of a training run, measured on the real classes of its model without their memory.

A model of the first layer and of one layer of each other kind runs forward and backward on fake tensors, with the training's own
loss, adapters, attention and recomputation, while ``LiveBytes`` counts. All layers of a kind need the same, and all needs are
linear in the rows of a microbatch, so that two runs of few layers are enough for any number of either.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import nn

from raysft.config import Config
from raysft.config.scaling import slice_tokens
from raysft.estimate.fake_attention import NAME, fake_attention
from raysft.estimate.fake_experts import NAME as EXPERTS
from raysft.estimate.fake_experts import fake_experts
from raysft.estimate.fake_model import without_memory
from raysft.estimate.sizes import Activations, Layers, Line, LossBytes
from raysft.models.attention import EXAMPLEWISE, FLASH, WITH_SINKS, kernel, use_examplewise, without_adapters
from raysft.models.decoder_layers import decoder_layers
from raysft.models.examples import Examples
from raysft.models.fused_layers import ROTARY, fuse_layers
from raysft.models.recomputation import is_recomputed
from raysft.models.torch_internals import LiveBytes, fake_tensors
from raysft.models.transformers_internals import attention_implementation, can_set_attention
from raysft.train.loss import TokenLoss
from raysft.train.objective import objective_of
from raysft.train.reference import Reference
from raysft.train.router_loss import RouterLoss

INPUTS = ("input_ids", "position_ids", "targets")
LOSS_ROWS = (1, 2, 4, 8, 16, 32, 64)
"""Rows of a microbatch for which the loss is traced, in addition to those of the config."""
FIRST, LAST = 2, 3
"""Chunks of logits that are traced at both ends; those between them are one, without logits: a call of each takes 20 ms."""


@dataclass(frozen=True)
class _Shape:
    tokens: int
    """Tokens of a row."""
    loss_share: float
    """Share of them with a loss."""
    autocast: bool


@dataclass
class _Run:
    """Bytes alive at the moments of one forward and backward pass."""

    before: list[int] = field(default_factory=list)
    """Before each layer."""
    forward: list[int] = field(default_factory=list)
    """Most during the forward pass of each layer."""
    after: int = 0
    """After the last layer."""
    loss: int = 0
    """Most between the last layer's forward and backward pass."""
    begin: dict[int, int] = field(default_factory=dict)
    """By layer, when its backward pass begins."""
    backward: dict[int, int] = field(default_factory=dict)
    """By layer, most during its backward pass."""
    last: int = 0
    """Most during the backward pass of the layer that is computed last, and of what comes before it."""

    def enter(self, index: int, live: LiveBytes) -> None:
        """Note that the backward pass of a layer begins, and with it that of the one after it ends; -1 at the end."""
        if self.begin:
            self.backward[min(self.begin)] = live.peak
        else:
            self.loss = live.peak
        if index < 0:
            self.last = live.peak
        else:
            self.begin[index] = live.peak = live.now


class _TracedLoss(TokenLoss):
    """The loss, for a number of loss tokens that does not depend on labels, which have no values here."""

    loss_tokens = 0
    states: torch.Tensor | None = None
    """Hidden states to take instead of the decoder's."""
    needs_mask = False
    """The decoder would make a mask from the values of the positions."""
    most = 0
    """Tokens of a chunk of logits."""

    def _chosen(self, targets: torch.Tensor) -> torch.Tensor:
        return torch.arange(self.loss_tokens)

    def _parts(self, tokens: int, chunks: int) -> list[slice]:
        """Divide loss tokens into few parts, of which all but one are as large as the training's.

        That one's gradient is there before those of the first parts, and waits with them until those of the last are added up.
        """
        self.most = size = -(-tokens // chunks)
        if chunks <= FIRST + LAST + 1:
            return super()._parts(tokens, chunks)
        bounds = [*range(0, (FIRST + 1) * size, size), *range((chunks - LAST) * size, (chunks + 1) * size, size)]
        return list(map(slice, bounds, bounds[1:]))

    def _chunks(self, *columns: Any) -> list[tuple[torch.Tensor | None, ...]]:
        def narrow(targets: Any) -> Any:
            return targets[:1] if len(targets) > self.most else targets

        return [
            (hidden, anchor, narrow(targets), *rest) for hidden, anchor, targets, *rest in super()._chunks(*columns)
        ]

    def narrow(self, head: nn.Module, inputs: tuple[torch.Tensor]) -> tuple[torch.Tensor] | None:
        """Let the head compute one row of logits of a part that is larger, whose gradient is as large as the part."""
        (hidden,) = inputs
        return ((hidden * 1).sum(0, keepdim=True),) if len(hidden) > self.most else None

    def hidden_states(
        self,
        decoder: Any,
        input_ids: torch.Tensor,
        position_ids: torch.Tensor,
        images: dict[str, torch.Tensor] | None = None,
        neftune_alpha: float | None = None,
        attention_mask: torch.Tensor | None = None,
        examples: Examples | None = None,
    ) -> torch.Tensor:
        if self.states is not None:
            return self.states
        if not self.needs_mask:
            return super().hidden_states(decoder, input_ids, position_ids)
        rows, tokens = input_ids.shape
        mask = torch.empty(rows, 1, tokens, tokens, dtype=next(decoder.parameters()).dtype)
        return super().hidden_states(decoder, input_ids, position_ids, attention_mask=mask)

    def _reference_states(
        self,
        input_ids: torch.Tensor,
        position_ids: torch.Tensor,
        images: dict[str, torch.Tensor] | None = None,
        examples: Examples | None = None,
    ) -> torch.Tensor:
        """Those of a forward pass that keeps nothing, and so needs less than the one that is traced."""
        weight = next(without_adapters(self.model).get_output_embeddings().parameters())
        return torch.empty(*input_ids.shape, weight.shape[-1], dtype=weight.dtype)


class _TracedRouters(RouterLoss):
    """The loss of routers, as far as it keeps something: probabilities and choices of all layers, until their backward pass."""

    def _hear(self, router: Any, inputs: Any, output: Any) -> None:
        if self._listens:
            with torch.no_grad():  # not a part of what a layer saves, which would be computed again
                self._heard.append(self._read(router, output))


def trace(config: Config, model: Any, tokens: int, loss_share: float) -> Activations:
    """Trace a model of ``model_without_weights``, of which only one layer of each kind is left afterwards.

    Args:
        config: the run's config.
        model: on the device ``meta``.
        tokens: tokens of a row.
        loss_share: share of them with a loss.

    Raises:
        Exception: of any type; the model computes in a way that depends on values.
    """
    layers, counts = _shorten(model)
    with fake_tensors(), _unchanged_rotary(model):
        without_memory(model)
        if config.model.train_parts != ["language"]:
            # The features of images, in place of embeddings, then pass on a gradient.
            without_adapters(model).enable_input_require_grads()
        loss = _TracedLoss(
            model,
            objective_of(config.train),
            max_tokens=slice_tokens(
                config.micro_batch_size * config.data.sequence_length, config.scaling.sequence_parallel
            )
            if config.train.zero_stage == 3
            else None,
            reference=Reference(),
        )
        loss.needs_mask = _set_attention(model, config)
        if config.model.experts != "kt":
            _set_experts(without_adapters(model))
        if not config.scaling.use_gpu and config.dtype == "float32" and not loss.objective.has_reference:
            fuse_layers(model)
        loss.train()
        if config.train.router_aux_loss_coef:
            loss.router_loss = _TracedRouters(model, config.train.router_aux_loss_coef)
        for parameter in loss.parameters():
            if parameter.requires_grad:
                # The stages of ZeRO decide where gradients are kept; here each one goes at once.
                parameter.register_post_accumulate_grad_hook(forget_gradient)
        without_adapters(model).get_output_embeddings().register_forward_pre_hook(loss.narrow)
        shape = _Shape(tokens, loss_share, config.autocast)
        runs = [_run(loss, layers, rows, shape) for rows in (1, 2)]
        losses = {rows: _loss_alone(loss, rows, shape) for rows in sorted({config.micro_batch_size, *LOSS_ROWS})}
    return _activations(runs, counts, losses, tokens, [is_recomputed(layer) for layer in layers])


def forget_gradient(parameter: torch.Tensor) -> None:
    """Drop a gradient as soon as it is there."""
    parameter.grad = None


def _shorten(model: Any) -> tuple[list[Any], list[int]]:
    """Leave the first layer and one of each kind among the others; returns these, and how many layers each stands for."""
    base = without_adapters(model)
    prefix, _ = decoder_layers(base)
    layers = base.get_submodule(prefix)
    kinds = getattr(base.config.get_text_config(), "layer_types", None) or [None] * len(layers)
    counts: dict[Any, int] = {}
    chosen = [layers[0]]
    for layer, kind in list(zip(layers, kinds, strict=False))[1:]:
        weights = tuple((name, tuple(weight.shape), weight.requires_grad) for name, weight in layer.named_parameters())
        key = (type(layer), kind, weights, is_recomputed(layer))
        if key not in counts:
            chosen.append(layer)
        counts[key] = counts.get(key, 0) + 1
    parent, _, name = prefix.rpartition(".")
    setattr(base.get_submodule(parent), name, nn.ModuleList(chosen))
    return chosen, [1, *counts.values()]


@contextmanager
def _unchanged_rotary(model: Any) -> Iterator[None]:
    """Undo what ``fuse_layers`` does to the modules of transformers: this process may not train."""
    modules = [sys.modules[name] for name in {type(module).__module__ for module in model.modules()}]
    before = [(module, getattr(module, ROTARY)) for module in modules if hasattr(module, ROTARY)]
    try:
        yield
    finally:
        for module, function in before:
            setattr(module, ROTARY, function)


def _set_attention(model: Any, config: Config) -> bool:
    """Give the model a kernel that needs as much memory as that of the training; returns True if it computes with its own mask."""
    from transformers import AttentionInterface

    base = without_adapters(model)
    use_examplewise(base, config)
    used = chosen if (chosen := kernel(config, base.config)) in FLASH else attention_implementation(base)
    if config.scaling.sequence_parallel > 1 and used == "sdpa":
        used = EXAMPLEWISE  # as ``sequence_attention``
    if used == WITH_SINKS:
        base.set_attn_implementation("eager")  # with the same matrices of tokens × tokens
        return True
    if used == "eager" or not can_set_attention(base):
        return True
    masked = used == "sdpa" and config.data.packing
    AttentionInterface.register(NAME, fake_attention(masked, used == EXAMPLEWISE, config.scaling.use_gpu))
    base.set_attn_implementation(NAME)
    return False


def _set_experts(model: Any) -> None:
    """Give a mixture of experts a product that chooses nothing by values."""
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

    ALL_EXPERTS_FUNCTIONS.register(EXPERTS, fake_experts)
    model.set_experts_implementation(EXPERTS)


def _run(loss: _TracedLoss, layers: Sequence[nn.Module], rows: int, shape: _Shape) -> _Run:
    """Run forward and backward once, and note the bytes alive before and after each layer."""
    run, live = _Run(), LiveBytes()

    def before(index: int, *_: Any) -> None:
        if len(run.before) == index:  # else the layer is computed again, in the backward pass
            run.before.append(live.now)
            live.peak = live.now

    def after(index: int, module: Any, inputs: Any, output: Any) -> None:
        if len(run.forward) != index:
            return
        run.forward.append(live.peak)
        run.after = live.peak = live.now
        hidden = output[0] if isinstance(output, tuple) else output
        if hidden.requires_grad:
            hidden.register_hook(lambda gradient: run.enter(index, live))

    hooks = [layer.register_forward_pre_hook(partial(before, index)) for index, layer in enumerate(layers)]
    hooks += [layer.register_forward_hook(partial(after, index)) for index, layer in enumerate(layers)]
    _train(loss, live, rows, shape)
    run.enter(-1, live)
    for hook in hooks:
        hook.remove()
    return run


def _loss_alone(loss: _TracedLoss, rows: int, shape: _Shape) -> LossBytes:
    """Bytes of the loss without the decoder."""
    live, head = LiveBytes(), without_adapters(loss.model).get_output_embeddings()
    weight = next(head.parameters())
    loss.states = torch.empty(rows, shape.tokens, weight.shape[-1], dtype=weight.dtype, requires_grad=True)
    live.ignore([loss.states])
    try:
        _train(loss, live, rows, shape)
    finally:
        loss.states = None
    return LossBytes(live.peak, live.now)


def _train(loss: _TracedLoss, live: LiveBytes, rows: int, shape: _Shape) -> None:
    inputs = {name: torch.zeros(rows, shape.tokens, dtype=torch.long) for name in INPUTS}
    loss.loss_tokens = max(1, round(rows * shape.tokens * shape.loss_share))
    live.ignore([*loss.parameters(), *loss.buffers(), *inputs.values()])
    cast = torch.autocast("cpu", torch.bfloat16) if shape.autocast else nullcontext()
    with live:
        with cast, loss.router_loss or nullcontext():
            value = loss(**inputs)[0]
        value.backward()


def _activations(
    runs: Sequence[_Run],
    counts: Sequence[int],
    losses: Mapping[int, LossBytes],
    tokens: int,
    recomputed: Sequence[bool],
) -> Activations:
    def line(value: Callable[[_Run], float]) -> Line:
        one, two = map(value, runs)
        return Line.through(one, two)

    def end(run: _Run, index: int) -> int:
        return run.before[index + 1] if index + 1 < len(counts) else run.after

    layers = tuple(
        Layers(
            count,
            saved=line(lambda run, i=index: end(run, i) - run.before[i]),
            forward=line(lambda run, i=index: run.forward[i] - run.before[i]),
            backward=line(lambda run, i=index: run.backward.get(i, 0) - run.begin.get(i, 0)),
            recomputed=recomputed[index],
        )
        for index, count in enumerate(counts)
    )
    # What the norm before the head adds, and a head that is also the embedding: its gradient waits for the embedding's.
    alone = [losses[rows] for rows in (1, 2)]
    last = len(counts) - 1
    peak = Line.through(*(run.loss - run.after - each.peak for run, each in zip(runs, alone, strict=True)))
    left = Line.through(
        *(run.begin.get(last, run.after) - run.after - each.left for run, each in zip(runs, alone, strict=True))
    )
    return Activations(
        tokens=tokens,
        embedded=line(lambda run: run.before[0]),
        layers=layers,
        loss={
            rows: LossBytes(each.peak + peak.fixed + rows * peak.per_row, each.left + left.fixed + rows * left.per_row)
            for rows, each in losses.items()
        },
        tail=line(lambda run: run.last),
        traced=True,
    )
