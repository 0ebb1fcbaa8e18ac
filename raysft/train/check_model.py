"""Checks of a model against the config before any worker loads it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from raysft.config import Config
from raysft.errors import RequestError
from raysft.models.architecture import read_hf_config
from raysft.models.model_class import auto_class, loaded_config
from raysft.models.model_parts import loose_weights
from raysft.models.quantization import check_method, is_in_8_bits, method_of, quantization_config
from raysft.models.recomputation import recompute_layers
from raysft.models.rope_scaling import is_rotary, positions_of, scaled_config
from raysft.models.routers import READABLE, routers, watchable_routers
from raysft.storage import hub_snapshots
from raysft.storage.local_cache import local_copy


def check_model(config: Config, model: str, notify: Callable[[str], None] = lambda line: None) -> Any:
    """Find the problems that the workers would find only after they started.

    Args:
        config: the run's config.
        model: folder or Hub id.
        notify: receives a line about a setting of the model that is ignored, and about weights that stay frozen.

    Returns:
        The model's configuration.

    Raises:
        RequestError: the model needs code that ``model.trust_remote_code`` does not allow, has no weights, has no modules for the
            adapters, or has a position table shorter than a row.
    """
    from raysft.models.attention import kernel
    from raysft.models.new_layers import expanded_config
    from raysft.train.deepspeed_config import deepspeed_settings
    from raysft.train.finetuning import check_names
    from raysft.train.optim import check_options

    model = local_copy(model)
    hf_config = loaded_config(read_hf_config(config, model, config.model.path, notify))
    text = hf_config.get_text_config()
    scaled = scaled_config(config, hf_config, notify)
    check_positions(config, scaled.get_text_config())
    check_shared_rows(config, scaled)
    if layerdrop := getattr(text, "layerdrop", 0):
        notify(f"model: ignoring layerdrop={layerdrop} of its config.json; every step trains all layers")
    _check_quantized(hub_snapshots.shown(model), hf_config, config)
    if config.model.experts == "kt":
        _check_experts(hub_snapshots.shown(model), hf_config)
    check_options(config.train)
    quantization_config(config)
    kernel(config, hf_config)
    deepspeed_settings(config, config.scaling.most_workers)
    expanded = expanded_config(config, hf_config)
    if _names_modules(config) or config.train.router_aux_loss_coef:
        import torch

        with torch.device("meta"):
            whole = auto_class(expanded).from_config(expanded, trust_remote_code=config.model.runs_code)
            if config.model.adapter is not None and "projector" in config.model.train_parts:
                _tell_frozen(whole, config, notify)
            _check_routers(whole, config)
            check_names(whole, config)
            if config.train.gradient_checkpointing:
                recompute_layers(whole, config.train.recompute_layers, config.train.offload.activations == "cpu")
    return hf_config


def _check_routers(model: Any, config: Config) -> None:
    """Refuse a loss of routers for a model that has none, or whose routers return too little."""
    if not config.train.router_aux_loss_coef:
        return
    kind, key = (
        model.config.get_text_config().model_type,
        f"train.router_aux_loss_coef={config.train.router_aux_loss_coef:g}",
    )
    if not routers(model):
        raise RequestError(f"{key} is for routers of experts, but {type(model).__name__} has none; remove it")
    if kind not in READABLE or not watchable_routers(model):
        raise RequestError(
            f"{key} supports the routers of {', '.join(READABLE)}, but {type(model).__name__} has model_type={kind}; remove it"
        )


def _tell_frozen(model: Any, config: Config, notify: Callable[[str], None]) -> None:
    """Name the projector weights that no peft module can hold."""
    if frozen := loose_weights(model, "projector"):
        notify(
            f"model.train_parts names projector, but {', '.join(frozen):.200} stays frozen: adapters train whole modules, and "
            "it is not part of any of the projector's; to train it, set model.finetuning to full or freeze, not "
            f"{config.model.finetuning}"
        )


def check_positions(config: Config, hf_config: Any) -> None:
    """Refuse a model whose position table is shorter than a row.

    A model that computes its positions takes any; ``run.warnings`` reports examples longer than it was trained on.

    Raises:
        RequestError: it is.
    """
    positions = positions_of(hf_config)
    if positions and config.data.sequence_length > positions and not is_rotary(hf_config):
        raise RequestError(
            f"data.sequence_length={config.data.sequence_length}, but the model has {positions} positions; use at most {positions}"
        )


def check_shared_rows(config: Config, hf_config: Any) -> None:
    """Refuse a model whose rows several workers cannot compute together; the workers check the rest.

    Raises:
        RequestError: they cannot, and ``scaling.sequence_parallel`` asks for that.
    """
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING

    from raysft.models.dynamic_rope import BY_LENGTH
    from raysft.models.transformers_internals import is_recurrent, supports_registered_attention

    size, text = config.scaling.sequence_parallel, hf_config.get_text_config()
    if size == 1:
        return
    heads, named = getattr(text, "num_attention_heads", None), f"scaling.sequence_parallel={size}"
    if isinstance(heads, int) and heads % size:
        divisors = ", ".join(str(each) for each in range(2, heads + 1) if heads % each == 0)
        raise RequestError(
            f"{named} must divide the number of the model's query heads, which is {heads}; use one of {divisors}, or 1"
            if heads > 1
            else f"{named} must divide the number of the model's query heads, which is 1; use scaling.sequence_parallel=1"
        )
    kinds = set(getattr(text, "layer_types", None) or ()) - {"full_attention", "sliding_attention"}
    made: Any = MODEL_FOR_CAUSAL_LM_MAPPING.get(type(text), None)
    more = f"layers of type {', '.join(sorted(kinds))}" if kinds else ""
    if made is not None and not more:
        recurrent, own = is_recurrent(made), not supports_registered_attention(made)
        more = "a recurrent state" if recurrent else "its own attention, as for sinks or ALiBi" if own else ""
    if more:
        raise RequestError(
            f"{named} supports only plain attention, but the model ({text.model_type}) has {more}; use "
            "scaling.sequence_parallel=1, or another model"
        )
    scaling = getattr(text, "rope_parameters", None) or {}
    types = {each.get("rope_type") for each in (scaling, *scaling.values()) if isinstance(each, dict)}
    # ``dynamic_rope`` scales by whole examples, but Phi-3.5-MoE itself reads the longest position for its mscale.
    if scaling.get("rope_type") in BY_LENGTH and "long_mscale" not in scaling:
        types.clear()
    if by_length := types & set(BY_LENGTH):
        raise RequestError(
            f"{named} computes slices of rows, but the model's {by_length.pop()} positions depend on the length of whole rows; "
            "use scaling.sequence_parallel=1, or another RoPE scaling"
        )


def _names_modules(config: Config) -> bool:
    model = config.model
    section = model.adapter
    special = section is not None and (section.target != "all" or section.extra_modules or section.dropout)
    return (
        model.finetuning == "freeze"
        or model.train_parts != ["language"]
        or bool(special or (section and model.new_tokens.tokens))
        or model.lora.pissa
        or model.lora.dora
        or config.train.recompute_layers is not None
        or config.train.offload.activations != "none"
    )


def _check_experts(model: str, hf_config: Any) -> None:
    """Refuse a model whose experts KTransformers' kernel cannot compute; whether the workers' CPUs can is checked there."""
    from raysft.models.kt_experts import check_architecture
    from raysft.models.kt_internals import check_kernel

    check_architecture(hf_config)
    check_kernel(on_this_machine=False)
    if method := method_of(hf_config):
        raise RequestError(
            f"model.experts=kt computes with bfloat16 weights, but model.path={model} is quantized ({method}); use the model "
            "that it was quantized from, or set model.experts=auto"
        )


def _check_quantized(model: str, hf_config: Any, config: Config) -> None:
    """Refuse a quantized model that would be trained in full, or whose method has no library installed."""
    method = method_of(hf_config)
    if method is None:
        return
    if config.model.adapter is None:
        raise RequestError(
            f"model.path={model} is quantized ({method}), which freezes its weights, but model.finetuning="
            f"{config.model.finetuning}; set model.finetuning to lora or oft"
        )
    check_method(f"model.path={model}", method, config)
    if config.train.zero_stage == 3 and is_in_8_bits(hf_config):
        raise RequestError(
            f"model.path={model} is quantized to 8 bits, for which bitsandbytes keeps whole weights on each worker, but "
            "train.zero_stage=3 partitions them; set train.zero_stage=2, or use a 4-bit model"
        )
