"""Read a model's config and check that raysft can train it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from raysft.config import Config
from raysft.errors import RequestError, one_line
from raysft.models.weight_files import check_weights
from raysft.storage import hub, hub_snapshots


def read_hf_config(
    config: Config, model: str, path: str, notify: Callable[[str], None], key: str = "model.path"
) -> Any:
    """Read a model's config and check its files.

    Args:
        config: names the models whose code may run.
        model: folder or Hub id.
        path: its name, for trust in its code and for messages.
        notify: receives a line if something is not used.
        key: the setting that names the model.

    Raises:
        RequestError: the model needs code that is not trusted, its config cannot be read, or weights are missing.
    """
    from transformers import AutoConfig

    from raysft.models.quantization import method_of
    from raysft.models.quantized_weights import check_described
    from raysft.models.remote_code import check_code

    named = f"{key}={hub_snapshots.shown(model)}"
    try:
        check_code(config, model, notify, path, key)
        hf_config = AutoConfig.from_pretrained(model, trust_remote_code=path in config.model.trust_remote_code)
    except RequestError:
        raise
    except Exception as error:
        fault = hub.reason_of(error)
        reason = fault or f"its config.json cannot be used ({one_line(error, 120)})"
        raise RequestError(f"{named}: {reason}") from None
    _check_causal(hf_config, named, path in config.model.trust_remote_code)
    if not hub_snapshots.is_snapshot(
        Path(model)
    ):  # weights on the Hub are fetched, and then checked, where they are loaded
        check_weights(Path(model), named)
        if method_of(hf_config) is None:
            check_described(Path(model))
    return hf_config


def _check_causal(hf_config: Any, named: str, trusted: bool) -> None:
    """Refuse models that do not generate text from left to right."""
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING

    if trusted and "AutoModelForCausalLM" in (getattr(hf_config, "auto_map", None) or {}):
        return
    kinds = {*MODEL_FOR_CAUSAL_LM_MAPPING, *MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING}
    if type(hf_config) not in kinds or hf_config.is_encoder_decoder:
        kind = "an encoder-decoder" if hf_config.is_encoder_decoder else "not a causal language model of transformers"
        raise RequestError(f"{named}: model_type={hf_config.model_type} is {kind}; use a model that continues text")
