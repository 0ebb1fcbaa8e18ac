"""Checks before training that the loss is right for a model: its logits, causality, packed rows and slices of rows.

Each compares hidden states that must be equal, and rejects the model in one line if they are not.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from raysft.errors import RequestError
from raysft.models.attention import without_adapters
from raysft.models.examples import begin
from raysft.models.sequence_attention import REMEDY, own_kernel, with_attention
from raysft.train.loss import TokenLoss, decoder_and_head, scaled
from raysft.train.sequence_group import SequenceGroup

ROUNDING = 1e-3
"""The most that rounding changes in float32, as a share of the largest hidden state, where attention is computed in a different
order, which many layers amplify. Real errors change much more."""


@torch.no_grad()
def check_head(loss: TokenLoss, device: torch.device) -> None:
    """Check that decoder and head together give the model's logits; some models scale or cap logits after the head.

    Some vision-language models (AyaVision) leave out what their language model does on its own; then so does the loss.

    Raises:
        RequestError: the logits differ, so the loss would be wrong, or they are NaN.
    """
    decoder, head = decoder_and_head(loss.model)
    ids = torch.arange(8, device=device)[None]
    positions = torch.arange(8, device=device)[None]
    whole = loss.model(input_ids=ids, position_ids=positions, use_cache=False).logits.float()
    hidden = decoder(input_ids=ids, position_ids=positions, use_cache=False).last_hidden_state
    model, difference, logits = without_adapters(loss.model), torch.zeros(()), head(hidden)
    if whole.isnan().any():
        raise RequestError(
            f"{type(model).__name__} computes logits that are NaN from its first {ids.shape[1]} tokens: its weights hold NaN, "
            "or numbers that model.dtype cannot hold; use another model, or model.dtype=float32"
        )
    for model.has_plain_logits in (False, True):
        parts = scaled(logits, model).float()
        if torch.allclose(whole, parts, rtol=1e-3, atol=1e-3):
            return
        difference = (whole - parts).abs().max()
    raise RequestError(
        f"{type(model).__name__} changes its logits after the output head (by up to {difference:.2g}), "
        "which raysft does not support; use another architecture"
    )


@torch.no_grad()
def check_causal(loss: TokenLoss, device: torch.device) -> None:
    """Check that no token attends to later tokens, which it has to predict.

    Raises:
        RequestError: one does, as in encoders, so the loss would be meaningless.
    """
    ids = torch.arange(8, device=device)[None]
    other = ids.clone()
    other[:, 4:] += 13
    fault = "is not causal: changing later tokens changes earlier hidden states"
    _refuse_difference(loss, ids, other, ids, slice(4), fault, "use a causal language model")


@torch.no_grad()
def check_rows(loss: TokenLoss, device: torch.device, rows: int, remedy: str) -> None:
    """Check that the examples of a row do not attend to each other: changing the first must not change the second.

    Args:
        device: where the model is.
        rows: rows of a microbatch.
        remedy: for the error message.

    Raises:
        RequestError: they do, as in models with a recurrent state, or whose masks ignore positions.
    """
    positions = torch.arange(8, device=device).repeat(2)[None].expand(rows, -1).contiguous()
    ids = torch.arange(16, device=device)[None].expand(rows, -1) % 13
    other = ids.clone()
    other[:, :8] += 13
    fault = "does not keep the examples of a row apart: changing one changes the hidden states of the next"
    _refuse_difference(loss, ids, other, positions, slice(8, None), fault, remedy)


@torch.no_grad()
def check_slices(loss: TokenLoss, device: torch.device, group: SequenceGroup) -> None:
    """Check that a worker computes the same hidden states for its slice of a row as it would with the whole row.

    Raises:
        RequestError: they differ, as in models with a recurrent state, or whose layers use more than the positions they are given.
    """
    model = without_adapters(loss.model)
    if group.size == 1 or getattr(model, "is_loaded_in_8bit", False):
        return
    tokens, first = group.slice_tokens(16 * group.size) * group.size, 5
    # The second one crosses each seam.
    positions = np.concatenate([np.arange(first), np.arange(tokens - first)])[None]
    row = {"input_ids": np.arange(tokens)[None] % 13, "position_ids": positions}
    own, examples = group.cut(row)
    examples = examples.with_tensors(lambda tensor: tensor.to(device))
    decoder, _ = decoder_and_head(loss.model)
    whole, cut = ([torch.as_tensor(each[name], device=device) for name in row] for each in (row, own))
    part = examples.part
    assert part is not None
    with with_attention(loss.model, own_kernel(model)):
        expected = loss.hidden_states(decoder, whole[0], whole[1])[:, part.start : part.stop].float()
    try:
        found = loss.hidden_states(decoder, cut[0], cut[1], examples=examples).float()
    finally:
        begin(None)
    difference = torch.tensor(difference_of(expected, found, decoder, ROUNDING), device=device)
    dist.all_reduce(difference, dist.ReduceOp.MAX)  # the first slice of a row may be right on its own
    if difference:
        raise RequestError(
            f"{type(model).__name__} computes different hidden states for slices of a row than for the whole row (by "
            f"{difference:.2g}), so scaling.sequence_parallel={group.size} would train it wrongly; {REMEDY}"
        )


def _refuse_difference(
    loss: TokenLoss,
    ids: torch.Tensor,
    other: torch.Tensor,
    positions: torch.Tensor,
    tokens: slice,
    fault: str,
    remedy: str,
) -> None:
    """Reject the model if two inputs, [rows, tokens], have different hidden states at the given tokens."""
    if getattr(without_adapters(loss.model), "is_loaded_in_8bit", False):
        return  # LLM.int8 rounds each token depending on the whole batch
    decoder, _ = decoder_and_head(loss.model)
    states = [loss.hidden_states(decoder, tensor, positions)[:, tokens].float() for tensor in (ids, other)]
    if difference := difference_of(states[0], states[1], decoder):
        raise RequestError(f"{type(without_adapters(loss.model)).__name__} {fault} by {difference:.2g}; {remedy}")


def difference_of(one: torch.Tensor, other: torch.Tensor, decoder: Any, float32: float = 1e-5) -> float:
    """Return the largest difference between two hidden states, infinite if one is NaN; 0 if rounding explains it.

    Args:
        one: hidden states.
        other: the ones to compare with.
        decoder: the model they come from.
        float32: the most that rounding explains in float32, as a share of the largest state.
    """
    difference, size = float((one - other).abs().max()), float(one.abs().max())
    exact = next(decoder.parameters()).dtype == torch.float32
    if difference <= size * (float32 if exact else 2e-2) < math.inf:
        return 0.0
    # Unlike NaN, infinity survives taking the maximum.
    return math.inf if math.isnan(difference) else difference
