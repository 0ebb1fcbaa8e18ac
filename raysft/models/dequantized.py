"""Checkpoints in FP8 (DeepSeek-V3, Qwen3-FP8) and MXFP4 (gpt-oss), dequantized once: as they are, they cannot be trained, or
run without a GPU that has the kernels.

The copy is an ordinary 16-bit model, so ZeRO-3 can partition it, adapters can be merged into it, and every engine can load it.
It is written weight by weight; transformers itself loads the whole model on each worker, and does not take matrices whose sides
are not multiples of a block's, as in DeepSeek-V3.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

from raysft.config import Config
from raysft.errors import RequestError
from raysft.models.adapter_files import adapter_base, named_base, read_adapter_config
from raysft.models.fingerprint import model_fingerprint, tokenizer_fingerprint
from raysft.models.model_files import copy_files, model_files
from raysft.models.quantization import STORED, method_of
from raysft.models.quantized_weights import QuantizedWeights, check_described
from raysft.models.remote_code import check_code, code_name
from raysft.models.weight_files import check_weights
from raysft.models.weight_types import (
    SHARD_SIZE,
    description_of,
    holds_weights,
    write_description,
    write_shards,
)
from raysft.storage.hub_snapshots import is_snapshot, shown
from raysft.storage.json_files import write_json
from raysft.storage.local_cache import local_copy, model_copy, on_hub
from raysft.storage.model_cache import in_cache
from raysft.storage.path import StoragePath

FORM = "2"
"""Version of the copies; increased when the same model yields a different copy, so that older ones in a cache are not used."""


def with_exact_weights(
    config: Config, model: str, notify: Callable[[str], None], key: str = "model.path", given: str | None = None
) -> str:
    """Return ``exact_copy`` of a model, unless the config says that it stays as it is.

    Args:
        config: the run's config.
        model: folder, URI or Hub id of a whole model or an adapter.
        notify: receives a line before a copy is made.
        key: the setting that names the model.
        given: what it says.

    Raises:
        RequestError: as for ``exact_copy``, or the model needs code that the config does not trust.
    """
    if not config.model.dequantize or _stored_in(local_copy(model)) is None:
        return model
    folder = Path(local_copy(model))
    name = code_name(config, folder, given or config.model.path)
    check_code(config, str(adapter_base(folder) or folder), lambda line: None, name, key)
    return exact_copy(config.cache_directory, model, notify, name in config.model.trust_remote_code)


def exact_copy(cache: StoragePath, model: str, notify: Callable[[str], None], with_code: bool = False) -> str:
    """Return a model whose weights are exact: the model itself, or its copy in the cache if it is in FP8 or MXFP4.

    An adapter on such a model is copied with the name of that copy as its base.

    Args:
        cache: folder for copies.
        model: folder, URI or Hub id of a whole model or an adapter.
        notify: receives a line before a copy is made.
        with_code: copy the code that the model brings, too. The copy no longer shows where it is from.

    Raises:
        RequestError: scales are missing, or have other shapes than the config of the model says, or there is no room.
    """
    folder = Path(local_copy(model))
    method, is_adapter = _stored_in(str(folder)), (folder / "adapter_config.json").exists()
    if not (is_adapter or is_snapshot(folder)):  # weights on the Hub are fetched, and then checked, where they are read
        check_weights(folder, str(folder))
        if method_of(description_of(folder)) is None:
            check_described(folder)
    if method is None:
        return model
    base = _exact_base(cache, folder, notify, with_code) if is_adapter else ""
    files = (model_fingerprint(model), tokenizer_fingerprint(model))  # the second one also of the index of the weights
    key = hashlib.sha256(repr((FORM, *files, base, with_code)).encode()).hexdigest()[:16]
    target = cache / "models" / f"{'adapter' if is_adapter else 'dequantized'}-{key}"

    def write(draft: Path) -> None:
        source = model_copy(model)
        if is_adapter:
            _write_adapter(source, draft, base)
        else:
            notify(f"model: its weights in {method.upper()} are dequantized to 16 bits, once, in {target}")
            dequantize(source, draft)
        if not with_code:
            _remove_code(draft)

    return in_cache(target, write, notify, "adapter_config.json" if is_adapter else "config.json").location


def _stored_in(folder: str) -> str | None:
    """Return how the weights of a model, or of an adapter's base, are stored, if it is one of ``STORED``."""
    base = adapter_base(Path(folder)) if (Path(folder) / "adapter_config.json").exists() else None
    method = method_of(description_of(base or Path(folder)))
    return method if method in STORED else None


def _exact_base(cache: StoragePath, adapter: Path, notify: Callable[[str], None], with_code: bool) -> str:
    named = named_base(adapter) or ""
    return exact_copy(cache, named if on_hub(named) else str(adapter_base(adapter)), notify, with_code)


def _write_adapter(adapter: Path, output: Path, base: str) -> None:
    output.mkdir(parents=True)
    copy_files(adapter, output, model_files(adapter))
    named = {"base_model_name_or_path": base, "revision": None}
    write_json(output / "adapter_config.json", {**read_adapter_config(adapter), **named})


def _remove_code(folder: Path) -> None:
    """Keep only what transformers has classes for, no matter what is trusted where the copy is used."""
    for path in folder.glob("*config*.json"):
        content = json.loads(path.read_text(encoding="utf-8"))
        if isinstance(content, dict) and content.pop("auto_map", None):
            write_json(path, content)
    for path in folder.rglob("*.py"):
        path.unlink()


def dequantize(model: Path, output: Path, shard_size: str = SHARD_SIZE) -> None:
    """Write a copy of a model in FP8 or MXFP4 with all weights in 16 bits (those that have 32 keep them).

    Args:
        model: folder of the model, with its weights in ``*.safetensors``.
        output: a new folder.
        shard_size: largest size of a file of weights.

    Raises:
        RequestError: as for ``exact_copy``.
    """
    description = description_of(model)
    output.mkdir(parents=True)
    with ExitStack() as stack:
        weights = QuantizedWeights(model, description, stack)
        _check_room(model, output, sum(weights.sizes.values()))
        copy_files(model, output, [path for path in model_files(model) if not holds_weights(path)])
        write_shards(output, weights.sizes, lambda names: ((name, weights.read(name)) for name in names), shard_size)
    for part in (description, description.get("text_config")):
        if isinstance(part, dict):
            part.pop("quantization_config", None)
    write_description(output, description)


def _check_room(model: Path, output: Path, needed: int) -> None:
    free = shutil.disk_usage(output).free
    if needed > free:
        raise RequestError(
            f"{shown(str(model))}: its weights take {needed / 2**30:,.1f} GiB in 16 bits, but {output.parent} has "
            f"{free / 2**30:,.1f} GiB free; free some space, or set data.cache to a folder with more"
        )
