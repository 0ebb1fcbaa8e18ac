"""The loss of trained tokens: logits only where there is a label, in chunks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from raysft.data.types import IGNORE_INDEX
from raysft.errors import RunFailed
from raysft.models.attention import is_varlen, without_adapters
from raysft.train.objective import CROSS_ENTROPY, Objective, embedding_noise

CHUNK_TOKENS = 1024
"""Trained tokens whose logits exist at the same time, so that peak memory does not grow with rows × vocabulary."""


class TokenLoss(nn.Module):
    """A causal language model with its loss: what the engine wraps and calls.

    Its sum over a step's microbatches and workers, divided by the step's trained tokens, is the step's loss.
    """

    def __init__(
        self,
        model: nn.Module,
        objective: Objective = CROSS_ENTROPY,
        neftune_alpha: float | None = None,
        most_tokens: int | None = None,
    ) -> None:
        """
        Args:
            model: a transformers causal language model, with or without peft adapters.
            objective: loss of a token in training; evaluations measure the cross-entropy.
            neftune_alpha: strength of the noise on the embeddings in training.
            most_tokens: how many tokens a microbatch of any worker can hold. The number of chunks then follows from this alone
                and not from the batch: under ZeRO-3 each call of the head is a collective (see ``step``).
        """
        super().__init__()
        self.model = model
        self.objective, self.neftune_alpha = objective, neftune_alpha
        self.most_tokens = most_tokens

    def forward(
        self,
        input_ids: torch.Tensor,
        position_ids: torch.Tensor,
        labels: torch.Tensor,
        weights: torch.Tensor | None = None,
        sources: torch.Tensor | None = None,
        number_of_sources: int = 1,
        score: bool = False,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """
        Args:
            input_ids: [rows, tokens].
            position_ids: [rows, tokens], starting again at each example of a row: this alone keeps examples apart.
            labels: [rows, tokens], ``IGNORE_INDEX`` where not trained; aligned with ``input_ids``.
            weights: [rows, tokens] what the loss of each token counts. Default: 1.
            sources: [rows, tokens] number of each token's source. Default: 0.
            number_of_sources: how many there are.
            score: measure for an evaluation: the cross-entropy, and correct predictions.

        Returns:
            The sum of the trained tokens' weighted losses (float32); [number_of_sources] the same of each source,
            without gradient; and the number of trained tokens whose label is the most probable one (0 unless ``score``).
        """
        decoder, head = _parts(self.model)
        # Without a cache transformers sees from the positions where examples begin; with one it silently does not.
        inputs = self._inputs(decoder, input_ids, position_ids)
        hidden = self._hidden(decoder, inputs, position_ids)
        targets = F.pad(labels[:, 1:], (0, 1), value=IGNORE_INDEX).reshape(-1)
        chosen = targets != IGNORE_INDEX
        if not chosen.any():
            # The head must be used and a gradient must flow all the same: other workers do it in this moment.
            chosen = torch.zeros_like(chosen)
            chosen[0] = True
        hidden, targets = hidden.reshape(-1, hidden.shape[-1])[chosen], targets[chosen]
        # Both belong to the token that is predicted, as the label does.
        beside = [
            None if values is None else F.pad(values[:, 1:], (0, 1)).reshape(-1)[chosen]
            for values in (weights, sources)
        ]
        chunks = -(-(self.most_tokens or len(targets)) // CHUNK_TOKENS)
        columns = [
            [None] * chunks if values is None else _split(values, chunks) for values in (hidden, targets, *beside)
        ]
        objective = CROSS_ENTROPY if score else self.objective
        totals = []
        for piece in zip(*columns, strict=True):
            arguments: Any = (_with_scale(head, self.model), objective, *piece, number_of_sources, score)
            if chunks > 1 and torch.is_grad_enabled():
                totals.append(checkpoint(_chunk_loss, *arguments, use_reentrant=False))
            else:
                totals.append(_chunk_loss(*arguments))
        loss, by_source, correct = (torch.stack(column).sum(0) for column in zip(*totals, strict=True))  # type: ignore[arg-type]
        return loss, by_source, correct

    def _hidden(self, decoder: Any, inputs: dict[str, torch.Tensor], position_ids: torch.Tensor) -> torch.Tensor:
        """[rows, tokens, size]"""
        shape = position_ids.shape
        if is_varlen(decoder):
            inputs = {name: values.reshape(1, -1, *values.shape[2:]) for name, values in inputs.items()}
            position_ids = position_ids.reshape(1, -1)
        hidden = decoder(**inputs, position_ids=position_ids, use_cache=False).last_hidden_state
        return hidden.reshape(*shape, -1)  # type: ignore[no-any-return]

    def _inputs(self, decoder: Any, input_ids: torch.Tensor, position_ids: torch.Tensor) -> dict[str, torch.Tensor]:
        if self.neftune_alpha is None or not self.training:
            return {"input_ids": input_ids}
        embedded = decoder.get_input_embeddings()(input_ids)
        noise = embedding_noise(position_ids, embedded.shape[-1], self.neftune_alpha)
        return {"inputs_embeds": embedded + noise.to(embedded.dtype)}

    @torch.no_grad()
    def check_head(self, device: torch.device) -> None:
        """Make sure that decoder and head alone give the model's logits; some models scale or cap them in between.

        Raises:
            RunFailed: they do not, so that the loss would be wrong.
        """
        decoder, head = _parts(self.model)
        ids = torch.arange(8, device=device)[None]
        positions = torch.arange(8, device=device)[None]
        whole = self.model(input_ids=ids, position_ids=positions, use_cache=False).logits.float()
        hidden = decoder(input_ids=ids, position_ids=positions, use_cache=False).last_hidden_state
        parts = _with_scale(head, self.model)(hidden).float()
        if not torch.allclose(whole, parts, rtol=1e-3, atol=1e-3):
            raise RunFailed(
                f"{type(self.model).__name__} changes its logits after the output head (by up to "
                f"{(whole - parts).abs().max():.2g}); raysft cannot train this architecture yet"
            )

    @torch.no_grad()
    def check_causal(self, device: torch.device) -> None:
        """Make sure that no token sees those after it, which it is to predict.

        Raises:
            RunFailed: one does, as in encoders, so that the loss would say nothing.
        """
        ids = torch.arange(8, device=device)[None]
        other = ids.clone()
        other[:, 4:] += 13
        self._refuse_difference(ids, other, ids, slice(4), "lets tokens see those after them", "give another model")

    @torch.no_grad()
    def check_rows(self, device: torch.device, rows: int, remedy: str) -> None:
        """Make sure that the examples of a row do not see each other: whatever stands in the first, the second is the same.

        Args:
            device: where the model is.
            rows: rows of a microbatch.
            remedy: what to do where they do.

        Raises:
            RunFailed: they do, as in models with a recurrent state, or whose masks take no note of positions.
        """
        positions = torch.arange(8, device=device).repeat(2)[None].expand(rows, -1).contiguous()
        ids = torch.arange(16, device=device)[None].expand(rows, -1) % 13
        other = ids.clone()
        other[:, :8] += 13
        what = "lets the examples of a row see each other"
        self._refuse_difference(ids, other, positions, slice(8, None), what, remedy)

    def _refuse_difference(
        self, ids: torch.Tensor, other: torch.Tensor, positions: torch.Tensor, tokens: slice, what: str, remedy: str
    ) -> None:
        """Two inputs, [rows, tokens], must have the same hidden states at some of their tokens."""
        if getattr(without_adapters(self.model), "is_loaded_in_8bit", False):
            return  # which rounds a token by what the whole batch holds
        decoder, _ = _parts(self.model)
        states = [self._hidden(decoder, {"input_ids": each}, positions)[:, tokens].float() for each in (ids, other)]
        difference, size = (states[0] - states[1]).abs().max(), states[0].abs().max()
        exact = next(decoder.parameters()).dtype == torch.float32
        if difference > size * (1e-5 if exact else 2e-2):
            raise RunFailed(
                f"{type(without_adapters(self.model)).__name__} {what} (a hidden state changes by {difference:.2g}); {remedy}"
            )


def _parts(model: Any) -> tuple[Any, Any]:
    """The decoder and the output head of a model, under its adapters."""
    model = without_adapters(model)
    return model.base_model, model.get_output_embeddings()


def _with_scale(head: Any, model: Any) -> Callable[[torch.Tensor], torch.Tensor]:
    """The output head with what some architectures do to its logits, by the names that their configs give it."""
    config = model.config.get_text_config()
    cap = getattr(config, "final_logit_softcapping", None)  # Gemma
    scale = getattr(config, "logit_scale", None) or 1.0  # Cohere
    scale /= getattr(config, "logits_scaling", None) or 1.0  # Granite

    def logits(hidden: torch.Tensor) -> torch.Tensor:
        values = head(hidden)
        values = values * scale if scale != 1.0 else values
        return cap * torch.tanh(values / cap) if cap else values

    return logits


def _split(values: torch.Tensor, pieces: int) -> list[torch.Tensor]:
    """Exactly ``pieces`` parts, the last ones empty where there is too little."""
    size = -(-len(values) // pieces)
    return [values[index * size : (index + 1) * size] for index in range(pieces)]


def _chunk_loss(
    head: Any,
    objective: Objective,
    hidden: torch.Tensor,
    targets: torch.Tensor,
    weights: torch.Tensor | None,
    sources: torch.Tensor | None,
    number_of_sources: int,
    score: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    logits = head(hidden).float()
    losses = objective(logits, targets)
    losses = losses if weights is None else losses * weights
    loss = losses.sum()
    if sources is None:
        by_source = torch.cat([loss.detach()[None], loss.new_zeros(number_of_sources - 1)])
    else:
        by_source = torch.zeros(number_of_sources, device=hidden.device).index_add(0, sources, losses.detach())
    correct = (logits.argmax(-1) == targets).sum() if score else torch.zeros((), dtype=torch.long, device=hidden.device)
    return loss, by_source, correct
