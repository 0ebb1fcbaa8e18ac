"""Keys of LLaMA-Factory that take effect together: optimizer, loss, DeepSpeed, FP8."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from raysft.config.llamafactory.settings import Entry, Refusal, Settings
from raysft.config.llamafactory.translation import Derived
from raysft.config.optimizers import kind_of
from raysft.errors import as_yaml, one_line

OPTIONS = {
    "galore": {
        "rank": "galore_rank",
        "update_proj_gap": "galore_update_interval",
        "scale": "galore_scale",
        "proj_type": "galore_proj_type",
    },
    "apollo": {
        "rank": "apollo_rank",
        "update_proj_gap": "apollo_update_interval",
        "scale": "apollo_scale",
        "proj": "apollo_proj",
        "proj_type": "apollo_proj_type",
        "scale_type": "apollo_scale_type",
    },
    "badam": {
        "switch_block_every": "badam_switch_interval",
        "switch_mode": "badam_switch_mode",
        "start_block": "badam_start_block",
    },
}
"""Optimizer → option of its library → key."""
ADAMS_BETAS = ("lion", "lion_8bit", "paged_lion", "paged_lion_8bit", "stable_adamw", "grokfast_adamw")
"""Optimizers with other betas, to which transformers hands those of Adam."""
NOTES = {
    "grokfast_adamw": "by pytorch_optimizer, whose algorithm is Grokfast's",
    "stable_adamw": "by pytorch_optimizer",
    "adam_mini": "by pytorch_optimizer",
    "muon": "by PyTorch",
}
EXAMPLES: dict[str, dict[str, Any]] = {
    "ds_z0_config.json": {"stage": 0},
    "ds_z2_config.json": {"stage": 2},
    "ds_z2_offload_config.json": {"stage": 2, "offload_optimizer": {"device": "cpu"}},
    "ds_z3_config.json": {"stage": 3},
    "ds_z3_fp8_config.json": {"stage": 3},
    "ds_z3_offload_config.json": {
        "stage": 3,
        "offload_optimizer": {"device": "cpu"},
        "offload_param": {"device": "cpu"},
    },
}
"""DeepSpeed settings of LLaMA-Factory's examples, which a file may name from anywhere."""
OFFLOAD = {"offload_optimizer": "optimizer", "offload_param": "parameters"}


def optimizer(given: Settings) -> Derived:
    """Optimizer and its options."""
    flags = [name for name in ("galore", "apollo", "badam", "adam_mini", "muon") if given[f"use_{name}"]]
    if len(flags) > 1:
        yield Refusal(f"use_{flags[1]}", f"use_{flags[0]} and use_{flags[1]} are both true; set only one of them")
    name = flags[0] if flags else given["optim"]
    note = NOTES.get(name, "")
    if f"{name}_layerwise" in ("galore_layerwise", "apollo_layerwise") and given[f"{name}_layerwise"]:
        note += "; not layer-wise, which needs more memory and allows gradient clipping"
    if flags and name in ("galore", "apollo") and given["optim"] not in ("adamw", name):
        yield Refusal("optim", f"use_{name} with optim={given['optim']} is not supported; set optim to adamw_torch")
    key = f"use_{name}" if flags else "optim"
    yield Entry("train.optimizer", name, key, note.removeprefix("; "))
    if name == "badam" and given["badam_mode"] != "layer":
        yield Refusal(
            "badam_mode",
            "badam_mode=ratio masks each gradient as it arrives, which rules out gradient accumulation and clipping; use layer",
        )
    yield from _optimizer_options(given, name, key)
    if target := _optimizer_target(given, name, bool(flags)):
        yield target
    if not kind_of(name).elementwise and given["deepspeed"] is None:
        yield Entry("train.zero_stage", 0, key, "the optimizer needs whole matrices")


def _optimizer_options(given: Settings, name: str, key: str) -> Derived:
    chosen = {option: given[each] for option, each in OPTIONS.get(name, {}).items() if given[each] is not None}
    if key == "optim":
        chosen |= given["optim_args"]
    if name in ADAMS_BETAS:
        chosen.setdefault("betas", [given["adam_beta1"], given["adam_beta2"]])
    note = ""
    if name == "apollo" and given["apollo_scale_front"]:
        chosen["scale_front"] = True
        note = "scale_front takes effect here, while LLaMA-Factory sets it where the library does not read it"
    if chosen:
        yield Entry("train.optimizer_options", chosen, key, note)


def _optimizer_target(given: Settings, name: str, flagged: bool) -> Entry | None:
    key = f"{name}_target" if flagged and name in ("galore", "apollo") else "optim_target_modules"
    value = given[key]
    return None if value in (None, "all", "all-linear") else Entry("train.optimizer_target", value, key)


def loss(given: Settings) -> Derived:
    """Loss of a token, and the frozen model that it needs."""
    names = [name for name in ("dft", "eaft", "asft") if given[f"use_{name}_loss"]]
    if len(names) > 1:
        first, second = (f"use_{name}_loss" for name in names[:2])
        yield Refusal(second, f"{first} and {second} are both true; set only one of them")
    name = names[0] if names else "cross_entropy"
    note = ""
    if name == "asft":
        note = "averaged over the loss tokens of a step, not over the means of its microbatches"
        yield from _reference(given)
    yield Entry("train.loss", name, f"use_{name}_loss" if names else "use_dft_loss", note)


def _reference(given: Settings) -> Derived:
    """The model that ASFT stays close to. LLaMA-Factory reads its adapters and bits only beside its path."""
    model, adapters, bits = given["ref_model"], given["ref_model_adapters"], given["ref_model_quantization_bit"]
    if model is None:
        return
    if len(adapters) > 1:
        yield Refusal(
            "ref_model_adapters", "ref_model_adapters: a reference model can have only one adapter; merge them first"
        )
    if bits is not None and bits != given["quantization_bit"]:
        yield Refusal(
            "ref_model_quantization_bit",
            f"ref_model_quantization_bit={bits}, but quantization_bit={as_yaml(given['quantization_bit'])}; raysft quantizes "
            "both models alike: set both to the same",
        )
    alike = "quantized like the trained model" if given["quantization_bit"] is not None and bits is None else ""
    based = "on the base model that the adapter names" if adapters else ""
    key = "ref_model_adapters" if adapters else "ref_model"
    yield Entry("train.reference_model", (adapters or [model])[0], key, "; ".join(filter(None, (based, alike))))


def fp8(given: Settings) -> Derived:
    """FP8."""
    backend = given["fp8_backend"]
    if given["fp8"] and backend not in ("auto", "torchao"):
        yield Refusal("fp8_backend", f"fp8_backend={backend} is not supported; use torchao")
    yield Entry("train.fp8", "torchao" if given["fp8"] else "off", "fp8")


def deepspeed(given: Settings) -> Derived:
    """DeepSpeed settings: stage and offload are keys of raysft, all others are handed over."""
    named = given["deepspeed"]
    if named is None:
        return
    settings = named if isinstance(named, dict) else _read(named)
    if isinstance(settings, Refusal):
        yield settings
        return
    if "tensor_parallel" in settings:
        yield Refusal("deepspeed", "deepspeed: tensor_parallel is not supported; use ZeRO-3")
        return
    zero = settings.get("zero_optimization") or {}
    offload = {section: zero.get(section) or {} for section in OFFLOAD} if isinstance(zero, dict) else {}
    if wrong := [name for name, part in {"zero_optimization": zero, **offload}.items() if not isinstance(part, dict)]:
        yield Refusal("deepspeed", f"deepspeed: {wrong[0]} must be a mapping; correct it")
        return
    yield Entry("train.zero_stage", zero.get("stage", 0), "deepspeed", "" if isinstance(named, dict) else f"of {named}")
    for section, name in OFFLOAD.items():
        part = offload[section]
        yield Entry(f"train.offload.{name}", part.get("device") or "none", "deepspeed")
        if part.get("nvme_path"):
            yield Entry("train.offload.folder", part["nvme_path"], "deepspeed")
    rest = {key: value for key, value in settings.items() if key not in ("zero_optimization", "bf16", "_comment")}
    if not given["fp16"]:
        rest.pop("fp16", None)
    rest["zero_optimization"] = {key: value for key, value in zero.items() if key not in ("stage", *OFFLOAD)}
    yield Entry("train.deepspeed", _without_auto(rest), "deepspeed")


def _read(path: str) -> dict[str, Any] | Refusal:
    file = Path(path).expanduser()
    try:
        found = json.loads(file.read_text(encoding="utf-8-sig"))
    except FileNotFoundError:
        known = EXAMPLES.get(file.name)
        return (
            {"zero_optimization": known}
            if known
            else Refusal("deepspeed", f"deepspeed={path}: no such file; correct it")
        )
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or one_line(error)
        return Refusal("deepspeed", f"deepspeed={path}: cannot be read as JSON ({reason}); correct it")
    if not isinstance(found, dict):
        return Refusal("deepspeed", f"deepspeed={path}: does not contain DeepSpeed settings; correct it")
    return found


def _without_auto(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Settings without those that are left to the trainer, and without sections that are then empty."""
    kept = {
        key: _without_auto(value) if isinstance(value, dict) else value
        for key, value in settings.items()
        if value != "auto"
    }
    return {key: value for key, value in kept.items() if value != {}}


OPTIMIZER: tuple[Callable[[Settings], Derived], ...] = (optimizer, loss, fp8, deepspeed)
