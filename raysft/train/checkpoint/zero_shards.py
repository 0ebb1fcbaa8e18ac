"""The weights that an optimizer updates, as pieces of the model's parameters: one view of ZeRO 0 to 3 at any number of workers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from raysft.train.deepspeed_internals import optimized_tensors, trained_pieces


@dataclass(frozen=True)
class Fragment:
    """A part of a parameter that this worker keeps."""

    name: str
    """The parameter's name in the module that the engine wraps."""
    start: int
    """The fragment's first element in the flattened parameter."""
    weight: torch.Tensor
    """[elements] the weights that the optimizer updates, in float32 even if the model computes in 16 bits; a view."""
    owner: torch.Tensor
    """The tensor by which the optimizer knows the weights: the parameter, or the flat one that ZeRO made of many."""
    offset: int
    """The fragment's first element in ``owner``."""

    def of(self, state: torch.Tensor) -> torch.Tensor:
        """Return [elements] of an optimizer state that has one number for each weight of ``owner``; a view."""
        return state.view(-1)[self.offset : self.offset + len(self.weight)]


def fragments(engine: Any, replicated: bool = False) -> list[Fragment]:
    """Return this worker's fragments; with those of all other workers they cover each trained weight once.

    Args:
        engine: the DeepSpeed engine.
        replicated: include the fragments that others keep too: without ZeRO each worker has all of them.
    """
    names = {id(parameter): name for name, parameter in engine.module.named_parameters()}
    if engine.zero_optimization_stage():
        return [
            Fragment(names[id(piece.parameter)], piece.start, _weights_of(piece), piece.flat, piece.offset)
            for piece in trained_pieces(engine)
        ]
    whole = [Fragment(names[id(parameter)], 0, parameter.data.view(-1), parameter, 0) for parameter in owners(engine)]
    return whole if replicated else whole[dist.get_rank() :: dist.get_world_size()]


def _weights_of(piece: Any) -> torch.Tensor:
    return piece.flat.data[piece.offset : piece.offset + piece.size]


def owners(engine: Any) -> list[torch.Tensor]:
    """Return all tensors that this worker's optimizer updates, including those of which it keeps no fragment."""
    if engine.zero_optimization_stage():
        return optimized_tensors(engine)
    return [parameter for parameter in engine.module.parameters() if parameter.requires_grad]
