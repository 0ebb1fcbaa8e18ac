"""What an optimizer cannot be combined with, from the table of ``optimizers.py``."""

from __future__ import annotations

import re
from collections.abc import Iterator

from raysft.config.config import Config
from raysft.config.optimizer_settings import setting_conflicts
from raysft.config.optimizers import DIVIDES, kind_of, whole_option
from raysft.errors import as_yaml

TARGETED = ("galore", "fira", "apollo")
"""Optimizers that project matrices, which ``train.optimizer_target`` selects."""
LORA_PLUS = ("adamw", "adam", "adamw_8bit", "paged_adamw", "paged_adamw_8bit")
"""Optimizers whose updates have the size of Adam's, for which LoRA+ derives its ratio."""
SCHEDULED = ("constant", "constant_with_warmup")


def optimizer_conflicts(config: Config) -> Iterator[str]:
    """Yield what contradicts ``train.optimizer``."""
    train, finetuning = config.train, config.model.finetuning
    name, kind = train.optimizer, kind_of(train.optimizer)
    named = f"train.optimizer={name}"
    yield from setting_conflicts(train)
    if not kind.elementwise:
        yield from _whole(config, named, "use adamw")
    elif whole := whole_option(train.optimizer_options):
        yield from _whole(config, f"train.optimizer_options.{whole}", f"remove {whole}")
    warmup = "warmup_ratio" if train.warmup_steps is None else "warmup_steps"
    if name in DIVIDES and train.schedule != "constant" and getattr(train, warmup):
        yield (
            f"{named} divides by the learning rate, but a warm-up starts at 0 (train.{warmup}={getattr(train, warmup)}); "
            "set train.warmup_steps=0"
        )
    if not kind.adapters and config.model.adapter is not None:
        yield (
            f"{named} saves memory only for full matrices, but model.finetuning={finetuning} trains small ones; "
            "set model.finetuning to full or freeze, or use adamw"
        )
    if not kind.workers and config.scaling.most_workers > 1:
        reason = "" if name == "badam" else " (each would draw its own random numbers)"
        yield (
            f"{named} supports one worker{reason}, but scaling.num_workers={as_yaml(config.scaling.num_workers)}; "
            "use 1 worker or another optimizer"
        )
    if not train.resumes and train.saves_on_schedule:
        key = "save_every_epochs" if train.save_every_steps is None else "save_every_steps"
        yield (
            f"{named} cannot resume from a checkpoint (it keeps the state of one block at a time), but "
            f"train.{key}={getattr(train, key)} saves checkpoints; remove it or use another optimizer"
        )
    offload = train.offload.optimizer
    if offload == "nvme" and name != "adamw" and kind.elementwise:
        yield f"train.offload.optimizer=nvme supports only adamw, but {named}; use adamw or train.offload.optimizer=cpu"
    if offload == "cpu" and name.startswith("paged_"):
        yield f"{named} pages its states itself, but train.offload.optimizer=cpu offloads them as well; set it to none"
    if kind.averages and train.schedule not in SCHEDULED:
        yield (
            f"{named} averages weights instead of following a schedule, but train.schedule={train.schedule}; "
            "set train.schedule=constant_with_warmup or constant"
        )
    if train.optimizer_target != "all" and name not in TARGETED:
        yield (
            f"train.optimizer_target selects matrices to project, but {named} projects none; "
            f"remove it, or use {', '.join(TARGETED[:-1])} or {TARGETED[-1]}"
        )
    for target in () if train.optimizer_target == "all" else train.optimizer_target:
        try:
            re.compile(target)
        except re.error as error:
            yield f"train.optimizer_target contains {target!r}, which is not a valid regular expression ({error}); correct it"
    if finetuning == "lora" and config.model.lora.loraplus_ratio is not None and name not in LORA_PLUS:
        yield (
            f"model.lora.loraplus_ratio requires one of {', '.join(LORA_PLUS)}, but {named}; "
            "use adamw or remove loraplus_ratio"
        )


def _whole(config: Config, named: str, remedy: str) -> Iterator[str]:
    """Yield what contradicts an optimizer or option that needs whole matrices."""
    train = config.train
    if train.zero_stage:
        yield (
            f"{named} requires whole matrices, but train.zero_stage={train.zero_stage} partitions them; "
            f"set train.zero_stage=0 or {remedy}"
        )
    if config.dtype == "float16":
        yield f"{named} does not support loss scaling, but model.dtype=float16 requires it; use bfloat16 or float32"
