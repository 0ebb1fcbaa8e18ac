"""The model as it is trained: loaded in its form, and fitted with what is to be learnt."""

from __future__ import annotations

import importlib.util
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from raysft.config import Config
from raysft.errors import RequestError
from raysft.models.adapters import load_adapter, load_with_base
from raysft.models.attention import kernel, use_examplewise, without_adapters
from raysft.models.loading import load_weights
from raysft.models.lora_targets import linear_layers, set_targets
from raysft.models.quantization import keep_layout, loading_options
from raysft.storage.local_cache import local_copy
from raysft.storage.path import StoragePath


def load_model(config: Config, path: str, device: torch.device | None = None, adapter: str | None = None) -> Any:
    """The model to train, in its dtype, with adapters where the config asks for them.

    Its cache is off: with one, packed rows would silently see each other.

    Args:
        config: the run's config.
        path: folder, URI or hub id.
        device: where quantized weights go; others are moved by whoever asks.
        adapter: folder of an adapter to go on with.

    Raises:
        RequestError: weights of the model or the adapter are missing.
    """
    model = load_weights(
        local_copy(path),
        dtype=getattr(torch, "float32" if config.autocast else config.dtype),
        attn_implementation=kernel(config),
        trust_remote_code=config.model.runs_code,
        **loading_options(config, device or "cpu"),
    )
    model.config.use_cache = False
    model.name_or_path = path  # as an adapter's description names its base: not this node's copy
    use_examplewise(model, config)
    keep_layout(model)
    _keep_layers(model)
    if config.model.liger:
        _use_liger(model)
    if config.train.gradient_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    if config.model.finetuning == "full":
        return model
    if config.model.finetuning == "freeze":
        freeze(model, config)
        return model
    return _with_adapter(model, config, path, adapter)


def _keep_layers(model: nn.Module) -> None:
    """Some old models (OPT, XGLM) leave layers out at random, where their config says so: each worker others, so that they would
    wait for each other, or add up gradients of different weights. ``model.check_model`` says that it is not done."""
    for module in model.modules():
        if getattr(module, "layerdrop", 0):
            module.layerdrop = 0.0  # type: ignore[assignment]


def freeze(model: nn.Module, config: Config) -> None:
    """Leave only what ``model.freeze`` names to be trained.

    Raises:
        RequestError: the model has no such layers or modules.
    """
    wanted = config.model.freeze
    prefix, count = _layers(model)
    if abs(wanted.layers) > count:
        raise RequestError(f"model.freeze.layers={wanted.layers} and the model has {count} layers; use at most {count}")
    chosen = range(count - wanted.layers, count) if wanted.layers > 0 else range(-wanted.layers)
    layers = tuple(f"{prefix}.{index}." for index in chosen)
    inside: Sequence[str] | None = None if wanted.modules == "all" else wanted.modules
    names = [name for name, _ in model.named_parameters(remove_duplicate=False)]
    in_layers = {part for name in names if name.startswith(layers) for part in name.split(".")[:-1]}
    outside = {part for name in names if not name.startswith(f"{prefix}.") for part in name.split(".")[:-1]}
    _check_names("model.freeze.modules", inside or (), in_layers)
    _check_names("model.freeze.extra_modules", wanted.extra_modules, outside)
    model.requires_grad_(False)
    # A weight that is tied has several names; one that is wanted is enough.
    for name, parameter in model.named_parameters(remove_duplicate=False):
        parts = set(name.split("."))
        if name.startswith(f"{prefix}."):
            trained = name.startswith(layers) and (inside is None or bool(parts & set(inside)))
        else:
            trained = bool(parts & set(wanted.extra_modules))
        if trained:
            parameter.requires_grad_(True)


def _layers(model: nn.Module) -> tuple[str, int]:
    """Name and length of the list that holds a model's layers."""
    count = model.config.get_text_config().num_hidden_layers  # type: ignore[operator,union-attr]
    # Not those of a vision tower, which may be as many.
    inner: Any = model
    decoder = set(inner.get_decoder().modules()) if hasattr(inner, "get_decoder") else set(inner.modules())
    for name, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and len(module) == count and module in decoder:
            return name, count
    raise RequestError(
        f"model.finetuning=freeze: {type(model).__name__} has no list of {count} layers; use lora or full"
    )


def _check_names(key: str, wanted: Sequence[str], known: set[str]) -> None:
    for name in wanted:
        if name not in known:
            listed = ", ".join(sorted(each for each in known if not each.isdigit()))
            raise RequestError(f"{key} names {name!r} and the model has no such module there; it has {listed:.200}")


def check_names(model: nn.Module, config: Config) -> None:
    """Find out from a model without weights whether all modules that a config names are there.

    Raises:
        RequestError: one is not.
    """
    if config.model.finetuning == "freeze":
        freeze(model, config)
    section = {"lora": config.model.lora, "oft": config.model.oft}.get(config.model.finetuning)
    if section is None:
        return
    modules = {name for name, _ in model.named_modules()}
    _check_tied(model, config, section)
    _check_pissa(model, config)
    for key, wanted in (("target", section.target), ("extra_modules", section.extra_modules)):
        for name in () if wanted == "all" else wanted:
            if not any(module == name or module.endswith(f".{name}") for module in modules):
                raise RequestError(
                    f"model.{config.model.finetuning}.{key} names {name!r} and the model has no such module; "
                    + ("try 'all'" if key == "target" else "take it out")
                )
    _check_adapter(model, config, section)


def _check_tied(model: Any, config: Config, section: Any) -> None:
    """An adapter of an embedding that is the output head too could not be merged: the one changes, and the other with it."""
    if section.target == "all" or not model.config.get_text_config().tie_word_embeddings:
        return
    both = (model.get_input_embeddings(), model.get_output_embeddings())
    names = [name for name, module in model.named_modules() if any(module is each for each in both)]
    for target in section.target:
        if any(f".{name}".endswith(f".{target}") for name in names):
            raise RequestError(
                f"model.{config.model.finetuning}.target names {target!r}, which the model's embedding and output head share; "
                f"take it out, or train it whole with model.{config.model.finetuning}.extra_modules"
            )


def _check_pissa(model: nn.Module, config: Config) -> None:
    lora = config.model.lora
    if config.model.finetuning != "lora" or not lora.pissa:
        return
    layers = linear_layers(model)
    for name, module in model.named_modules():
        named = name in layers if lora.target == "all" else any(f".{name}".endswith(f".{each}") for each in lora.target)
        if named and isinstance(module, nn.Linear) and module is not model.get_output_embeddings():  # type: ignore[operator]
            smaller = min(module.in_features, module.out_features)
            if lora.rank > smaller:
                raise RequestError(
                    f"model.lora.rank={lora.rank} and {name} is {module.in_features} × {module.out_features}, which "
                    f"model.lora.pissa takes apart into at most {smaller}; use at most that"
                )


def _check_adapter(model: Any, config: Config, section: Any) -> None:
    """What peft refuses; it puts an adapter on this model, which has no weights, to find out."""
    from peft import get_peft_model

    kind, lora = config.model.finetuning, config.model.lora
    hf_config = _adapter_config(model, config, model.name_or_path)
    if kind == "lora":
        hf_config.use_dora, hf_config.lora_dropout, hf_config.init_lora_weights = False, 0.0, True
    try:
        get_peft_model(model, hf_config)
    except (ValueError, TypeError) as error:
        reason = " ".join(str(error).split())
        raise RequestError(
            f"model.{kind}.target={section.target} is refused by peft ({reason:.200}); name other modules"
        ) from None
    for key in ("dropout", "dora", "pissa") if getattr(hf_config, "target_parameters", None) else ():
        if getattr(lora, key):
            raise RequestError(
                f"model.lora.{key}={getattr(lora, key)} does not go with adapters on the experts of {type(model).__name__}; "
                "take it out, or name modules outside of the experts in model.lora.target, for example [q_proj, v_proj]"
            )


def _with_adapter(model: Any, config: Config, path: str, adapter: str | None) -> Any:
    from peft import get_peft_model

    torch.manual_seed(config.run.seed)
    if adapter is not None:
        model = load_adapter(model, local_copy(adapter), is_trainable=True)
        # Whatever it names as its base, this is what it is trained on, and what will be loaded with it.
        model.peft_config["default"].base_model_name_or_path = path
    else:
        model = get_peft_model(model, _adapter_config(model, config, path))
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    if adapter is None and config.model.finetuning == "lora" and config.model.lora.pissa:
        # What is learnt is the difference to this, which is an ordinary LoRA of the unchanged weights.
        model.begun_with = tempfile.mkdtemp(prefix="raysft-pissa-")
        model.save_pretrained(model.begun_with)
    return model


def _adapter_config(model: nn.Module, config: Config, path: str) -> Any:
    from peft import LoraConfig, OFTConfig

    section = config.model.lora if config.model.finetuning == "lora" else config.model.oft
    shared: dict[str, Any] = {
        "task_type": "CAUSAL_LM",
        "target_modules": "all-linear" if section.target == "all" else list(section.target),
        # By their whole names: peft takes every module whose name ends like it, input_layernorm for norm.
        "modules_to_save": [
            name
            for name, _ in model.named_modules()
            if f".{name}".endswith(tuple(f".{each}" for each in section.extra_modules))
        ]
        or None,
        "base_model_name_or_path": path,
    }
    lora, oft = config.model.lora, config.model.oft
    if config.model.finetuning == "oft":
        hf_config: Any = OFTConfig(r=0, oft_block_size=oft.block_size, module_dropout=oft.dropout, **shared)
    else:
        begin = "pissa" if not lora.pissa_iterations else f"pissa_niter_{lora.pissa_iterations}"
        hf_config = LoraConfig(
            r=lora.rank,
            lora_alpha=config.lora_alpha,  # type: ignore[arg-type]  # peft takes any number
            lora_dropout=lora.dropout,
            use_dora=lora.dora,
            use_rslora=lora.rslora,
            init_lora_weights=begin if lora.pissa else True,  # type: ignore[arg-type]
            **shared,
        )
    if section.target == "all":
        set_targets(hf_config, model)
    return hf_config


def _use_liger(model: Any) -> None:
    if importlib.util.find_spec("liger_kernel") is None:
        raise RequestError("model.liger=True needs the package liger-kernel; pip install 'raysft[liger]' on every node")
    from liger_kernel.transformers import (  # pyright: ignore[reportMissingImports]
        _apply_liger_kernel_to_instance,
    )

    # The loss is computed by TokenLoss, which makes logits for trained tokens alone.
    _apply_liger_kernel_to_instance(model=model, fused_linear_cross_entropy=False, cross_entropy=False)


def load_trained(config: Config, place: StoragePath | Path) -> Any:
    """A trained model or adapter with its base, to evaluate."""
    folder = Path(local_copy(StoragePath.of(place).location))

    options: dict[str, Any] = {
        "dtype": getattr(torch, config.dtype),
        "attn_implementation": kernel(config),
        "trust_remote_code": config.model.runs_code,
    }
    options |= loading_options(config, "cuda" if config.scaling.use_gpu else "cpu")
    model = load_with_base(folder, **options)
    keep_layout(model)  # as in the evaluations of the training
    use_examplewise(without_adapters(model), config)
    return model
