"""The model that generates: a whole one or an adapter on its base, and the tokens that end its turns."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, GenerationConfig

from raysft.config import Config, RequestError, locate
from raysft.copies import model_copy
from raysft.pretrained import adapter_description, load_adapter, load_tokenizer, load_weights, merge_adapter
from raysft.quantized import keep_layout, method_of, quantization_config
from raysft.storage import Place


def adapter_base(model: Path) -> Path | None:
    """Folder of the model that an adapter sits on; None where the folder is a whole model.

    Raises:
        RequestError: the folder or the adapter's base is not there.
    """
    if not model.is_dir():
        raise RequestError(f"{model} is no model folder; give a folder with a config.json or an adapter_config.json")
    description = model / "adapter_config.json"
    if not description.exists():
        if not (model / "config.json").exists():
            raise RequestError(f"{model} holds neither config.json nor adapter_config.json; give a model's folder")
        return None
    named = _named_base(model)
    base = model_copy(named) if named else None
    if base is None or not base.is_dir():
        raise RequestError(
            f"{description}: base_model_name_or_path={named!r} is no folder here; put the base model there or correct it"
        )
    return base


def _named_base(adapter: Path) -> str | None:
    """The model that an adapter's description names."""
    named = adapter_description(adapter).get("base_model_name_or_path")
    return str(named) if named else None


def tokenizer_folder(model: Path) -> Path:
    """Folder of the tokenizer that belongs to a model: its own, or that of its base where an adapter brings none."""
    base = adapter_base(model)
    own = any((model / name).exists() for name in ("tokenizer_config.json", "tokenizer.json"))
    return model if base is None or own else base


def tokenizer_of(config: Config, folder: Path) -> Any:
    """The tokenizer that belongs to a model, loaded."""
    return load_tokenizer(str(tokenizer_folder(folder)), runs_code(config, folder))


def code_name(config: Config, folder: Path) -> str:
    """The name that ``model.trust_remote_code`` holds where the code of a model may run.

    It is that of the model which is generated with. Of an adapter it is that of its base, for ``adapter_config.json`` may name
    any folder.
    """
    if adapter_base(folder) is None:
        return config.generate.model or config.model.path
    base = _named_base(folder) or ""
    there, trained = Place.of(base), Place.of(locate(config.model.path, "model.path"))
    # With adapters merged it lies in the cache.
    ours = there == trained or there.parent == config.cache_directory / "models"
    return config.model.path if ours else base


def runs_code(config: Config, folder: Path) -> bool:
    """Whether code that comes with a model may run."""
    return bool(config.model.trust_remote_code) and code_name(config, folder) in config.model.trust_remote_code


def load_model(config: Config, folder: Path, device: torch.device) -> Any:
    """The model on its device, or spread over the GPUs of this process where an engine has several."""
    base, dtype = adapter_base(folder), getattr(torch, config.dtype)
    trusted, quantization = runs_code(config, folder), quantization_config(config)
    method = method_of(AutoConfig.from_pretrained(base or folder, trust_remote_code=trusted))
    # "balanced" fills all GPUs alike: what is left of each is for the cache of its layers.
    spread = "balanced" if config.generate.gpus_per_engine > 1 else {"": device}
    model = load_weights(
        base or folder,
        dtype=dtype,
        # Weights in few bits are laid out for their device while they are loaded.
        device_map=spread if device.type == "cuda" or quantization or method else None,
        local_files_only=True,
        trust_remote_code=trusted,
        **({"quantization_config": quantization} if quantization else {}),  # None would hide that of the checkpoint
    )
    if dtype == torch.float32:
        keep_layout(model)
    # Merged, each layer is one product in place of three. In bfloat16 the sum would round small updates away, and so the
    # adapter stays beside the weights there, and beside those in few bits.
    merges = dtype == torch.float32 and not getattr(model, "is_quantized", False)
    if base is not None:
        model = load_adapter(model, folder)
        merges = merges and not model.active_peft_config.is_prompt_learning
        model = merge_adapter(model) if merges else model
    # What the file says of sampling must not mix with the config's; its stop tokens are kept.
    inner = model if base is None or merges else model.get_base_model()
    inner.generation_config = GenerationConfig(eos_token_id=inner.generation_config.eos_token_id)
    return model


def stop_tokens(
    tokenizer: Any, generation: GenerationConfig, more: Sequence[str], ends: Sequence[int] = ()
) -> list[int]:
    """Tokens that end a turn.

    Args:
        tokenizer: its eos is one.
        generation: the model's generation config, which names others.
        more: tokens that the config names.
        ends: those that end the turns of the data.
    """
    named: Any = generation.eos_token_id
    named = list(named) if isinstance(named, list | tuple) else [named]
    named += [tokenizer.eos_token_id, *named_tokens(tokenizer, more), *ends]
    return sorted({int(token) for token in named if token is not None})


def named_tokens(tokenizer: Any, names: Sequence[str]) -> list[int]:
    """The numbers of tokens.

    Raises:
        RequestError: the tokenizer has no such token.
    """
    known = tokenizer.get_vocab()
    for name in names:
        if name not in known:
            near = difflib.get_close_matches(name, [str(token) for token in tokenizer.all_special_tokens], n=1)
            remedy = f"did you mean {near[0]!r}?" if near else "name one as the tokenizer writes it"
            raise RequestError(f"generate.stop_tokens: the tokenizer has no token {name!r}; {remedy}")
    return [known[name] for name in names]


def padding_token(tokenizer: Any, stops: Sequence[int], description: Any) -> int:
    """A token to fill rows with that are shorter than others, or in place of a prompt of none."""
    # A token that the tokenizer was given and the model was not cannot be looked up, not even to be masked.
    known = description.get_text_config().vocab_size
    usable = (token for token in (tokenizer.pad_token_id, *stops) if token is not None and token < known)
    return next(usable, 0)
