"""Load the model that generates, with its stop and padding tokens."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, GenerationConfig

from raysft.config import Config
from raysft.errors import RequestError
from raysft.models.adapter_embeddings import fit_embeddings
from raysft.models.adapter_files import adapter_base
from raysft.models.adapters import load_adapter, merge_adapter, unmergeable
from raysft.models.loading import load_weights
from raysft.models.quantization import keep_layout, method_of, quantization_config
from raysft.models.remote_code import runs_code


def load_model(config: Config, folder: Path, device: torch.device) -> Any:
    """Load the model onto its device, or spread it over the GPUs of this process if the engine has several."""
    base, dtype = adapter_base(folder), getattr(torch, config.dtype)
    trusted, quantization = runs_code(config, folder), quantization_config(config)
    method = method_of(AutoConfig.from_pretrained(base or folder, trust_remote_code=trusted))
    # "balanced" fills all GPUs equally; the rest of each holds the cache of its layers.
    spread = "balanced" if config.generate.gpus_per_engine > 1 else {"": device}
    model = load_weights(
        base or folder,
        dtype=dtype,
        # Quantized weights get the layout of their device while they are loaded.
        device_map=spread if device.type == "cuda" or quantization or method else None,
        local_files_only=True,
        trust_remote_code=trusted,
        **({"quantization_config": quantization} if quantization else {}),  # None would hide the checkpoint's own
    )
    if dtype == torch.float32:
        keep_layout(model)
    # A merged layer computes one product instead of three. In bfloat16 the sum would round small updates away, so the adapter
    # stays separate there, as it does beside quantized weights.
    merges = dtype == torch.float32 and not getattr(model, "is_quantized", False)
    if base is not None:
        fit_embeddings(model, folder)
        model = load_adapter(model, folder)
        merges = merges and unmergeable(model) is None
        model = merge_adapter(model) if merges else model
    # Keep the stop tokens of the file, but not its sampling settings, which would mix with the config's.
    inner = model if base is None or merges else model.get_base_model()
    inner.generation_config = GenerationConfig(eos_token_id=inner.generation_config.eos_token_id)
    return model


def stop_tokens(
    tokenizer: Any, generation: GenerationConfig, more: Sequence[str], ends: Sequence[int] = ()
) -> list[int]:
    """Collect the tokens that end a turn.

    Args:
        tokenizer: its EOS token is one of them.
        generation: the model's generation config, which may name others.
        more: tokens that the config names.
        ends: end-of-turn tokens of the data.
    """
    named: Any = generation.eos_token_id
    named = list(named) if isinstance(named, list | tuple) else [named]
    named += [tokenizer.eos_token_id, *named_tokens(tokenizer, more), *ends]
    return sorted({int(token) for token in named if token is not None})


def named_tokens(tokenizer: Any, names: Sequence[str]) -> list[int]:
    """Look up the IDs of tokens.

    Raises:
        RequestError: the tokenizer has no such token.
    """
    known = tokenizer.get_vocab()
    for name in names:
        if name not in known:
            near = difflib.get_close_matches(name, [str(token) for token in tokenizer.all_special_tokens], n=1)
            remedy = f"did you mean {near[0]!r}?" if near else "use the tokenizer's spelling"
            raise RequestError(f"generate.stop_tokens: the tokenizer has no token {name!r}; {remedy}")
    return [known[name] for name in names]


def padding_token(tokenizer: Any, stops: Sequence[int], description: Any) -> int:
    """Choose the token that pads shorter rows and replaces an empty prompt."""
    # A token that the tokenizer has but the model has no embedding for cannot be used, not even masked.
    known = description.get_text_config().vocab_size
    usable = (token for token in (tokenizer.pad_token_id, *stops) if token is not None and token < known)
    return next(usable, 0)
