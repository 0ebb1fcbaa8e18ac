"""The loss over loss tokens: logits are computed only where there is a label, and in chunks."""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import nn
from torch.utils.checkpoint import checkpoint

from raysft.data.types import IGNORE_INDEX
from raysft.errors import RunFailed
from raysft.models import sequence_attention
from raysft.models.attention import is_varlen, takes_examples, without_adapters
from raysft.models.media_inputs import has_planes
from raysft.models.sequence_attention import Slice
from raysft.models.transformers_internals import known_examples
from raysft.train.objective import CROSS_ENTROPY, Objective, lengths_of_tokens
from raysft.train.reference import Reference
from raysft.train.router_loss import RouterLoss
from raysft.train.sequence_group import SequenceGroup
from raysft.train.towers import Towers, changed_embeddings

CHUNK_TOKENS = 1024
"""Number of loss tokens whose logits exist at the same time, so that peak memory does not grow with rows × vocabulary."""

ROUNDING = 1e-3
"""Most that rounding changes in float32, of the largest hidden state, where attention is computed in another order, which many
layers amplify. What is wrong changes much more."""


class TokenLoss(nn.Module):
    """A causal language model with its loss: the module that the engine wraps and calls.

    The sum over a step's microbatches and workers, divided by the step's loss tokens, is the step's loss.
    """

    router_loss: RouterLoss | None = None
    """Listens to the routers of a mixture of experts; ``train_step`` adds its loss."""

    def __init__(
        self,
        model: nn.Module,
        objective: Objective = CROSS_ENTROPY,
        neftune_alpha: float | None = None,
        max_tokens: int | None = None,
        reference: Reference | None = None,
        towers: Towers | None = None,
    ) -> None:
        """
        Args:
            model: a transformers causal language model, with or without peft adapters.
            objective: loss of a token in training; evaluations measure the cross-entropy.
            neftune_alpha: strength of the noise on the embeddings in training.
            max_tokens: most tokens that a microbatch of any worker holds. If given, the number of chunks depends on it alone and
                not on the batch: with ZeRO-3, each call of the head is a collective (see ``step``).
            reference: the frozen model that the objective needs.
            towers: what images go through; None if no data has any.
        """
        super().__init__()
        self.model = model
        self.objective, self.neftune_alpha = objective, neftune_alpha
        self.max_tokens, self.reference, self.towers = max_tokens, reference, towers

    def forward(
        self,
        input_ids: torch.Tensor,
        position_ids: torch.Tensor,
        targets: torch.Tensor,
        weights: torch.Tensor | None = None,
        sources: torch.Tensor | None = None,
        number_of_sources: int = 1,
        score: bool = False,
        images: dict[str, torch.Tensor] | None = None,
        predicting: torch.Tensor | None = None,
        examples: dict[str, Any] | None = None,
        part: Slice | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """
        Args:
            input_ids: [rows, tokens].
            position_ids: [rows, tokens], starting at 0 in each example of a row; nothing else separates the examples. With images
                also [4, rows, tokens] (``rope_planes``).
            targets: [rows, tokens] the token that each one is to predict; ``IGNORE_INDEX`` where there is no loss.
            weights: [rows, tokens] weight of that loss. Default: 1.
            sources: [rows, tokens] source number of the token that is predicted. Default: 0.
            number_of_sources: number of sources.
            score: True in evaluations: measure the cross-entropy, and count correct predictions.
            images: of all rows, in order (``media_inputs``).
            predicting: what ``uploads.predicting`` says of the targets. Default: it is found out here, for which a GPU must wait.
            examples: what ``uploads.examples`` says of the positions; likewise.
            part: if other workers have other tokens of the rows, which of them these are; each then returns sums over its own.

        Returns:
            The weighted sum of the losses (float32); [number_of_sources] the same sum per source, without gradient; and the number
            of loss tokens whose label the model ranks first (0 unless ``score``).
        """
        decoder, head = _parts(self.model)
        objective = CROSS_ENTROPY if score else self.objective
        places = examples, part
        anchor = self._reference_states(input_ids, position_ids, images, *places) if objective.has_reference else None
        noise = self.neftune_alpha if self.training else None
        hidden = self.hidden_states(decoder, input_ids, position_ids, images, noise, None, *places)
        chunks = self._chunks(hidden, anchor, targets, weights, sources, predicting)
        totals = []
        for chunk in chunks:
            heads = (_with_scale(head, self.model), self._reference_logits)
            arguments: Any = (heads, objective, *chunk, number_of_sources, score)
            if len(chunks) > 1 and torch.is_grad_enabled():
                totals.append(checkpoint(_chunk_loss, *arguments, use_reentrant=False))
            else:
                totals.append(_chunk_loss(*arguments))
        loss, by_source, correct = (torch.stack(column).sum(0) for column in zip(*totals, strict=True))  # type: ignore[arg-type]
        return loss, by_source, correct

    def _reference_states(
        self,
        input_ids: torch.Tensor,
        position_ids: torch.Tensor,
        images: dict[str, torch.Tensor] | None = None,
        examples: dict[str, Any] | None = None,
        part: Slice | None = None,
    ) -> torch.Tensor:
        """The reference's hidden states, without noise and dropout: [rows, tokens, size]."""
        assert self.reference is not None
        with self.reference.standing_in(self.model) as model:
            return self.hidden_states(_parts(model)[0], input_ids, position_ids, images, examples=examples, part=part)

    def _reference_logits(self, hidden: torch.Tensor) -> torch.Tensor:
        assert self.reference is not None
        with self.reference.standing_in(self.model) as model:
            return _with_scale(_parts(model)[1], model)(hidden)

    def _chunks(
        self,
        hidden: torch.Tensor,
        anchor: torch.Tensor | None,
        targets: torch.Tensor,
        weights: torch.Tensor | None,
        sources: torch.Tensor | None,
        predicting: torch.Tensor | None = None,
    ) -> list[tuple[torch.Tensor | None, ...]]:
        """Select the loss tokens, and split their (hidden states, reference's, targets, weights, sources) into chunks."""
        targets = targets.reshape(-1)
        chosen = self._chosen(targets) if predicting is None else predicting
        targets = targets[chosen]
        beside = [None if each is None else each.reshape(-1)[chosen] for each in (weights, sources)]
        states = [None if each is None else each.reshape(-1, each.shape[-1])[chosen] for each in (hidden, anchor)]
        chunks = -(-(self.max_tokens or len(targets)) // CHUNK_TOKENS)
        columns = [
            [None] * chunks if values is None else _split(values, chunks) for values in (*states, targets, *beside)
        ]
        return list(zip(*columns, strict=True))

    def _chosen(self, targets: torch.Tensor) -> torch.Tensor:
        """[tokens] True where there is a loss, in at least one place."""
        chosen = targets != IGNORE_INDEX
        if not chosen.any():
            # The other workers call the head and send gradients now, so this one must do the same.
            chosen = torch.zeros_like(chosen)
            chosen[0] = True
        return chosen

    def hidden_states(
        self,
        decoder: Any,
        input_ids: torch.Tensor,
        position_ids: torch.Tensor,
        images: dict[str, torch.Tensor] | None = None,
        neftune_alpha: float | None = None,
        attention_mask: torch.Tensor | None = None,
        examples: dict[str, Any] | None = None,
        part: Slice | None = None,
    ) -> torch.Tensor:
        """Compute the states that go into the output head: [rows, tokens, size].

        The arguments are those of ``forward``, a strength of noise on the embeddings, and a mask for a decoder that cannot derive
        one from the positions.
        """
        shape, starts = input_ids.shape, position_ids if position_ids.ndim == 2 else position_ids[0]
        if has_planes(decoder) and position_ids.ndim == 2:
            # Qwen's positions in time, height and width, of which text has three equal ones, follow those that keep examples apart.
            position_ids = position_ids.expand(4, *shape)
        if is_varlen(decoder):
            input_ids, position_ids = input_ids.reshape(1, -1), position_ids.reshape(*position_ids.shape[:-2], 1, -1)
        inputs: dict[str, Any] = {**(images or {})}
        if examples is not None and self.towers is None and takes_examples(decoder):
            inputs |= dict.fromkeys(("cu_seq_lens_q", "cu_seq_lens_k"), examples["bounds"])
            inputs |= dict.fromkeys(("max_length_q", "max_length_k"), examples["longest"])
        if attention_mask is not None:
            inputs["attention_mask"] = attention_mask
        if self.towers is not None:
            inputs |= self.towers.kinds(input_ids)
        sequence_attention.begin(part)
        told = nullcontext() if examples is None else known_examples(examples["several"])
        noise = None
        if neftune_alpha is not None:
            lengths = lengths_of_tokens(starts) if part is None else part.lengths_of_tokens(input_ids.device)
            noise = neftune_alpha, lengths.view(input_ids.shape)
        with told, changed_embeddings(decoder, self.towers, images is None, noise):
            # Without a cache, transformers derives the examples from the positions; with a cache it silently does not.
            output = decoder(input_ids=input_ids, **inputs, position_ids=position_ids, use_cache=False)
        return output.last_hidden_state.reshape(*shape, -1)  # type: ignore[no-any-return]

    @torch.no_grad()
    def check_head(self, device: torch.device) -> None:
        """Check that decoder and head together give the model's logits; some models scale or cap logits after the head.

        Some models for images (AyaVision) leave out what their language model alone does; then so does the loss.

        Raises:
            RunFailed: the logits differ, so that the loss would be wrong.
        """
        decoder, head = _parts(self.model)
        ids = torch.arange(8, device=device)[None]
        positions = torch.arange(8, device=device)[None]
        whole = self.model(input_ids=ids, position_ids=positions, use_cache=False).logits.float()
        hidden = decoder(input_ids=ids, position_ids=positions, use_cache=False).last_hidden_state
        model, difference, logits = without_adapters(self.model), torch.zeros(()), head(hidden)
        if whole.isnan().any():
            raise RunFailed(
                f"{type(model).__name__} computes logits that are NaN from its first {ids.shape[1]} tokens: its weights hold NaN, "
                "or numbers that model.dtype cannot hold; use another model, or model.dtype=float32"
            )
        for model.has_plain_logits in (False, True):
            parts = _scaled(logits, model).float()
            if torch.allclose(whole, parts, rtol=1e-3, atol=1e-3):
                return
            difference = (whole - parts).abs().max()
        raise RunFailed(
            f"{type(model).__name__} changes its logits after the output head (by up to {difference:.2g}), "
            "which raysft does not support; use another architecture"
        )

    @torch.no_grad()
    def check_causal(self, device: torch.device) -> None:
        """Check that no token attends to later tokens, which it must predict.

        Raises:
            RunFailed: one does, as in encoders, so that the loss would be meaningless.
        """
        ids = torch.arange(8, device=device)[None]
        other = ids.clone()
        other[:, 4:] += 13
        fault = "is not causal: changing later tokens changes earlier hidden states"
        self._refuse_difference(ids, other, ids, slice(4), fault, "use a causal language model")

    @torch.no_grad()
    def check_rows(self, device: torch.device, rows: int, remedy: str) -> None:
        """Check that the examples of a row do not attend to each other: changing the first must not change the second.

        Args:
            device: where the model is.
            rows: rows of a microbatch.
            remedy: for the error message.

        Raises:
            RunFailed: they do, as in models with a recurrent state, or whose masks ignore positions.
        """
        positions = torch.arange(8, device=device).repeat(2)[None].expand(rows, -1).contiguous()
        ids = torch.arange(16, device=device)[None].expand(rows, -1) % 13
        other = ids.clone()
        other[:, :8] += 13
        fault = "does not keep the examples of a row apart: changing one changes hidden states of the next"
        self._refuse_difference(ids, other, positions, slice(8, None), fault, remedy)

    @torch.no_grad()
    def check_slices(self, device: torch.device, group: SequenceGroup) -> None:
        """Check that a worker computes the same hidden states for its slice of a row as if it had the whole row.

        Raises:
            RunFailed: they differ, as in models with a recurrent state, or whose layers use more than the positions they are given.
        """
        model = without_adapters(self.model)
        if group.size == 1 or getattr(model, "is_loaded_in_8bit", False):
            return
        tokens, first = group.slice_tokens(16 * group.size) * group.size, 5
        positions = np.concatenate([np.arange(first), np.arange(tokens - first)])[
            None
        ]  # the second one crosses each seam
        row = {"input_ids": np.arange(tokens)[None] % 13, "position_ids": positions}
        own, part = group.cut(row)
        decoder, _ = _parts(self.model)
        whole, cut = ([torch.as_tensor(each[name], device=device) for name in row] for each in (row, own))
        assert part is not None
        with sequence_attention.with_attention(self.model, sequence_attention.own_kernel(model)):
            expected = self.hidden_states(decoder, whole[0], whole[1])[:, part.start : part.stop].float()
        try:
            found = self.hidden_states(decoder, cut[0], cut[1], part=part).float()
        finally:
            sequence_attention.begin(None)
        difference = torch.tensor(difference_of(expected, found, decoder, ROUNDING), device=device)
        dist.all_reduce(difference, dist.ReduceOp.MAX)  # the first slice of a row may be right alone
        if difference:
            raise RunFailed(
                f"{type(model).__name__} computes other hidden states for slices of a row, by {difference:.2g}, than for the whole "
                f"row, so scaling.sequence_parallel={group.size} would train it wrongly; {sequence_attention.REMEDY}"
            )

    def _refuse_difference(
        self, ids: torch.Tensor, other: torch.Tensor, positions: torch.Tensor, tokens: slice, fault: str, remedy: str
    ) -> None:
        """Refuse the model if two inputs, [rows, tokens], have different hidden states at the given tokens."""
        if getattr(without_adapters(self.model), "is_loaded_in_8bit", False):
            return  # LLM.int8 rounds each token depending on the whole batch
        decoder, _ = _parts(self.model)
        states = [self.hidden_states(decoder, tensor, positions)[:, tokens].float() for tensor in (ids, other)]
        if difference := difference_of(states[0], states[1], decoder):
            raise RunFailed(f"{type(without_adapters(self.model)).__name__} {fault} by {difference:.2g}; {remedy}")


def difference_of(one: torch.Tensor, other: torch.Tensor, decoder: Any, float32: float = 1e-5) -> float:
    """Return the largest difference of two hidden states, infinite where one is NaN; 0 if rounding explains it.

    Args:
        one: hidden states.
        other: those that they are compared with.
        decoder: the model that they come from.
        float32: the most that rounding explains in float32, as a share of the largest state.
    """
    difference, size = float((one - other).abs().max()), float(one.abs().max())
    exact = next(decoder.parameters()).dtype == torch.float32
    if difference <= size * (float32 if exact else 2e-2) < math.inf:
        return 0.0
    # Unlike NaN, infinity is the largest of several.
    return math.inf if math.isnan(difference) else difference


def _parts(model: Any) -> tuple[Any, Any]:
    """The decoder and the output head of a model, without its adapters' wrapper."""
    model = without_adapters(model)
    return model.base_model, model.get_output_embeddings()


def _with_scale(head: Any, model: Any) -> Callable[[torch.Tensor], torch.Tensor]:
    """The output head, with what the architecture does to its logits."""
    return lambda hidden: _scaled(head(hidden), model)


def _scaled(logits: torch.Tensor, model: Any) -> torch.Tensor:
    """Scale and cap logits, as the configs of some architectures ask for.

    ``check_head`` finds out whether the model does what its config says.
    """
    model = without_adapters(model)
    if getattr(model, "has_plain_logits", False):
        return logits
    config = model.config.get_text_config()
    cap = getattr(config, "final_logit_softcapping", None)  # Gemma
    scale = getattr(config, "logit_scale", None) or 1.0  # Cohere
    scale /= getattr(config, "logits_scaling", None) or 1.0  # Granite
    logits = logits * scale if scale != 1.0 else logits
    return cap * torch.tanh(logits / cap) if cap else logits


def _split(values: torch.Tensor, chunks: int) -> list[torch.Tensor]:
    """Split into exactly ``chunks`` parts; the last ones may be empty."""
    size = -(-len(values) // chunks)
    return [values[index * size : (index + 1) * size] for index in range(chunks)]


def _chunk_loss(
    heads: tuple[Callable[[torch.Tensor], torch.Tensor], Callable[[torch.Tensor], torch.Tensor]],
    objective: Objective,
    hidden: torch.Tensor,
    anchor: torch.Tensor | None,
    targets: torch.Tensor,
    weights: torch.Tensor | None,
    sources: torch.Tensor | None,
    number_of_sources: int,
    score: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    head, reference_head = heads
    logits = head(hidden).float()
    losses = objective(logits, targets, None if anchor is None else reference_head(anchor).float())
    losses = losses if weights is None else losses * weights
    loss = losses.sum()
    if sources is None:
        by_source = torch.cat([loss.detach()[None], loss.new_zeros(number_of_sources - 1)])
    else:
        by_source = torch.zeros(number_of_sources, device=hidden.device).index_add(0, sources, losses.detach())
    correct = (logits.argmax(-1) == targets).sum() if score else torch.zeros((), dtype=torch.long, device=hidden.device)
    return loss, by_source, correct
