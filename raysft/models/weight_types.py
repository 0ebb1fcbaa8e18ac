"""The data types of weights: which one a model has, and the same model in another one, or in files of another size.

Weights are rewritten file by file: no more than one of the output files is held at any time.
"""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from raysft.errors import RequestError, one_line
from raysft.models.model_files import copy_files, model_files
from raysft.models.transformers_internals import kept_in_float32
from raysft.models.weight_files import ADAPTER_FILES, MODEL_FILES, open_weights, safetensors_files

DTYPES = ("float32", "bfloat16", "float16")
"""Data types that a model can be exported in."""
SHARD_SIZE = "5GB"
"""Largest size of a rewritten weight file, unless another one is asked for."""
STORED = {"F64": "float64", "F32": "float32", "BF16": "bfloat16", "F16": "float16"}
"""Data types of exact weights by their names in safetensors."""
WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".onnx", ".h5", ".msgpack")
"""Suffixes of weights, in formats of several libraries."""
LARGEST_FLOAT16 = 65504.0


def stored_dtype(folder: Path) -> str | None:
    """Return the data type that most of a model's weights have in its files; None if there are no ``*.safetensors``."""
    elements = Counter[str]()
    for weights in open_weights(folder, str(folder)):
        for name in weights.keys():  # noqa: SIM118
            piece = weights.get_slice(name)
            if piece.get_dtype() in STORED:
                elements[STORED[piece.get_dtype()]] += math.prod(piece.get_shape())
    return elements.most_common(1)[0][0] if elements else None


def own_dtype(folder: Path) -> str:
    """Return a model's own data type: that of its ``config.json``, or else the one that most of its weights have."""
    description = description_of(folder)
    for part in (description, description.get("text_config") or {}):
        for key in ("dtype", "torch_dtype"):
            if part.get(key) in DTYPES:
                return str(part[key])
    stored = stored_dtype(folder)
    return stored if stored in DTYPES else "float32"


def converted(name: str, weight: Any, dtype: str) -> Any:
    """Return a weight in another data type, rounded to the nearest number.

    Raises:
        RequestError: it holds numbers that float16 cannot represent.
    """
    import torch

    if dtype == "float16" and weight.dtype != torch.float16 and weight.numel():
        beyond = weight[torch.isfinite(weight) & (weight.abs() > LARGEST_FLOAT16)]
        if beyond.numel():
            raise RequestError(
                f"--dtype float16: {name} holds {float(beyond[beyond.abs().argmax()]):g}, but the largest "
                f"float16 is {LARGEST_FLOAT16:,.0f}; use --dtype bfloat16"
            )
    return weight.to(getattr(torch, dtype))


def convert_parameters(model: Any, dtype: str) -> None:
    """Convert the weights of a model in memory, one after another, except those that transformers always keeps in float32."""
    stays = stays_float32(model, dtype)
    for name, parameter in model.named_parameters():
        if parameter.is_floating_point() and not stays(name):
            parameter.data = converted(name, parameter.data, dtype)


def stays_float32(model: Any, dtype: str) -> Callable[[str], bool]:
    """Return whether transformers keeps a weight of a model in float32 when the model has a data type."""
    patterns = [name.replace("*", ".*") for name in kept_in_float32(model, dtype)]
    return re.compile("|".join(patterns)).search if patterns else lambda name: False  # type: ignore[return-value]


def rewrite(model: Path, output: Path, dtype: str | None, shard_size: str | None) -> None:
    """Copy a model; its weights in another data type, or in files of another size.

    Args:
        model: folder of a whole model, with its weights in ``*.safetensors``.
        output: an existing folder.
        dtype: of the copy. Default: that of the weights.
        shard_size: largest size of a file of weights, such as ``5GB``. Default: the files stay as they are, or with another data
            type ``SHARD_SIZE``.
    """
    written_anew = bool(dtype or shard_size)
    copy_files(model, output, [path for path in model_files(model) if not (written_anew and holds_weights(path))])
    if not written_anew:
        return
    if dtype:
        _describe(output, dtype)
    _write_shards(model, output, dtype, shard_size or SHARD_SIZE)


def rewrite_adapter(adapter: Path, output: Path, dtype: str | None) -> None:
    """Copy an adapter, with its weights in a data type if one is given."""
    import torch
    from safetensors.torch import load_file, save_file

    copy_files(adapter, output, model_files(adapter))
    if dtype:
        file, pickled = (output / name for name in ADAPTER_FILES)
        loaded = load_file(file) if file.exists() else torch.load(pickled, map_location="cpu", weights_only=True)
        weights = {name: converted(name, weight, dtype).contiguous() for name, weight in loaded.items()}
        save_file(weights, file, metadata={"format": "pt"})
        pickled.unlink(missing_ok=True)


def holds_weights(path: Path) -> bool:
    """Return True for a file of weights, or their index."""
    return path.name in MODEL_FILES or path.suffix in WEIGHTS or path.name.endswith(".index.json")


def _write_shards(model: Path, output: Path, dtype: str | None, shard_size: str) -> None:
    from safetensors import safe_open

    stays = _stays_by_name(model, dtype) if dtype else lambda name: True
    places, sizes = {}, {}
    for file in safetensors_files(model, str(model)):
        with safe_open(file, framework="pt") as weights:
            for name in weights.keys():  # noqa: SIM118
                piece = weights.get_slice(name)
                kind = dtype if dtype and piece.get_dtype() in STORED and not stays(name) else piece.get_dtype()
                places[name], sizes[name] = file, math.prod(piece.get_shape()) * bytes_of(kind)

    def read(names: Sequence[str]) -> Iterator[tuple[str, Any]]:
        for file in dict.fromkeys(places[name] for name in names):
            with safe_open(file, framework="pt") as weights:
                for name in (name for name in names if places[name] == file):
                    exact = weights.get_slice(name).get_dtype() in STORED
                    weight = weights.get_tensor(name)
                    yield name, converted(name, weight, dtype) if dtype and exact and not stays(name) else weight

    write_shards(output, sizes, read, shard_size)


def write_shards(
    output: Path,
    sizes: Mapping[str, int],
    read: Callable[[Sequence[str]], Iterable[tuple[str, Any]]],
    shard_size: str,
) -> None:
    """Write weights into files of a size, one file in memory at a time, with their index.

    Args:
        output: an existing folder.
        sizes: name of a weight → its bytes.
        read: returns the weights of some names.
        shard_size: largest size of a file.
    """
    from huggingface_hub import split_state_dict_into_shards_factory
    from safetensors.torch import save_file

    split = split_state_dict_into_shards_factory(
        dict(sizes), get_storage_size=int, get_storage_id=lambda size: None, max_shard_size=shard_size,
        filename_pattern="model{suffix}.safetensors",
    )  # fmt: skip
    for target, names in split.filename_to_tensors.items():
        save_file(dict(read(names)), output / target, metadata={"format": "pt"})
    if split.is_sharded:
        index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
        path = output / "model.safetensors.index.json"
        path.write_text(json.dumps(index, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def bytes_of(dtype: str) -> int:
    """Bytes of a number, by the name of its data type in torch (float32) or in safetensors (F32, I64, BOOL, F8_E4M3).

    >>> [bytes_of(name) for name in ("bfloat16", "BF16", "F32", "U8", "BOOL", "F8_E4M3")]
    [2, 2, 4, 1, 1, 1]
    """
    bits = re.search(r"\d+", dtype)
    return int(bits[0]) // 8 if bits else 1


def _stays_by_name(model: Path, dtype: str) -> Callable[[str], bool]:
    """Like ``stays_float32``, for a model of which only the names are known; one with its own code keeps nothing apart."""
    import torch
    from transformers import AutoConfig

    from raysft.models.model_class import auto_class

    try:
        with torch.device("meta"):
            hf_config = AutoConfig.from_pretrained(model, trust_remote_code=False)
            return stays_float32(auto_class(hf_config).from_config(hf_config, trust_remote_code=False), dtype)
    except (OSError, ValueError, KeyError, AttributeError):
        return lambda name: False


def _describe(folder: Path, dtype: str) -> None:
    """Let a model's ``config.json`` name its data type."""
    description = description_of(folder)
    for part in (description, description.get("text_config")):
        if isinstance(part, dict) and (part is description or "dtype" in part or "torch_dtype" in part):
            part.pop("torch_dtype", None)
            part["dtype"] = dtype
    write_description(folder, description)


def write_description(folder: Path, description: Mapping[str, Any]) -> None:
    """Write a model's ``config.json``."""
    text = json.dumps(description, indent=2, sort_keys=True, ensure_ascii=False)
    (folder / "config.json").write_text(text + "\n", encoding="utf-8")


def description_of(folder: Path) -> dict[str, Any]:
    """Return the content of a model's ``config.json``."""
    path = folder / "config.json"
    try:
        description = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(description, Mapping):
            raise ValueError("no mapping")
        for part in ("text_config", "quantization_config"):
            if not isinstance(description.get(part), Mapping | None):
                raise ValueError(f"its {part} is {description[part]!r:.40}, no mapping")
    except (OSError, ValueError) as error:
        raise RequestError(
            f"{path}: is not a model's configuration ({one_line(error)}); copy the model again"
        ) from None
    return dict(description)
