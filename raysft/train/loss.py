"""The loss over loss tokens: logits are computed only where there is a label, and in chunks."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from raysft.data.types import IGNORE_INDEX
from raysft.models.attention import is_varlen, takes_examples, without_adapters
from raysft.models.examples import Examples, begin
from raysft.models.media_inputs import has_planes
from raysft.models.transformers_internals import known_examples
from raysft.train.objective import CROSS_ENTROPY, Objective
from raysft.train.reference import Reference
from raysft.train.router_loss import RouterLoss
from raysft.train.towers import Towers, changed_embeddings

CHUNK_TOKENS = 1024
"""Number of loss tokens whose logits exist at the same time, so that peak memory does not grow with rows × vocabulary."""


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
            max_tokens: the most tokens that any worker has in a microbatch. If given, the number of chunks depends on it alone and
                not on the batch: with ZeRO-3, each call of the head is a collective (see ``step``).
            reference: the frozen model that the objective needs.
            towers: what images go through; None if the data has no images.
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
        examples: Examples | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """
        Args:
            input_ids: [rows, tokens].
            position_ids: [rows, tokens], starting at 0 in each example of a row; nothing else separates the examples. With images
                also [4, rows, tokens] (``rope_planes``).
            targets: [rows, tokens] the token that each one should predict; ``IGNORE_INDEX`` where there is no loss.
            weights: [rows, tokens] weight of that loss. Default: 1.
            sources: [rows, tokens] source number of the token that is predicted. Default: 0.
            number_of_sources: number of sources.
            score: True in evaluations: measure the cross-entropy, and count correct predictions.
            images: of all rows, in order (``media_inputs``).
            predicting: what ``uploads.predicting`` says of the targets. Default: computed here, for which a GPU must wait.
            examples: where the examples lie; likewise, but noise on the embeddings needs them. If other workers have other
                tokens of the rows, each returns sums over its own tokens.

        Returns:
            The weighted sum of the losses (float32); [number_of_sources] the same sum per source, without gradient; and the number
            of loss tokens whose label the model ranks first (0 unless ``score``).
        """
        decoder, head = decoder_and_head(self.model)
        objective = CROSS_ENTROPY if score else self.objective
        anchor = self._reference_states(input_ids, position_ids, images, examples) if objective.has_reference else None
        noise = self.neftune_alpha if self.training else None
        hidden = self.hidden_states(decoder, input_ids, position_ids, images, noise, examples=examples)
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
        examples: Examples | None = None,
    ) -> torch.Tensor:
        """The reference's hidden states, without noise and dropout: [rows, tokens, size]."""
        assert self.reference is not None
        with self.reference.standing_in(self.model) as model:
            return self.hidden_states(decoder_and_head(model)[0], input_ids, position_ids, images, examples=examples)

    def _reference_logits(self, hidden: torch.Tensor) -> torch.Tensor:
        assert self.reference is not None
        with self.reference.standing_in(self.model) as model:
            return _with_scale(decoder_and_head(model)[1], model)(hidden)

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
        parts = self._parts(len(targets), chunks)
        columns = [
            [None if values is None else values[part] for part in parts] for values in (*states, targets, *beside)
        ]
        return list(zip(*columns, strict=True))

    def _parts(self, tokens: int, chunks: int) -> list[slice]:
        """Divide loss tokens into exactly ``chunks`` parts; the last ones may be empty."""
        size = -(-tokens // chunks)
        return [slice(index * size, (index + 1) * size) for index in range(chunks)]

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
        examples: Examples | None = None,
    ) -> torch.Tensor:
        """Compute the states that go into the output head: [rows, tokens, size].

        The arguments are those of ``forward``, a strength of noise on the embeddings, which needs the examples, and a mask for a
        decoder that cannot derive one from the positions.
        """
        shape = input_ids.shape
        if has_planes(decoder) and position_ids.ndim == 2:
            # Qwen's positions in time, height and width (all equal in text) follow those that keep examples apart.
            position_ids = position_ids.expand(4, *shape)
        if is_varlen(decoder):
            input_ids, position_ids = input_ids.reshape(1, -1), position_ids.reshape(*position_ids.shape[:-2], 1, -1)
        inputs: dict[str, Any] = {**(images or {})}
        if examples is not None and self.towers is None and takes_examples(decoder):
            inputs |= dict.fromkeys(("cu_seq_lens_q", "cu_seq_lens_k"), examples.bounds)
            inputs |= dict.fromkeys(("max_length_q", "max_length_k"), max(examples.lengths))
        if attention_mask is not None:
            inputs["attention_mask"] = attention_mask
        if self.towers is not None:
            inputs |= self.towers.kinds(input_ids)
        begin(examples, position_ids)
        told = nullcontext() if examples is None else known_examples(examples.several)
        noise = None
        if neftune_alpha is not None:
            assert examples is not None
            noise = neftune_alpha, examples.lengths_of_tokens.view(input_ids.shape)
        with told, changed_embeddings(decoder, self.towers, images is None, noise):
            # Without a cache, transformers derives the examples from the positions; with a cache it silently does not.
            output = decoder(input_ids=input_ids, **inputs, position_ids=position_ids, use_cache=False)
        return output.last_hidden_state.reshape(*shape, -1)  # type: ignore[no-any-return]


def decoder_and_head(model: Any) -> tuple[Any, Any]:
    """The decoder and the output head of a model, without its adapters' wrapper."""
    model = without_adapters(model)
    return model.base_model, model.get_output_embeddings()


def _with_scale(head: Any, model: Any) -> Callable[[torch.Tensor], torch.Tensor]:
    """The output head, with what the architecture does to its logits."""
    return lambda hidden: scaled(head(hidden), model)


def scaled(logits: torch.Tensor, model: Any) -> torch.Tensor:
    """Scale and cap logits, as the configs of some architectures ask for.

    ``check_states.check_head`` checks whether the model does what its config says.
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
