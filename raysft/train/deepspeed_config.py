"""DeepSpeed settings from the config."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from raysft.config import Config, refuse_secrets
from raysft.errors import RequestError, one_line
from raysft.train.deepspeed_internals import numel

OURS = ("optimizer", "scheduler", "data_efficiency", "curriculum_learning")
"""Sections of a DeepSpeed config that would override our keys."""
INSTEAD = {
    "sequence_parallel_size": "scaling.sequence_parallel",
    "activation_checkpointing": "train.gradient_checkpointing, train.recompute_layers or train.offload.activations",
    "compile": "train.compile",
}
"""Keys of a DeepSpeed config that have no effect on transformers' models → raysft's keys to set instead."""
SUMS = "communication_data_type"
"""DeepSpeed's key for the data type in which the gradients of all workers are summed."""
LARGEST_BUCKET = 500_000_000
"""DeepSpeed's default number of gradient elements to reduce at once."""
LARGEST_SUB_GROUP = 10**15
"""More elements than any worker updates."""


def zero_stage(config: Config) -> int:
    """Return the ZeRO stage: at least 1 for 16-bit weights that need float32 copies, which DeepSpeed keeps from that stage on."""
    needs_copies = config.dtype != "float32" and not config.autocast and not config.train.pure_bf16
    return max(config.train.zero_stage, 1) if needs_copies else config.train.zero_stage


def deepspeed_settings(config: Config, workers: int) -> dict[str, Any]:
    """Merge the settings of the config, for a number of workers, with those of ``train.deepspeed``.

    Raises:
        RequestError: they contradict each other.
    """
    settings: dict[str, Any] = {
        **_sizes(config, workers),
        "gradient_clipping": config.train.max_grad_norm,
        "bf16": _bf16(config),
        "fp16": {"enabled": config.dtype == "float16"},
        "zero_optimization": {"stage": zero_stage(config), **_sub_groups(config), **_offload(config)},
        # If DeepSpeed's CPU optimizer cannot be compiled, an offloaded step uses torch's.
        "zero_force_ds_cpu_optimizer": False,
        # The config refuses the optimizers that ZeRO would break.
        "zero_allow_untested_optimizer": True,
        # Our step line has the same information.
        "steps_per_print": 2**31,
        "wall_clock_breakdown": False,
    }
    settings["torch_autocast"] = {"enabled": True, "dtype": "bfloat16"} if config.autocast else {"enabled": False}
    if sums_in_float32(config):
        settings[SUMS] = "fp32"
    return _merged(settings, given_settings(config), "train.deepspeed")


def sums_in_float32(config: Config) -> bool:
    """Return True if 16-bit gradients are summed in float32, as one worker sums those of all tokens of a row; on its own,
    DeepSpeed rounds each sum of two workers to 16 bits."""
    given = given_settings(config).get(SUMS, "auto")
    return config.scaling.sequence_parallel > 1 and config.weight_dtype != "float32" and given in ("auto", "fp32")


def _bf16(config: Config) -> dict[str, bool]:
    """Mixed precision in bfloat16; without ZeRO, DeepSpeed would make float32 copies, so pure bfloat16 is a plain engine there."""
    pure = config.train.pure_bf16
    enabled = config.dtype == "bfloat16" and not config.autocast and not (pure and config.train.zero_stage == 0)
    settings = {"enabled": enabled}
    if pure and enabled:
        settings |= {"bf16_master_weights_and_grads": True, "bf16_optimizer_states": True}
    return settings


def _sizes(config: Config, workers: int) -> dict[str, int]:
    """Batch sizes and accumulation; empty while ``train.global_batch_size`` is auto and the data is not known yet.

    DeepSpeed counts the rows of each worker, even where several share them.
    """
    if config.train.global_batch_size == "auto":
        return {}
    rows = -(-config.train.global_batch_size // (workers // config.scaling.sequence_parallel))
    micro = min(config.micro_batch_size, rows)
    accumulation = -(-rows // micro)
    return {
        "train_batch_size": micro * accumulation * workers,
        "train_micro_batch_size_per_gpu": micro,
        "gradient_accumulation_steps": accumulation,
    }


def _sub_groups(config: Config) -> dict[str, int]:
    """Have ZeRO-3 update a whole group at once where the optimizer may count steps per group."""
    return (
        {"sub_group_size": LARGEST_SUB_GROUP}
        if config.train.zero_stage == 3 and config.train.optimizer != "adamw"
        else {}
    )


def with_bucket(settings: Mapping[str, Any], model: Any) -> dict[str, Any]:
    """Limit the reduce bucket to the number of trained elements, unless ``train.deepspeed`` sets it.

    DeepSpeed allocates the whole bucket, in each backward or permanently, even if little is trained: 2 GB for a LoRA of 5 MB.
    Its other bucket sizes are limits and allocate nothing.
    """
    trained = sum(numel(parameter) for parameter in model.parameters() if parameter.requires_grad)
    zero = {"reduce_bucket_size": min(LARGEST_BUCKET, trained), **settings["zero_optimization"]}
    return {**settings, "zero_optimization": zero}


def _offload(config: Config) -> dict[str, Any]:
    offload = config.train.offload
    return {
        key: {
            "device": device,
            "pin_memory": config.scaling.use_gpu,
            **({"nvme_path": str(Path(offload.folder or "").expanduser().absolute())} if device == "nvme" else {}),
        }
        for key, device in (("offload_optimizer", offload.optimizer), ("offload_param", offload.parameters))
        if device != "none"
    }


def given_settings(config: Config) -> Mapping[str, Any]:
    """Return the settings of ``train.deepspeed``, which may be in a file.

    Raises:
        RequestError: the file cannot be used.
    """
    given = config.train.deepspeed
    if isinstance(given, dict):
        return given
    try:
        read = json.loads(Path(given).expanduser().read_text(encoding="utf-8-sig"))
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or one_line(error)
        raise RequestError(f"train.deepspeed={given}: cannot be read as JSON ({reason}); fix the file") from None
    if not isinstance(read, dict):
        raise RequestError(
            f"train.deepspeed={given}: does not contain a JSON object; use a file that maps names to DeepSpeed settings"
        )
    refuse_secrets(read, lambda place: f"train.deepspeed={given}")
    return read


def _merged(ours: Mapping[str, Any], given: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Merge two settings that must agree where both have a key. ``auto``, as in Hugging Face's files, takes ours."""
    merged = dict(ours)
    for key, value in given.items():
        path = f"{where}.{key}"
        if where == "train.deepspeed" and key in OURS:
            raise RequestError(f"{path} is set by raysft (train.optimizer, train.schedule, data); remove it")
        if where == "train.deepspeed" and key in INSTEAD:
            raise RequestError(f"{path} has no effect here; remove it, or set {INSTEAD[key]} instead")
        if value == "auto":
            continue
        if isinstance(value, Mapping) and isinstance(ours.get(key, {}), Mapping):
            merged[key] = _merged(ours.get(key, {}), value, path)
        elif key in ours and ours[key] != value:
            raise RequestError(f"{path}={value!r}, but the rest of the config sets it to {ours[key]!r}; remove it")
        else:
            merged[key] = value
    return merged
