"""A model with adapters merged into it, written as one model in any data type; or a whole model, copied."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from raysft.errors import RequestError
from raysft.models.adapter_embeddings import fit_embeddings
from raysft.models.adapter_files import adapter_base, read_adapter_config
from raysft.models.adapters import load_adapter, merge_adapter, mergeable
from raysft.models.end_of_turn import learned_ends, write_ends
from raysft.models.loading import load_weights
from raysft.models.processor_files import copy_processor, save_tokenizer
from raysft.models.quantization import method_of
from raysft.models.remote_code import check_code_of
from raysft.models.tokenizer import load_tokenizer
from raysft.models.weight_files import check_weights, holds_embeddings, safetensors_files
from raysft.models.weight_types import (
    SHARD_SIZE,
    convert_parameters,
    converted,
    own_dtype,
    rewrite,
    stays_float32,
    stored_dtype,
)
from raysft.storage.run_directory import MODEL_MARKS

UNMERGED = "keep it unmerged (--no-merge)"


def merge(
    model: Path,
    output: Path,
    runs_code: bool = False,
    dtype: str | None = None,
    shard_size: str | None = None,
    adapters: Sequence[Path] = (),
    base: Path | None = None,
) -> None:
    """Write one whole model: an adapter merged into its base, then further adapters; without adapters a copy.

    What adapters change is computed in float32, from the weights in the base's files, and rounded once, after the last adapter.

    Args:
        model: folder of a whole model, or of an adapter, whose base is found by its configuration.
        output: an existing or new folder.
        runs_code: True if code that comes with the base or an adapter may run.
        dtype: data type of the weights. Default: that of the whole model.
        shard_size: largest size of a file of weights. Default: ``SHARD_SIZE``; a model that is copied keeps its files.
        adapters: folders of adapters to merge, in order.
        base: folder of an adapter's base. Default: found by the adapter's configuration.

    Raises:
        RequestError: a folder does not hold what it should, the adapters cannot be merged, or the data type cannot hold the
            weights.
    """
    if not any((model / mark).exists() for mark in MODEL_MARKS):
        raise RequestError(f"{model}: contains no trained model; train first (raysft train CONFIG)")
    output.mkdir(parents=True, exist_ok=True)
    for folder in (model, *adapters):
        check_weights(folder, str(folder))
        _check_generation(folder)
    if (model / "adapter_config.json").exists():
        base, adapters = base or adapter_base(model) or model, [model, *adapters]
    else:
        base = model
    _check_generation(base)
    if not adapters and safetensors_files(base, str(base)):
        _check_exact(base, dtype)
        as_it_is = dtype == stored_dtype(base) == own_dtype(base)
        rewrite(base, output, None if as_it_is else dtype, shard_size)
        return
    for folder in () if runs_code else (base, *adapters):
        check_code_of(folder, "add --trust-remote-code")
    dtype = dtype or own_dtype(base)
    tokenizer, described = _tokenizer(adapters, base, runs_code)
    whole, tokens = _load_exact(base, adapters, runs_code), 0
    for adapter in adapters:
        if rows := fit_embeddings(whole, adapter, least=tokens):
            tokens = rows
            _widen(whole.get_input_embeddings(), whole.get_output_embeddings())
        each_layer = _rounding(whole, dtype) if adapter is adapters[-1] else lambda layer: None
        whole = merge_adapter(mergeable(load_adapter(whole, adapter), adapter, UNMERGED), each_layer)
    convert_parameters(whole, dtype)
    whole.config.use_cache = True
    whole.save_pretrained(output, max_shard_size=shard_size or SHARD_SIZE)
    save_tokenizer(tokenizer, output)
    copy_processor(base, output)
    write_ends(output, learned_ends(described, tokenizer))


def _check_generation(folder: Path) -> None:
    """Refuse a damaged generation config, which names where turns end."""
    path = folder / "generation_config.json"
    try:
        whole = not path.exists() or isinstance(json.loads(path.read_text(encoding="utf-8")), dict)
    except ValueError:
        whole = False
    if not whole:
        raise RequestError(
            f"{path}: is not a mapping in JSON, so the model could not be loaded; copy it again, or remove it"
        )


def _check_exact(model: Path, dtype: str | None) -> None:
    """Refuse to change the data type of a quantized model."""
    if dtype and (method := _method(model)):
        raise RequestError(
            f"--dtype {dtype}: {model} is quantized ({method}), so its weights cannot be converted to this type; remove it"
        )


def _method(model: Path) -> str | None:
    from transformers import PreTrainedConfig

    return method_of(PreTrainedConfig.get_config_dict(model)[0])


def _load_exact(base: Path, adapters: Sequence[Path], runs_code: bool) -> Any:
    """Load a model to merge into, in the data type of its files."""
    import torch

    if method := _method(base):
        raise RequestError(
            f"{base}: is quantized ({method}), so no adapter can be merged into it; keep the adapter unmerged (--no-merge), or "
            "merge it into the model that was quantized"
        )
    model = load_weights(base, dtype=getattr(torch, stored_dtype(base) or "float32"), trust_remote_code=runs_code)
    wide = {name for adapter in adapters for name in _trained_whole(adapter)}
    for name, module in model.named_modules():
        if any(f".{name}".endswith(f".{each}") for each in wide):
            _widen(module)
    return model


def _widen(*modules: Any) -> None:
    """Convert modules to float32; otherwise what an adapter holds of them would be rounded to the model's type."""
    for module in modules:
        if module is not None:
            module.float()


def _trained_whole(adapter: Path) -> Iterator[str]:
    description = read_adapter_config(adapter)
    yield from description.get("modules_to_save") or ()
    tokens = description.get("trainable_token_indices")
    yield from tokens if isinstance(tokens, dict) else ["embed_tokens"] if tokens else ()


def _rounding(model: Any, dtype: str) -> Callable[[Any], None]:
    """Return what rounds a merged layer, so that not all layers are in float32 at once."""
    stays = stays_float32(model, dtype)
    kept = {id(parameter) for name, parameter in model.named_parameters() if stays(name)}
    names = {id(parameter): name for name, parameter in model.named_parameters()}

    def rounded(layer: Any) -> None:
        for name, parameter in layer.named_parameters():
            if id(parameter) not in kept:
                parameter.data = converted(names.get(id(parameter), name), parameter.data, dtype)

    return rounded


def _tokenizer(adapters: Sequence[Path], base: Path, runs_code: bool) -> tuple[Any, Path]:
    """Return the tokenizer of the merged model with its folder: that of the adapter with most tokens, the last of several.

    Raises:
        RequestError: an adapter with embeddings knows a token by another id.
    """
    loaded = {each: load_tokenizer(str(each), runs_code) for each in adapters if _has_tokenizer(each)}
    if not loaded:
        return load_tokenizer(str(base), runs_code), base
    chosen = max(reversed(loaded), key=lambda each: len(loaded[each]))
    known = loaded[chosen].get_vocab()
    for each, tokenizer in loaded.items():
        other = [token for token, index in tokenizer.get_vocab().items() if known.get(token) != index]
        if other and any(map(holds_embeddings, (each, chosen))):
            raise RequestError(
                f"{each}: its token {other[0]!r} has a different id from that in {chosen}, or none, so no model can have the "
                "tokens of both; merge only one of them"
            )
    return loaded[chosen], chosen


def _has_tokenizer(folder: Path) -> bool:
    return any((folder / name).exists() for name in ("tokenizer_config.json", "tokenizer.json"))
