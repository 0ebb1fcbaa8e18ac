"""Checkpoints in FP8 (DeepSeek-V3, Qwen3-FP8) and MXFP4 (gpt-oss), dequantized once: as they are, they cannot be trained, nor be
computed without a GPU that has the kernels.

The copy is an ordinary one in 16 bits, so that ZeRO-3 partitions it, adapters are merged into it, and every engine loads it. It is
written weight by weight; transformers' own way loads the whole model on each worker, and takes no matrix whose sides are not
multiples of a block's, as DeepSeek-V3 has.
"""

from __future__ import annotations

import hashlib
import json
import math
import shutil
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

from raysft.config import Config
from raysft.errors import RequestError
from raysft.models.adapter_files import adapter_base, named_base, read_adapter_config
from raysft.models.fingerprint import model_fingerprint
from raysft.models.model_files import copy_files, model_files
from raysft.models.quantization import STORED, method_of
from raysft.models.remote_code import check_code, code_name
from raysft.models.weight_files import safetensors_files
from raysft.models.weight_types import (
    SHARD_SIZE,
    bytes_of,
    description_of,
    holds_weights,
    own_dtype,
    write_description,
    write_shards,
)
from raysft.storage.hub_snapshots import shown
from raysft.storage.json_files import write_json
from raysft.storage.local_cache import in_cache, local_copy, model_copy, on_hub
from raysft.storage.path import StoragePath

if TYPE_CHECKING:
    import torch

FP8 = ("F8_E4M3", "F8_E5M2")
"""Data types of 8-bit weights by their names in safetensors."""
SCALES = ("_scale_inv", "_scale")
"""How the scale of a weight in FP8 is called, after the weight."""
FORM = "2"
"""Of the copies; counts up when the same model gives another one, so that older ones in a cache are not used."""
UNUSED = (".activation_scale", "_activation_scale", ".input_scale", "_input_scale", ".k_scale", ".v_scale")
"""How the names end of what only multiplying, or a cache, in FP8 needs."""
ALONE = (".weight_scale_inv", "_proj_scale_inv", ".weight_scale")
"""How the names of scales of FP8 end that are nothing without a weight."""
BLOCKS, BLOCK_SCALES = "_blocks", "_scales"
"""How the two parts of a weight in MXFP4 are called."""
FP4_VALUES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)
"""What the 16 numbers of FP4 (E2M1) stand for (OCP Microscaling Formats 1.0)."""
BIAS = 127
"""Of an exponent that is a scale (E8M0)."""


def with_exact_weights(
    config: Config, model: str, notify: Callable[[str], None], key: str = "model.path", given: str | None = None
) -> str:
    """Return ``exact_copy`` of a model, unless the config says that it stays as it is.

    Args:
        config: the run's config.
        model: folder, URI or hub id of a whole model or an adapter.
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
        model: folder, URI or hub id of a whole model or an adapter.
        notify: receives a line before a copy is made.
        with_code: copy the code that the model brings, too. Whoever sees the copy does not know any more where it is from.

    Raises:
        RequestError: scales are missing, or have other shapes than the config of the model says, or there is no room.
    """
    folder = Path(local_copy(model))
    if (method := _stored_in(str(folder))) is None:
        return model
    is_adapter = (folder / "adapter_config.json").exists()
    base = _exact_base(cache, folder, notify, with_code) if is_adapter else ""
    content = [FORM, model_fingerprint(model), *([base] if base else []), *(["code"] if with_code else [])]
    key = hashlib.sha256(" ".join(content).encode()).hexdigest()[:16]
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

    return in_cache(target, write, "adapter_config.json" if is_adapter else "config.json").location


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
    """Leave only what transformers has classes for, whatever is trusted where the copy is used."""
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
        weights = _Quantized(model, description, stack)
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
            f"{free / 2**30:,.1f} GiB free; make room, or set data.cache to a folder with more"
        )


class _Quantized:
    """The weights of a checkpoint, each dequantized when it is read."""

    def __init__(self, model: Path, description: Mapping[str, Any], stack: ExitStack) -> None:
        """
        Args:
            model: its folder.
            description: its ``config.json``.
            stack: closes its files.
        """
        import torch
        from safetensors import safe_open

        self._model = model
        self._files: dict[str, Any] = {}
        for path in safetensors_files(model, str(model)):
            file = stack.enter_context(safe_open(path, framework="pt"))
            self._files |= dict.fromkeys(file.keys(), file)
        if not self._files:
            raise RequestError(f"{model}: is quantized, but not in *.safetensors; use such a copy of it")
        self._dtype = torch.float16 if own_dtype(model) == "float16" else torch.bfloat16
        text = description.get("text_config") or {}
        settings = description.get("quantization_config") or text.get("quantization_config") or {}
        self._block = settings.get("weight_block_size")
        self._read: dict[str, Callable[[], Any]] = {}
        self.sizes: dict[str, int] = {}
        """Name of a dequantized weight → its bytes."""
        for name in self._files:
            self._add(name)

    def read(self, name: str) -> Any:
        """Return a dequantized weight."""
        return self._read[name]()

    def _add(self, name: str) -> None:
        if self._is_scale(name) or name.endswith(UNUSED):
            return
        piece = self._files[name].get_slice(name)
        self._check_alone(name, piece.get_dtype())
        shape, elements = piece.get_shape(), math.prod(piece.get_shape())
        if name.endswith(BLOCKS) and piece.get_dtype() == "U8":
            scales = self._scales_of(name, name.removesuffix(BLOCKS) + BLOCK_SCALES)
            self._put(name.removesuffix(BLOCKS), 4 * elements, lambda: self._mxfp4(name, scales))
        elif piece.get_dtype() in FP8:
            found = self._scales_of(name, *(name + end for end in SCALES))
            self._check_scales(found, shape)
            self._put(name, 2 * elements, lambda: self._fp8(name, found))
        else:
            tensor = self._files[name]
            self._put(name, elements * bytes_of(piece.get_dtype()), lambda: tensor.get_tensor(name))

    def _scales_of(self, name: str, *names: str) -> str:
        found = next((each for each in names if each in self._files), None)
        if found is None:
            raise RequestError(
                f"{self._model}: {name} is quantized, but its scale, {names[0]}, is missing; copy it again"
            )
        return found

    def _is_scale(self, name: str) -> bool:
        return any(name.endswith(end) and name.removesuffix(end) in self._files for end in SCALES) or (
            name.endswith(BLOCK_SCALES) and name.removesuffix(BLOCK_SCALES) + BLOCKS in self._files
        )

    def _check_alone(self, name: str, dtype: str) -> None:
        if name.endswith(ALONE) or (name.endswith(BLOCK_SCALES) and dtype == "U8"):
            of_blocks = name.endswith(BLOCK_SCALES)
            end = BLOCK_SCALES if of_blocks else next(each for each in SCALES if name.endswith(each))
            weight = name.removesuffix(end) + (BLOCKS if of_blocks else "")
            raise RequestError(
                f"{self._model}: {name} is the scale of {weight}, which is missing; copy the model again"
            )

    def _put(self, name: str, size: int, read: Callable[[], Any]) -> None:
        self.sizes[name], self._read[name] = size, read

    def _check_scales(self, name: str, shape: list[int]) -> None:
        scales = self._files[name].get_slice(name).get_shape()
        if len(scales) < 2 and math.prod(scales) == 1:
            return
        if len(scales) != len(shape):
            raise RequestError(
                f"{self._model}: {name} has the shape {scales} for weights of {shape}, but a scale is one number or one for each "
                "block; use another copy of the model"
            )
        if self._block is None:
            if any(size % parts for size, parts in zip(shape[-2:], scales[-2:], strict=True)):
                raise RequestError(
                    f"{self._model}: {name} has the shape {scales} for weights of {shape}, but config.json does not say how large "
                    "blocks are; add weight_block_size to its quantization_config"
                )
            return
        expected = [*shape[:-2], *(-(-size // side) for size, side in zip(shape[-2:], self._block, strict=True))]
        if scales != expected:
            raise RequestError(
                f"{self._model}: {name} has the shape {scales}, but weights of {shape} in blocks of {self._block} "
                f"(weight_block_size in config.json) need {expected}; copy it again"
            )

    def _fp8(self, name: str, scales: str) -> Any:
        weight, scale = self._files[name].get_tensor(name), _scale(self._files[scales].get_tensor(scales))
        block = self._block or [
            -(-size // parts) for size, parts in zip(weight.shape[-2:], scale.shape[-2:], strict=False)
        ]
        return from_fp8(weight, scale, block, self._dtype)

    def _mxfp4(self, name: str, scales: str) -> Any:
        return from_mxfp4(self._files[name].get_tensor(name), self._files[scales].get_tensor(scales), self._dtype)


def _scale(stored: torch.Tensor) -> torch.Tensor:
    """Return scales in float32; some are exponents."""
    import torch

    if stored.dtype == torch.uint8:
        return torch.ldexp(torch.ones(()), stored.int() - BIAS)
    return stored.float()


def from_fp8(weight: torch.Tensor, scale: torch.Tensor, block: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
    """Dequantize FP8.

    Args:
        weight: [..., rows, columns].
        scale: [..., blocks of rows, blocks of columns] float32; those at the end of a side may be smaller. Or one number.
        block: sides of a block.
        dtype: of the result.
    """
    import torch

    if scale.numel() == 1:
        return (weight.float() * scale).to(dtype)
    result = torch.empty(weight.shape, dtype=dtype)
    flat = (each.flatten(0, -3) if each.dim() > 2 else each[None] for each in (weight, scale, result))
    for values, scales, target in zip(*flat, strict=True):
        rows, columns = values.shape
        wide = scales.repeat_interleave(block[0], 0)[:rows].repeat_interleave(block[1], 1)[:, :columns]
        target.copy_(values.float() * wide)
    return result


def from_mxfp4(blocks: torch.Tensor, scales: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Dequantize MXFP4 as gpt-oss stores the matrices of its experts.

    Args:
        blocks: [experts, outputs, groups, bytes], two numbers in each byte, the lower half first.
        scales: [experts, outputs, groups] exponents.
        dtype: of the result.

    Returns:
        [experts, inputs, outputs].
    """
    import torch

    table = torch.tensor(FP4_VALUES)
    experts, outputs, groups, size = blocks.shape
    result = torch.empty(experts, groups * size * 2, outputs, dtype=dtype)
    for packed, exponents, target in zip(blocks, scales, result, strict=True):
        values = torch.stack([table[(packed & 15).int()], table[(packed >> 4).int()]], -1).flatten(-2)
        target.copy_(torch.ldexp(values, exponents.int()[..., None] - BIAS).flatten(-2).T)
    return result
