"""The private parts of DeepSpeed that raysft uses, in one place; ``tests/contracts/test_deepspeed.py`` checks that they exist.

ZeRO 1, 2 and 3 each keep their own names for the flat float32 tensors that the optimizer updates and for the pieces of parameters
in them. ``trained_pieces`` and ``optimized_tensors`` give one view of all three.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import torch.distributed as dist


class TrainedPiece(NamedTuple):
    """Elements of a parameter whose float32 copy this worker's optimizer updates."""

    parameter: torch.Tensor
    start: int
    """The first of the elements, in the flattened parameter."""
    size: int
    flat: torch.Tensor
    """The tensor that holds the float32 copy, with those of other parameters."""
    offset: int
    """The first of the elements, in ``flat``."""


def use_gloo_allreduce() -> None:
    """Keep DeepSpeed from compiling its own all-reduce on CPU nodes: it takes most of a minute, and a compiler, to do what gloo
    does. Asking DeepSpeed here what can be compiled would start compilers in every worker."""
    import deepspeed

    deepspeed.ops.__dict__.setdefault("__compatible_ops__", {})["deepspeed_shm_comm"] = False


def numel(parameter: Any) -> int:
    """Return the number of elements of a whole parameter; under ZeRO-3, a worker holds only a part of it."""
    return int(getattr(parameter, "ds_numel", parameter.numel()))


def dimensions(parameter: Any) -> int:
    """Return the number of dimensions of a whole parameter; ZeRO-3 leaves an empty vector in its place."""
    return len(getattr(parameter, "ds_shape", parameter.shape))


def is_partitioned(parameter: Any) -> bool:
    """Return True if ZeRO-3 has split a parameter among the workers."""
    return hasattr(parameter, "ds_id")


def keeps_gradient_norm(engine: Any) -> bool:
    """Return True if the engine's optimizer keeps the norm of the gradient; a plain one (ZeRO 0 in float32) does not."""
    return hasattr(engine.optimizer, "_global_grad_norm")


def base_optimizer(engine: Any) -> Any:
    """Return the torch optimizer inside ZeRO's wrapper."""
    return engine.optimizer.optimizer if engine.zero_optimization_stage() else engine.optimizer


def loss_scaler(engine: Any) -> Any:
    """Return the object that scales the loss of float16 training, or None."""
    return getattr(engine.optimizer, "loss_scaler", None)


def optimized_tensors(engine: Any) -> list[torch.Tensor]:
    """Return all flat tensors that this worker's optimizer updates under ZeRO 1 to 3."""
    if engine.zero_optimization_stage() == 3:
        return list(engine.optimizer.fp32_partitioned_groups_flat)
    return list(engine.optimizer.single_partition_of_fp32_groups)


def trained_pieces(engine: Any) -> Iterator[TrainedPiece]:
    """Yield this worker's pieces under ZeRO 1 to 3; with those of all other workers they cover each trained weight once."""
    if engine.zero_optimization_stage() == 3:
        return _pieces_of_stage_3(engine.optimizer)
    return _pieces_of_stages_1_and_2(engine.optimizer)


def _pieces_of_stages_1_and_2(optimizer: Any) -> Iterator[TrainedPiece]:
    for group, flat in zip(optimizer.bit16_groups, optimizer.single_partition_of_fp32_groups, strict=True):
        for parameter in group:
            mapping = parameter._hp_mapping
            if mapping is None:
                continue  # another worker's
            start, fragment = mapping.lp_fragment_address.start, mapping.hp_fragment_address
            yield TrainedPiece(parameter, start, fragment.numel, flat, fragment.start)


def _pieces_of_stage_3(optimizer: Any) -> Iterator[TrainedPiece]:
    for group, flat in zip(optimizer.fp16_groups, optimizer.fp32_partitioned_groups_flat, strict=True):
        offset = 0
        for parameter in group:
            partition = parameter.partition_numel()
            start = dist.get_rank() * partition
            # The last worker's partition is padded beyond the parameter's end.
            size = max(0, min(partition, parameter.ds_numel - start))
            if size:
                yield TrainedPiece(parameter, start, size, flat, offset)
            offset += partition


@torch.no_grad()
def sync_model_weights(engine: Any) -> None:
    """Copy the float32 weights, after they were set, to where the model computes with them. All workers call it."""
    optimizer, stage = engine.optimizer, engine.zero_optimization_stage()
    if stage == 3:
        for index in range(len(optimizer.fp16_groups)):
            optimizer._reassign_or_swap_out_partitioned_parameters(index)
        if small := optimizer.persistent_parameters:  # each worker also keeps a whole copy of these
            small[0].partition(small)
            small[0].all_gather(small)
    elif stage:
        optimizer.update_lp_params()


def is_cpu_adam(optimizer: Any) -> bool:
    """Return True for DeepSpeed's CPU-Adam."""
    return hasattr(optimizer, "ds_opt_adam")


def replay_cpu_adam(optimizer: Any, steps: int) -> None:
    """Set the bias correction of DeepSpeed's CPU-Adam to its value after ``steps`` steps.

    It accumulates the powers of its betas by one factor per step, and they cannot be set; computing them another way differs in
    the last digit.
    """
    nothing = [torch.zeros(1) for _ in range(4)]
    for step in range(1, steps + 1):
        optimizer.ds_opt_adam.adam_update(
            optimizer.opt_id, step, 0.0, *optimizer.param_groups[0]["betas"], 1.0, 0.0, True, *nothing
        )
