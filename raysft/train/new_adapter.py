"""New adapters: peft's configuration of what the config asks for."""

from __future__ import annotations

import warnings
from typing import Any

from torch import nn

from raysft.config import Config
from raysft.models.adapter_files import base_name
from raysft.models.lora_targets import modules_in, names_experts, set_targets, target_experts, target_routers, targeted
from raysft.models.model_parts import whole_modules
from raysft.models.new_tokens import vocabulary_modules


def add_adapter(model: Any, adapter_config: Any) -> Any:
    """Add a new adapter to a model."""
    from peft import get_peft_model

    with warnings.catch_warnings():
        # A head that is trained separately from the embedding: ``merge_adapter`` unties them.
        warnings.filterwarnings("ignore", ".*a tied layer is part of the adapter")
        warnings.filterwarnings("ignore", ".*is_gradient_checkpointing", FutureWarning)  # peft reads its former name
        # It looks among modules for the ranks of parameters, which it has applied.
        warnings.filterwarnings("ignore", ".*pattern keys did not match.*gate_up_proj", RuntimeWarning)
        return get_peft_model(model, adapter_config)


def add_adapter_beside(model: Any, name: str, adapter_config: Any) -> None:
    """Add another adapter to a model that has one and continues with it."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*a tied layer is part of the adapter")
        model.add_adapter(name, adapter_config)


def peft_config(model: nn.Module, config: Config, path: str) -> Any:
    from peft import LoraConfig, OFTConfig

    section = config.model.lora if config.model.finetuning == "lora" else config.model.oft
    vocabulary, (base, revision) = vocabulary_modules(model, config), base_name(path)
    parts = config.model.train_parts
    projector = whole_modules(model, "projector") if "projector" in parts else []
    shared: dict[str, Any] = {
        "task_type": "CAUSAL_LM",
        "target_modules": "all-linear" if section.target == "all" else targeted(model, section.target, parts),
        # Full names: peft matches every module whose name ends like the given one, input_layernorm for norm.
        # An embedding that is also the head becomes two: a tied copy would not survive ZeRO, merging and every kind of adapter.
        "modules_to_save": [
            *(
                name
                for name in modules_in(model, parts)
                if f".{name}".endswith(tuple(f".{extra}" for extra in section.extra_modules)) or name in vocabulary
            ),
            *projector,
        ]
        or None,
        "base_model_name_or_path": base,
        "revision": revision,
    }
    lora, oft = config.model.lora, config.model.oft
    if config.model.finetuning == "oft":
        adapter_config: Any = OFTConfig(r=0, oft_block_size=oft.block_size, module_dropout=oft.dropout, **shared)
    else:
        pissa = "pissa" if not lora.pissa_iterations else f"pissa_niter_{lora.pissa_iterations}"
        adapter_config = LoraConfig(
            r=lora.rank,
            lora_alpha=config.lora_alpha,  # type: ignore[arg-type]  # peft takes any number
            lora_dropout=lora.dropout,
            use_dora=lora.dora,
            use_rslora=lora.rslora,
            init_lora_weights=pissa if lora.pissa else True,  # type: ignore[arg-type]
            **shared,
        )
    if section.target == "all":
        set_targets(adapter_config, model, parts)
    elif config.model.finetuning == "lora":
        if any(names_experts(target) for target in section.target):
            target_experts(adapter_config, model, section.target)
        target_routers(adapter_config, model)
    return adapter_config
