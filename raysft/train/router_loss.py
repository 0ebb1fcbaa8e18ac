"""The loss that spreads tokens over the experts of a mixture: ``train.router_aux_loss_coef``.

The load balancing loss of Switch Transformers (Fedus et al. 2022) as transformers computes it (``load_balancing_loss_func``), for
each example alone:

    E · Σ f_e · p_e

over the E experts, where f_e is how often a token was sent to expert e, and p_e the probability that the router gave it, both
averaged over the example's tokens and all layers. It equals the number of experts per token where all are used equally. The
loss of a step is the mean over its examples, weighted by their tokens.

The product of two means over all tokens of a microbatch, as transformers computes it for batches, depends on which examples
share one; that over a whole step is known only after its last microbatch. For single examples it is the same however rows are
packed and steps are cut, like the sequence-wise loss of DeepSeek-V3.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import nn

from raysft.errors import RunFailed
from raysft.models.attention import without_adapters
from raysft.models.routers import watchable_routers
from raysft.train.job import Batch
from raysft.train.sequence_group import ALONE, SequenceGroup
from raysft.train.uploads import uploaded

Routed = tuple[torch.Tensor, torch.Tensor]
"""Probabilities [tokens, experts] and choices [tokens, experts of a token] of a router."""


class RouterLoss:
    """Listens to the routers of a model; ``with`` it while the model computes, then call it."""

    def __init__(self, model: nn.Module, coefficient: float) -> None:
        """
        Args:
            model: a transformers model, with or without adapters, whose engine exists.
            coefficient: weight of the loss relative to that of the tokens.
        """
        self.coefficient, self._name = coefficient, type(without_adapters(model)).__name__
        self._listens, self._heard = False, list[tuple[Any, Any]]()
        for router in watchable_routers(without_adapters(model)):
            router.register_forward_hook(self._hear)

    def __enter__(self) -> None:
        self._listens, self._heard = True, []

    def __exit__(self, *error: object) -> None:
        # Layers that are recomputed in the backward pass call their routers again.
        self._listens = False

    def _hear(self, router: nn.Module, inputs: Any, output: Any) -> None:
        if self._listens and torch.is_grad_enabled():  # otherwise a reference model is computing
            self._heard.append((router, output))

    def __call__(self, part: Batch, group: SequenceGroup = ALONE) -> torch.Tensor:
        """Compute the loss of a microbatch: its sum over examples, each times its number of tokens.

        Workers that share the rows all get the same sum, each with the gradient of its own tokens.

        Args:
            part: its rows, without images.
            group: the workers that have the same rows.

        Raises:
            RunFailed: the model's routers do not return what they chose.
        """
        routed = [self._read(router, output) for router, output in self._heard]
        self._heard = []
        example, count = examples_of(part)
        if not routed:
            raise RunFailed(
                f"train.router_aux_loss_coef={self.coefficient:g}, but no router of {self._name} was called; remove it"
            )
        lengths = np.bincount(example, minlength=count + 1)[:count]
        numbers = {"example": group.cut_one(example, count), "lengths": lengths}
        on_device = uploaded({name: torch.as_tensor(each) for name, each in numbers.items()}, routed[0][0].device)
        return balance(routed, **on_device, processes=group.processes)

    def _read(self, router: nn.Module, output: Any) -> Routed:
        if not (isinstance(output, tuple) and len(output) == 3 and not torch.is_floating_point(output[2])):
            raise RunFailed(
                f"train.router_aux_loss_coef={self.coefficient:g} needs routers that return logits, weights and choices, but "
                f"{type(router).__name__} of {self._name} does not; remove it"
            )
        logits, _, chosen = output
        # Routers with a bias for balance (DeepSeek-V3, GLM-4) give each expert an independent probability.
        by_itself = hasattr(router, "e_score_correction_bias")
        return probabilities(logits.flatten(0, -2), by_itself), chosen.flatten(0, -2)


def probabilities(logits: torch.Tensor, by_itself: bool = False) -> torch.Tensor:
    """Return how likely each expert is: the softmax of [tokens, experts], or each one's sigmoid as a share of their sum."""
    if not by_itself:
        return torch.softmax(logits.float(), -1)
    each = torch.sigmoid(logits.float())
    return each / each.sum(-1, keepdim=True)


def balance(
    routed: Sequence[Routed], example: torch.Tensor, lengths: torch.Tensor, processes: Any = None
) -> torch.Tensor:
    """Return the sum over examples of (tokens · load balancing loss), float32.

    Args:
        routed: of each layer with experts.
        example: [tokens] number of each token's example; of padding, the number of examples.
        lengths: [examples] tokens of each.
        processes: process group of the workers that have the other tokens of the examples; None if all are here.

    >>> even = torch.full((2, 4), 0.25), torch.tensor([[0, 1], [2, 3]])
    >>> balance([even, even], torch.tensor([0, 0]), torch.tensor([2]))  # 2 tokens · 2 experts of each
    tensor(4.)
    """
    experts, count = routed[0][0].shape[-1], len(lengths)
    likely, hits = torch.zeros(2, count + 1, experts, device=example.device)
    for probability, chosen in routed:
        likely = likely.index_add(0, example, probability)
        hits = hits.index_add(0, example, torch.zeros_like(probability).scatter_(-1, chosen, 1.0).detach())
    if processes is not None:
        of_all = torch.stack([likely.detach(), hits])
        dist.all_reduce(of_all, group=processes)
        likely, hits = likely + (of_all[0] - likely.detach()), of_all[1]
    return experts / len(routed) ** 2 * (hits[:count] * likely[:count] / lengths[:, None]).sum()


def examples_of(part: Batch) -> tuple[np.ndarray, int]:
    """Number the examples of some rows.

    Returns:
        [rows · tokens] number of each token's example, which for padding is the number of examples; and that number.
    """
    positions = part["position_ids"]
    padding = np.arange(positions.shape[1]) >= part["tokens"][:, None]
    starts = positions == 0
    starts[:, 0] = True
    starts &= ~padding
    example = starts.reshape(-1).cumsum() - 1
    count = int(starts.sum())
    return np.where(padding.reshape(-1), count, example), count
