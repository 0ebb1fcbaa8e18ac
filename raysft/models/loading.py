"""What lies in the folder of a model or an adapter: loaded whole, or one line that says what is wrong."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from raysft.errors import RequestError
from raysft.storage import hub


def load_weights(folder: str | Path, **options: Any) -> Any:
    """A causal language model as ``from_pretrained`` loads it, with all of its weights.

    Raises:
        RequestError: the folder lacks some, which transformers would draw at random, or has others; or the hub does not give them.
    """
    from transformers import AutoModelForCausalLM

    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True, **options)
    except RuntimeError as error:
        if "ignore_mismatched_sizes" not in str(error):
            raise
        raise RequestError(
            f"{folder}: its weights have other shapes than its config.json says; copy it again"
        ) from None
    except OSError as error:
        if fault := hub.reason_of(error):
            raise RequestError(f"{folder}: its weights cannot be loaded: {fault}") from None
        raise
    model, lacking = loaded[0], loaded[1]["missing_keys"]
    by_bitsandbytes = getattr(model, "is_loaded_in_4bit", False) or getattr(model, "is_loaded_in_8bit", False)
    # What other libraries call their scales is not known here.
    if lacking and (by_bitsandbytes or not getattr(model, "is_quantized", False)):
        raise RequestError(f"{folder}: lacks {len(lacking)} of the model's weights ({min(lacking)}); copy it again")
    return model


def generation_config(*folders: Path) -> Any:
    """What the first of some folders says of generation that says anything (``generation_config.json``); None where none does."""
    from transformers import GenerationConfig

    found = (folder for folder in folders if (folder / "generation_config.json").exists())
    return next((GenerationConfig.from_pretrained(folder, local_files_only=True) for folder in found), None)
