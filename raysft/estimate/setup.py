"""What a config says about the memory of its training."""

from __future__ import annotations

from typing import Any

from raysft.config import Config
from raysft.estimate.states import Setup


def setup_of(config: Config, workers: int, rows_per_worker: int, reference: int = 0) -> Setup:
    """Return the setup of a training run.

    Args:
        config: the run's config.
        workers: number of workers.
        rows_per_worker: rows of a step that each of them has.
        reference: elements of ``train.reference_model``.
    """
    from raysft.train.deepspeed_config import deepspeed_settings, sums_in_float32

    zero: dict[str, Any] = deepspeed_settings(config, workers)["zero_optimization"]
    offload = config.train.offload
    return Setup(
        zero_stage=int(zero["stage"]),
        workers=workers,
        width=4 if config.weight_dtype == "float32" else 2,
        optimizer=config.train.optimizer,
        options=config.train.optimizer_options,
        offload_optimizer=offload.optimizer != "none",
        offload_parameters=offload.parameters != "none",
        offload_activations=offload.activations != "none",
        bucket=_elements(zero.get("reduce_bucket_size")),
        double_bucket=bool(zero.get("overlap_comm", int(zero["stage"]) == 3)),
        sums_in_float32=sums_in_float32(config),
        accumulates=rows_per_worker > config.micro_batch_size,
        quantization=config.model.quantization,
        double_quantization=config.model.double_quantization,
        pure_bf16=config.train.pure_bf16,
        copies_start=config.copies_start,
        reference=reference,
    )


def _elements(value: Any) -> int | None:
    return int(value) if isinstance(value, int | float) else None
