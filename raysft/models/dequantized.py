"""Checkpoints in FP8 (DeepSeek-V3, Qwen3-FP8) and MXFP4 (gpt-oss), dequantized once: as they are, they cannot be trained.

The copy is an ordinary one in 16 bits, so that ZeRO-3 partitions it, adapters are merged into it, and every engine loads it. It is
written weight by weight; transformers' own way loads the whole model on each worker, and takes no matrix whose sides are not
multiples of a block's, as DeepSeek-V3 has.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

from raysft.config import Config
from raysft.errors import RequestError
from raysft.models.fingerprint import model_fingerprint
from raysft.models.model_files import copy_files, model_files
from raysft.models.quantization import method_of
from raysft.models.weight_files import safetensors_files
from raysft.models.weight_types import (
    SHARD_SIZE,
    bytes_of,
    description_of,
    holds_weights,
    write_description,
    write_shards,
)
from raysft.storage.local_cache import in_cache, local_copy, model_copy

if TYPE_CHECKING:
    import torch

METHODS = ("fp8", "mxfp4")
FP8 = ("F8_E4M3", "F8_E5M2")
"""Data types of 8-bit weights by their names in safetensors."""
SCALES = ("_scale_inv", "_scale")
"""How the scale of a weight in FP8 is called, after the weight."""
UNUSED = (".activation_scale", ".input_scale")
"""Names of what only multiplying in FP8 needs."""
BLOCKS, BLOCK_SCALES = "_blocks", "_scales"
"""How the two parts of a weight in MXFP4 are called."""
FP4_VALUES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)
"""What the 16 numbers of FP4 (E2M1) stand for (OCP Microscaling Formats 1.0)."""
BIAS = 127
"""Of an exponent that is a scale (E8M0)."""


def with_exact_weights(config: Config, model: str, notify: Callable[[str], None]) -> str:
    """Return a model whose weights can be trained: the model, or its copy in the cache if it is in FP8 or MXFP4.

    Args:
        config: the run's config.
        model: folder, URI or hub id.
        notify: receives a line before a copy is made.

    Raises:
        RequestError: scales are missing, or have other shapes than the config of the model says.
    """
    method = method_of(description_of(Path(local_copy(model))))
    if method not in METHODS or not config.model.dequantize:
        return model
    key = hashlib.sha256(model_fingerprint(model).encode()).hexdigest()[:16]
    target = config.cache_directory / "models" / f"dequantized-{key}"

    def write(folder: Path) -> None:
        notify(f"model: its weights in {method.upper()} are dequantized to 16 bits, once, in {target}")
        dequantize(model_copy(model), folder)

    return in_cache(target, write).location


def dequantize(model: Path, output: Path, shard_size: str = SHARD_SIZE) -> None:
    """Write a copy of a model in FP8 or MXFP4 with all weights in 16 bits (those that have 32 keep them).

    Args:
        model: folder of the model, with its weights in ``*.safetensors``.
        output: a new folder.
        shard_size: largest size of a file of weights.

    Raises:
        RequestError: as for ``with_exact_weights``.
    """
    description = description_of(model)
    output.mkdir(parents=True)
    copy_files(model, output, [path for path in model_files(model) if not holds_weights(path)])
    with ExitStack() as stack:
        weights = _Quantized(model, description, stack)
        write_shards(output, weights.sizes, lambda names: ((name, weights.read(name)) for name in names), shard_size)
    for part in (description, description.get("text_config")):
        if isinstance(part, dict):
            part.pop("quantization_config", None)
    write_description(output, description)


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
        named = description.get("dtype") or description.get("torch_dtype")
        self._dtype = torch.float16 if named == "float16" else torch.bfloat16
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
