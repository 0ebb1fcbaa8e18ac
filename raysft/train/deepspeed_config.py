"""Config → DeepSpeed's settings."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from raysft.config import Config, refuse_secrets
from raysft.errors import RequestError

OURS = ("optimizer", "scheduler", "data_efficiency", "curriculum_learning")
"""Sections of DeepSpeed that would take over what a config of ours decides."""
LARGEST_BUCKET = 500_000_000
"""Gradients that DeepSpeed reduces at once unless told otherwise."""


def zero_stage(config: Config) -> int:
    """The ZeRO stage, at least 1 where weights are 16-bit: without ZeRO DeepSpeed would update them as they are, and small
    steps would be lost; from stage 1 on it keeps float32 ones."""
    return (
        max(config.train.zero_stage, 1)
        if config.dtype != "float32" and not config.autocast
        else config.train.zero_stage
    )


def deepspeed_settings(config: Config, workers: int) -> dict[str, Any]:
    """The settings that a config asks for, at a number of workers, with those of ``train.deepspeed``.

    Raises:
        RequestError: the two contradict each other.
    """
    mixed = config.dtype if not config.autocast else "float32"
    settings: dict[str, Any] = {
        **_sizes(config, workers),
        "gradient_clipping": config.train.max_grad_norm,
        "bf16": {"enabled": mixed == "bfloat16"},
        "fp16": {"enabled": mixed == "float16"},
        "zero_optimization": {"stage": zero_stage(config), **_offload(config)},
        # An offloaded step is torch's own where DeepSpeed's cannot be compiled.
        "zero_force_ds_cpu_optimizer": False,
        # Our own step line says all that its print-outs say.
        "steps_per_print": 2**31,
        "wall_clock_breakdown": False,
    }
    settings["torch_autocast"] = {"enabled": True, "dtype": "bfloat16"} if config.autocast else {"enabled": False}
    return _merged(settings, _given(config), "train.deepspeed")


def _sizes(config: Config, workers: int) -> dict[str, int]:
    """How a step's rows are cut up; nothing as long as the data has not decided how many there are."""
    if config.train.global_batch_size == "auto":
        return {}
    rows = -(-config.train.global_batch_size // workers)
    micro = min(config.train.micro_batch_size, rows)
    accumulation = -(-rows // micro)
    return {
        "train_batch_size": micro * accumulation * workers,
        "train_micro_batch_size_per_gpu": micro,
        "gradient_accumulation_steps": accumulation,
    }


def with_bucket(settings: Mapping[str, Any], model: Any) -> dict[str, Any]:
    """The settings with a reduce bucket that holds no more than the gradients there are, unless ``train.deepspeed`` has one.

    DeepSpeed allocates the whole bucket in each backward, or for good, however little is trained: 2 GB for a LoRA of 5 MB. Its
    other bucket sizes are limits and allocate nothing.
    """
    trained = sum(size(parameter) for parameter in model.parameters() if parameter.requires_grad)
    zero = {"reduce_bucket_size": min(LARGEST_BUCKET, trained), **settings["zero_optimization"]}
    return {**settings, "zero_optimization": zero}


def size(parameter: Any) -> int:
    """Elements of a whole parameter, of which a worker holds but a part under ZeRO-3."""
    return int(getattr(parameter, "ds_numel", parameter.numel()))


def _offload(config: Config) -> dict[str, Any]:
    wanted = config.train.offload
    return {
        key: {
            "device": device,
            "pin_memory": config.scaling.use_gpu,
            **({"nvme_path": str(Path(wanted.folder or "").expanduser().absolute())} if device == "nvme" else {}),
        }
        for key, device in (("offload_optimizer", wanted.optimizer), ("offload_param", wanted.parameters))
        if device != "none"
    }


def _given(config: Config) -> Mapping[str, Any]:
    given = config.train.deepspeed
    if isinstance(given, dict):
        return given
    try:
        read = json.loads(Path(given).expanduser().read_text(encoding="utf-8-sig"))
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise RequestError(f"train.deepspeed={given}: is no JSON file that can be read ({reason}); mend it") from None
    if not isinstance(read, dict):
        raise RequestError(f"train.deepspeed={given}: holds no JSON object; give DeepSpeed's settings by their names")
    refuse_secrets(read, lambda place: f"train.deepspeed={given}")
    return read


def _merged(ours: Mapping[str, Any], given: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Both together; where both say something they must say the same. ``auto``, as Hugging Face writes it, leaves it to us."""
    merged = dict(ours)
    for key, value in given.items():
        path = f"{where}.{key}"
        if where == "train.deepspeed" and key in OURS:
            raise RequestError(f"{path}: raysft sets this itself (train.optimizer, train.schedule, data); take it out")
        if value == "auto":
            continue
        if isinstance(value, Mapping) and isinstance(ours.get(key, {}), Mapping):
            merged[key] = _merged(ours.get(key, {}), value, path)
        elif key in ours and ours[key] != value:
            raise RequestError(f"{path}={value!r} and the rest of the config makes it {ours[key]!r}; take it out")
        else:
            merged[key] = value
    return merged
