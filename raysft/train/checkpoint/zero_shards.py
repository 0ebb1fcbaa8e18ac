"""What an optimizer updates, as pieces of the model's parameters: the same view of ZeRO 0, 1, 2 and 3 at any number of workers."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist


@dataclass(frozen=True)
class Fragment:
    """A part of a parameter that this worker keeps."""

    name: str
    """Of the parameter, in the module that the engine wraps."""
    start: int
    """Its first element in the flattened parameter."""
    weight: torch.Tensor
    """[elements] of the weights that the optimizer updates, float32 also where the model computes in 16 bits; a view."""
    owner: torch.Tensor
    """What the optimizer knows the weights by: the parameter, or the flat part that ZeRO made of many."""
    offset: int
    """The first element in ``owner``."""

    def of(self, state: torch.Tensor) -> torch.Tensor:
        """[elements] of a state that the optimizer keeps for each weight of ``owner``; a view."""
        return state.view(-1)[self.offset : self.offset + len(self.weight)]


def fragments(engine: Any, all_of_them: bool = False) -> list[Fragment]:
    """This worker's fragments: together with those of all others each trained weight once.

    Args:
        engine: the DeepSpeed engine.
        all_of_them: also those that others have too, as without ZeRO all have all.
    """
    names = {id(parameter): name for name, parameter in engine.module.named_parameters()}
    stage = engine.zero_optimization_stage()
    if stage == 3:
        return list(_of_stage_3(engine.optimizer, names))
    if stage:
        return list(_of_stages_1_and_2(engine.optimizer, names))
    whole = [
        Fragment(names[id(parameter)], 0, parameter.data.view(-1), parameter, 0)
        for parameter in engine.module.parameters()
        if parameter.requires_grad
    ]
    return whole if all_of_them else whole[dist.get_rank() :: dist.get_world_size()]


def _of_stages_1_and_2(optimizer: Any, names: dict[int, str]) -> Iterator[Fragment]:
    for group, flat in zip(optimizer.bit16_groups, optimizer.single_partition_of_fp32_groups, strict=True):
        for parameter in group:
            mapping = parameter._hp_mapping
            if mapping is None:
                continue  # another worker's
            start, offset = mapping.lp_fragment_address.start, mapping.hp_fragment_address.start
            weight = flat.data[offset : offset + mapping.hp_fragment_address.numel]
            yield Fragment(names[id(parameter)], start, weight, flat, offset)


def _of_stage_3(optimizer: Any, names: dict[int, str]) -> Iterator[Fragment]:
    for group, flat in zip(optimizer.fp16_groups, optimizer.fp32_partitioned_groups_flat, strict=True):
        offset = 0
        for parameter in group:
            size = parameter.partition_numel()
            start = dist.get_rank() * size
            # What is beyond the end fills the last worker's part up.
            used = max(0, min(size, parameter.ds_numel - start))
            if used:
                yield Fragment(names[id(parameter)], start, flat.data[offset : offset + used], flat, offset)
            offset += size


def owners(engine: Any) -> list[torch.Tensor]:
    """All tensors that the optimizer of this worker updates, whether or not they have fragments of it."""
    optimizer = engine.optimizer
    if engine.zero_optimization_stage() == 3:
        return list(optimizer.fp32_partitioned_groups_flat)
    if engine.zero_optimization_stage():
        return list(optimizer.single_partition_of_fp32_groups)
    return [parameter for parameter in engine.module.parameters() if parameter.requires_grad]


def base_optimizer(engine: Any) -> Any:
    """The optimizer inside what ZeRO made of it."""
    return engine.optimizer.optimizer if engine.zero_optimization_stage() else engine.optimizer


@torch.no_grad()
def sync_model_weights(engine: Any) -> None:
    """Bring fragments that were set to where the model computes with them; all workers call it."""
    optimizer, stage = engine.optimizer, engine.zero_optimization_stage()
    if stage == 3:
        for index in range(len(optimizer.fp16_groups)):
            optimizer._reassign_or_swap_out_partitioned_parameters(index)
        if whole := optimizer.persistent_parameters:  # small ones, of which each worker also keeps a whole copy
            whole[0].partition(whole)
            whole[0].all_gather(whole)
    elif stage:
        optimizer.update_lp_params()
