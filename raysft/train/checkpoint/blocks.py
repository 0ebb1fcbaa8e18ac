"""States that bitsandbytes keeps in 8 bits: a code for each weight, and a scale for each block of 256.

Blocks begin where the tensor begins that the optimizer updates, which is another one with other workers or another ZeRO stage. So
a checkpoint has the states in float32, by the parameters' names, for any of them, and the codes as they are for the same ones.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

OF_BLOCKS = ("qmap1", "qmap2", "absmax1", "absmax2")
"""Names of states that belong to codes."""
BLOCK = 256
AT_ONCE = BLOCK * 2**18
"""Elements that are computed on the device at once."""


def has_blocks(optimizer: Any) -> bool:
    """Return True for an optimizer of bitsandbytes, which decides by size which states are codes."""
    return type(optimizer).__module__.startswith("bitsandbytes.")


def is_quantized(state: Mapping[str, Any], kind: str) -> bool:
    """Return True if a state is codes."""
    return kind.startswith("state") and f"absmax{kind[-1]}" in state and state[kind].dtype == torch.uint8


def dequantized(state: Mapping[str, Any], kind: str) -> torch.Tensor:
    """Return [elements] a state that is codes as numbers in float32, in CPU memory."""
    from bitsandbytes.functional import dequantize_blockwise

    codes, scales, table = state[kind].view(-1), state[f"absmax{kind[-1]}"], state[f"qmap{kind[-1]}"]
    values = torch.empty(len(codes), dtype=torch.float32)
    for start in range(0, len(codes), AT_ONCE):
        part = codes[start : start + AT_ONCE]
        blocks = scales[start // BLOCK : -(-(start + len(part)) // BLOCK)]
        values[start : start + AT_ONCE] = dequantize_blockwise(part, absmax=blocks, code=table, blocksize=BLOCK)
    return values


def codes_of(optimizer: Any, owners: Sequence[torch.Tensor]) -> list[dict[str, torch.Tensor]]:
    """Return copies of codes and scales of each owner, and of its small states that have none."""
    return [
        {
            name: value.cpu().clone()
            for name, value in optimizer.state[owner].items()
            if name.startswith(("state", "absmax"))
        }
        for owner in owners
    ]


@torch.no_grad()
def quantize(optimizer: Any, owner: torch.Tensor, codes: Mapping[str, torch.Tensor] | None) -> None:
    """Turn the state of one owner, read as float32, into what the optimizer keeps.

    Args:
        optimizer: of bitsandbytes.
        owner: the tensor that it updates.
        codes: codes and scales from ``codes_of``, if they are of this owner; otherwise they are computed from the numbers.
    """
    from bitsandbytes.functional import quantize_blockwise

    values, groups = optimizer.state[owner], optimizer.param_groups
    optimizer.state[owner] = {}
    # ZeRO-3 empties the groups between steps, and the optimizer looks there for the tensor's settings.
    optimizer.param_groups = [{**groups[0], "params": [owner]}]
    optimizer.init_state(optimizer.param_groups[0], owner, 0, 0)
    optimizer.param_groups = groups
    state = optimizer.state[owner]
    for name, value in values.items():
        if not torch.is_tensor(value):
            state[name] = value
        elif codes is None and is_quantized(state, name):
            numbers, scales = quantize_blockwise(
                value.to(owner.device).view(-1), code=state[f"qmap{name[-1]}"], blocksize=BLOCK
            )
            state[name].view(-1).copy_(numbers)
            state[f"absmax{name[-1]}"].copy_(scales.absmax)
        else:
            state[name].copy_(value)
    for name, value in (codes or {}).items():
        state[name].copy_(value)
