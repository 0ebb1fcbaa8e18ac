"""The model to train: loaded in its dtype, with layers frozen or adapters added as the config asks."""

from __future__ import annotations

import importlib.util
import tempfile
from collections.abc import Collection
from pathlib import Path
from typing import Any, get_args

import torch
from torch import nn
from transformers import AutoConfig

from raysft.config import Config
from raysft.config.model import Part
from raysft.errors import RequestError, as_yaml, one_line
from raysft.models.adapter_files import adapter_base, base_name
from raysft.models.adapters import load_adapter, load_with_base
from raysft.models.attention import check_kernel, kernel, use_examplewise, without_adapters
from raysft.models.kt_experts import check_frozen, recomputation_contexts
from raysft.models.loading import load_weights
from raysft.models.lora_targets import EXPERTS, linear_layers, modules_in, targeted, targeted_routers
from raysft.models.model_class import loaded_config, sees_images
from raysft.models.model_parts import part_of
from raysft.models.new_tokens import vocabulary_modules
from raysft.models.quantization import keep_layout, loading_options, method_of
from raysft.models.recomputation import recompute_layers
from raysft.models.remote_code import reference_runs_code
from raysft.models.sequence_attention import use_sequence
from raysft.storage.local_cache import local_copy, model_copy
from raysft.storage.path import StoragePath
from raysft.train.new_adapter import add_adapter, peft_config
from raysft.train.trained_weights import choose_weights


def load_model(config: Config, path: str, device: torch.device | None = None, adapter: str | None = None) -> Any:
    """Load the model to train, with adapters if the config asks for them.

    Its cache is disabled: with a cache, the examples of a packed row would silently attend to each other.

    Args:
        config: the run's config.
        path: folder, URI or Hub id.
        device: where quantized weights go; the caller moves other weights.
        adapter: folder of an adapter to continue training.

    Raises:
        RequestError: weights of the model or the adapter are missing.
    """
    folder = model_copy(path)
    model = _prepared(load_weights(folder, **_options(config, folder, device, config.model.runs_code)), config)
    choose_weights(model, config)
    model.name_or_path = base_name(path)[0]  # adapters name this as their base, not this node's copy
    if config.model.adapter is not None:
        model = _with_adapter(model, config, path, adapter)
    if config.train.gradient_checkpointing:
        train, contexts = config.train, recomputation_contexts if config.model.experts == "kt" else None
        recompute_layers(model, train.recompute_layers, train.offload.activations == "cpu", contexts)
    return model


def load_frozen(config: Config, path: str, device: torch.device | None = None) -> Any:
    """Load a model that is not trained, or an adapter with its base, to compute alongside the trained one, in the same way.

    Args:
        config: the run's config.
        path: folder, URI or Hub id.
        device: where quantized weights go; the caller moves other weights.

    Raises:
        RequestError: weights of the model or the adapter are missing.
    """
    folder = model_copy(path)
    named = config.train.reference_model
    trusted = reference_runs_code(config, folder) if named is not None else config.model.runs_code
    model = load_with_base(folder, **_options(config, folder, device, trusted))
    _prepared(without_adapters(model), config)
    return model.requires_grad_(False).eval()


def _options(
    config: Config, folder: Path, device: torch.device | str | None, runs_code: bool, trains: bool = True
) -> dict[str, Any]:
    """Return how transformers loads a model or an adapter's base.

    Args:
        config: the run's config.
        folder: of the model or the adapter.
        device: where quantized weights go. Default: CPU.
        runs_code: True if code that comes with it may run.
        trains: False if it computes only in evaluations, where ZeRO-3 does not partition quantized weights.
    """
    device = device or "cpu"
    check_kernel(config, torch.device(device))
    hf_config = AutoConfig.from_pretrained(adapter_base(folder) or folder, trust_remote_code=runs_code)
    options = {
        "dtype": getattr(torch, config.weight_dtype),
        "attn_implementation": kernel(config, loaded_config(hf_config)),
        "trust_remote_code": runs_code,
        **loading_options(config, device, partitioned=trains and config.train.zero_stage == 3),
    }
    if not trains and method_of(hf_config):
        options["device_map"] = {"": device}  # quantized weights get the layout of their device while they are loaded
    return options


def _use_attention(model: Any, config: Config) -> None:
    """Make a model compute attention as the config asks, beyond the kernel that it was loaded with."""
    if config.scaling.sequence_parallel > 1:
        use_sequence(model, config)
    else:
        use_examplewise(model, config)


def _prepared(model: Any, config: Config) -> Any:
    """Make a transformers model compute on packed rows, the same way in each forward pass."""
    model.config.use_cache = False
    _use_attention(model, config)
    keep_layout(model)
    _disable_layerdrop(model)
    if config.model.liger:
        _use_liger(model)
    return model


def _disable_layerdrop(model: nn.Module) -> None:
    """Set LayerDrop to 0; some old models (OPT, XGLM) set it in their config.

    Each worker would skip different layers, so they would wait for each other, or sum gradients of different weights.
    ``check_model`` notifies the user.
    """
    for module in model.modules():
        if getattr(module, "layerdrop", 0):
            module.layerdrop = 0.0  # type: ignore[assignment]


def check_names(model: nn.Module, config: Config) -> None:
    """Check that a model, which may have no weights, has all modules that the config names.

    Raises:
        RequestError: a module is missing, or cannot have an adapter.
    """
    choose_weights(model, config)
    section = config.model.adapter
    if section is None:
        return
    modules = set(modules_in(model, config.model.train_parts))
    _check_vocabulary(model, config, section)
    _check_tied(model, config, section)
    _check_pissa(model, config)
    for key, names in (("target", section.target), ("extra_modules", section.extra_modules)):
        for name in () if names == "all" else names:
            if not any(module == name or module.endswith(f".{name}") for module in modules):
                raise RequestError(
                    f"model.{config.model.finetuning}.{key} names {name!r}, but the model has no such module"
                    + (f" in {as_yaml(config.model.train_parts)} (model.train_parts); " if sees_images(model) else "; ")
                    + (f"use names of its modules{_experts(modules)}, or all" if key == "target" else "remove it")
                )
    _check_adapter(model, config, section)
    if config.model.experts == "kt":
        check_frozen(model)


def _experts(modules: Collection[str]) -> str:
    """What to name instead of single experts and their matrices, which are not modules in most models."""
    return " (experts for all expert weights)" if any(name.endswith(f".{EXPERTS}") for name in modules) else ""


def _check_vocabulary(model: Any, config: Config, section: Any) -> None:
    """Refuse an adapter on the embedding or the output head if they are trained in full for new tokens."""
    for name in vocabulary_modules(model, config):
        for target in () if section.target == "all" else section.target:
            if f".{name}".endswith(f".{target}"):
                raise RequestError(
                    f"model.{config.model.finetuning}.target names {target!r}, but model.new_tokens trains it in full; remove "
                    "it from the target"
                )


def _check_tied(model: Any, config: Config, section: Any) -> None:
    """Refuse an adapter on an embedding that is also the output head: merging it would change both."""
    if section.target == "all" or not model.config.get_text_config().tie_word_embeddings:
        return
    tied = (model.get_input_embeddings(), model.get_output_embeddings())
    names = [name for name, module in model.named_modules() if any(module is shared for shared in tied)]
    for target in section.target:
        if any(f".{name}".endswith(f".{target}") for name in names):
            raise RequestError(
                f"model.{config.model.finetuning}.target names {target!r}, which the model's embedding and output head share; "
                f"remove it, or train it in full with model.{config.model.finetuning}.extra_modules"
            )


def _check_pissa(model: nn.Module, config: Config) -> None:
    lora = config.model.lora
    if config.model.finetuning != "lora" or not lora.pissa:
        return
    parts = config.model.train_parts
    names = linear_layers(model, parts) if lora.target == "all" else targeted(model, lora.target, parts)
    ends = tuple(f".{each}" for each in names)
    for name, module in model.named_modules():
        if f".{name}".endswith(ends) and isinstance(module, nn.Linear) and module is not model.get_output_embeddings():  # type: ignore[operator]
            smaller = min(module.in_features, module.out_features)
            if lora.rank > smaller:
                raise RequestError(
                    f"model.lora.pissa decomposes {name} ({module.in_features} × {module.out_features}) into at most "
                    f"{smaller} ranks, but model.lora.rank={lora.rank}; use at most {smaller}"
                )


def _check_adapter(model: Any, config: Config, section: Any) -> None:
    """Refuse what peft refuses, by adding the adapter to this weightless model."""
    kind, lora = config.model.finetuning, config.model.lora
    adapter_config = peft_config(model, config, model.name_or_path)
    if kind == "lora":
        # These compute with the weights, which are missing here.
        adapter_config.use_dora, adapter_config.lora_dropout, adapter_config.init_lora_weights = False, 0.0, True
    named = targeted_routers(adapter_config, model) if kind == "lora" else []
    try:
        add_adapter(model, adapter_config)
    except (ValueError, TypeError) as error:
        key = "extra_modules" if section.extra_modules and "modules_to_save" in str(error) else "target"
        raise RequestError(
            f"model.{kind}.{key}={as_yaml(getattr(section, key))} is rejected by peft ({one_line(error)}); name other modules"
        ) from None
    parameters = getattr(adapter_config, "target_parameters", None) or ()
    for key in ("dropout", "dora", "pissa") if parameters else ():
        if getattr(lora, key):
            what = ["the experts"] if len(parameters) > len(named) else []
            what += [f"the router ({each})" for each in named[:1]]
            what += [f"{len(named) - 1} more"] if len(named) > 1 else []
            raise RequestError(
                f"model.lora.{key}={as_yaml(getattr(lora, key))} does not work with adapters on {' and '.join(what)} of "
                f"{type(model).__name__}; "
                "remove it, or name other modules in model.lora.target, for example [q_proj, v_proj]"
            )


def _with_adapter(model: Any, config: Config, path: str, adapter: str | None) -> Any:
    torch.manual_seed(config.run.seed)
    if adapter is not None:
        model = load_adapter(model, model_copy(adapter), is_trainable=True)
        _check_parts(model, config, adapter)
        # This is the base that it is trained on and must be loaded with, even if it names another.
        adapter_config = model.peft_config["default"]
        adapter_config.base_model_name_or_path, adapter_config.revision = base_name(path)
    else:
        model = add_adapter(model, peft_config(model, config, path))
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.to(torch.bfloat16 if config.train.pure_bf16 else torch.float32)
    if adapter is None and config.model.finetuning == "lora" and config.model.lora.pissa:
        # The export is the difference from this start: an ordinary LoRA of the unchanged weights.
        model.pissa_start = tempfile.mkdtemp(prefix="raysft-pissa-")
        model.save_pretrained(model.pissa_start)
    return model


def _check_parts(model: Any, config: Config, adapter: str) -> None:
    """Refuse an adapter that trains parts other than the config says: an existing adapter keeps its form."""
    base = model.get_base_model()
    part = part_of(base)
    trains = {part(name) for name, weight in base.named_parameters() if weight.requires_grad}
    wanted = config.model.train_parts
    if trains != set(wanted):
        there = as_yaml([each for each in get_args(Part) if each in trains])
        raise RequestError(
            f"model.adapters: {adapter} trains {there}, which cannot change, but model.train_parts={as_yaml(wanted)}; set "
            f"model.train_parts={there}, or model.new_adapter=true"
        )


def _use_liger(model: Any) -> None:
    if importlib.util.find_spec("liger_kernel") is None:
        raise RequestError(
            "model.liger=true needs the package liger-kernel, which is not installed; "
            "run pip install 'raysft[liger]' on every node"
        )
    from liger_kernel.transformers import (  # pyright: ignore[reportMissingImports]
        _apply_liger_kernel_to_instance,
    )

    # TokenLoss computes the loss: it makes logits only for loss tokens.
    _apply_liger_kernel_to_instance(model=model, fused_linear_cross_entropy=False, cross_entropy=False)


def load_trained(config: Config, location: StoragePath | Path, runs_code: bool | None = None) -> Any:
    """Load a model, or an adapter with its base, for evaluation, as evaluations during training have it.

    Args:
        config: the run's config.
        location: of the model or the adapter.
        runs_code: True if code that comes with it may run. Default: as for ``model.path``.
    """
    folder = Path(local_copy(StoragePath.of(location).location))
    trusted = config.model.runs_code if runs_code is None else runs_code
    device = "cuda" if config.scaling.use_gpu else "cpu"
    model = load_with_base(folder, **_options(config, folder, device, trusted, trains=False))
    base = without_adapters(model)
    keep_layout(model)
    _use_attention(base, config)
    if config.model.liger:
        _use_liger(base)
    return model
