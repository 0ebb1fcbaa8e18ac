"""Load all weights of a model, or say in one line what is wrong with its folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from raysft.errors import RequestError
from raysft.models.dynamic_rope import scale_each_example
from raysft.models.transformers_internals import keep_used_conversions
from raysft.models.weight_files import check_weights
from raysft.storage import hub, hub_snapshots


def load_weights(folder: str | Path, **options: Any) -> Any:
    """Load a language model, which may take images, with ``from_pretrained``, and check that no weight is missing.

    Raises:
        RequestError: weights are missing (transformers would draw them at random), misshapen, or cannot be downloaded.
    """
    from transformers import AutoConfig

    from raysft.models.model_class import auto_class
    from raysft.models.model_parts import keep_exact

    if hub_snapshots.is_snapshot(Path(folder)):
        check_weights(Path(folder), hub_snapshots.shown(str(folder)))
    try:
        of_config = {name: options[name] for name in ("trust_remote_code", "gguf_file") if name in options}
        hf_config = AutoConfig.from_pretrained(folder, **of_config)
        kind = auto_class(hf_config)
        if quantization := options.get("quantization_config"):
            keep_exact(quantization, hf_config, kind, options.get("trust_remote_code", False))
        loaded: Any = kind.from_pretrained(folder, output_loading_info=True, **options)
    except RuntimeError as error:
        if "ignore_mismatched_sizes" not in str(error):
            raise
        raise RequestError(
            f"{folder}: its weights have different shapes from those in its config.json; copy it again"
        ) from None
    except OSError as error:
        if fault := hub.reason_of(error):
            raise RequestError(f"{folder}: its weights cannot be loaded: {fault}") from None
        raise
    model, lacking = loaded[0], loaded[1]["missing_keys"]
    keep_used_conversions(model)
    scale_each_example(model)
    by_bitsandbytes = getattr(model, "is_loaded_in_4bit", False) or getattr(model, "is_loaded_in_8bit", False)
    # The names that other libraries give to their scales are unknown here.
    if lacking and (by_bitsandbytes or not getattr(model, "is_quantized", False)):
        raise RequestError(
            f"{folder}: is missing {len(lacking)} of the model's weights ({min(lacking)}); copy it again"
        )
    return model


def generation_config(*folders: Path) -> Any:
    """Return the generation config of the first folder that has one (``generation_config.json``), or None."""
    from transformers import GenerationConfig

    found = (folder for folder in folders if (folder / "generation_config.json").exists())
    return next((GenerationConfig.from_pretrained(folder, local_files_only=True) for folder in found), None)
