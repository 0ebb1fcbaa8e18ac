"""Weights in FP8 and MXFP4, read as the numbers that they represent."""

from __future__ import annotations

import math
from collections.abc import Callable, Container, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

from raysft.errors import RequestError
from raysft.models.weight_files import check_weights, open_weights, safetensors_files
from raysft.models.weight_types import STORED, bytes_of, own_dtype

if TYPE_CHECKING:
    import torch

FP8 = ("F8_E4M3", "F8_E5M2")
"""Data types of 8-bit weights by their names in safetensors."""
SCALES = ("_scale_inv", "_scale")
"""Suffixes of the scale of a weight in FP8, after the weight's name."""
UNUSED = (".activation_scale", "_activation_scale", ".input_scale", "_input_scale", ".k_scale", ".v_scale")
"""Suffixes of what only multiplication or a cache in FP8 needs."""
ALONE = (".weight_scale_inv", "_proj_scale_inv", ".weight_scale")
"""Suffixes of FP8 scales that mean nothing without a weight."""
BLOCKS, BLOCK_SCALES = "_blocks", "_scales"
"""Suffixes of the two parts of a weight in MXFP4."""
FP4_VALUES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)
"""The values of the 16 numbers of FP4 (E2M1; OCP Microscaling Formats 1.0)."""
BLOCK_BYTES = 16
"""Bytes of a group of MXFP4, of two numbers each."""
EXPONENTS = ("U8", "F8_E8M0")
"""Data types of scales that are exponents (E8M0)."""
BIAS, NO_NUMBER = 127, 255
"""Of such an exponent, and the one that stands for no number."""


class QuantizedWeights:
    """The weights of a checkpoint, each dequantized when it is read."""

    def __init__(self, model: Path, description: Mapping[str, Any], stack: ExitStack) -> None:
        """
        Args:
            model: its folder.
            description: its ``config.json``.
            stack: closes its files.

        Raises:
            RequestError: files are missing or damaged, or weights and scales do not belong together.
        """
        import torch
        from safetensors import safe_open

        check_weights(model, str(model))
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
        self._block = _sides(settings.get("weight_block_size"), model)
        self._read: dict[str, Callable[[], Any]] = {}
        self.sizes: dict[str, int] = {}
        """Name of a dequantized weight → its bytes."""
        for name in self._files:
            self._add(name)

    def read(self, name: str) -> Any:
        """Return a dequantized weight."""
        return self._read[name]()

    def _add(self, name: str) -> None:
        if is_scale(name, self._files) or name.endswith(UNUSED):
            return
        dtype, shape = self._form(name)
        self._check_alone(name, dtype)
        elements = math.prod(shape)
        if name.endswith(BLOCKS) and dtype == "U8":
            scales = self._scales_of(name)
            self._check_block_scales(name, shape, scales)
            self._put(name.removesuffix(BLOCKS), 4 * elements, lambda: self._mxfp4(name, scales))
        elif dtype in FP8:
            found = self._scales_of(name)
            self._check_scales(found, shape)
            self._put(name, 2 * elements, lambda: self._fp8(name, found))
        else:
            if dtype not in STORED and (dtype.startswith("F") or scale_of(name, self._files)):
                raise RequestError(
                    f"{self._model}: {name} is stored in {dtype}, which is not dequantized here; use another copy of the model"
                )
            self._put(name, elements * bytes_of(dtype), lambda: self._files[name].get_tensor(name))

    def _form(self, name: str) -> tuple[str, list[int]]:
        piece = self._files[name].get_slice(name)
        return piece.get_dtype(), piece.get_shape()

    def _scales_of(self, name: str) -> str:
        names = scale_names(name)
        found = [each for each in names if each in self._files]
        if not found:
            raise RequestError(
                f"{self._model}: {name} is quantized, but its scale, {names[0]}, is missing; copy it again"
            )
        if len(found) > 1:
            raise RequestError(
                f"{self._model}: {name} has two scales, {' and '.join(found)}; use another copy of the model"
            )
        return found[0]

    def _check_alone(self, name: str, dtype: str) -> None:
        if name.endswith(ALONE) or (name.endswith(BLOCK_SCALES) and dtype == "U8"):
            of_blocks = name.endswith(BLOCK_SCALES)
            end = BLOCK_SCALES if of_blocks else next(each for each in SCALES if name.endswith(each))
            weight = name.removesuffix(end) + (BLOCKS if of_blocks else "")
            raise RequestError(
                f"{self._model}: {name} is the scale of {weight}, which is missing; copy the model again"
            )

    def _put(self, name: str, size: int, read: Callable[[], Any]) -> None:
        if name in self.sizes:
            raise RequestError(
                f"{self._model}: holds {name} twice, exact and in MXFP4 ({name}{BLOCKS}); use another copy of the model"
            )
        self.sizes[name], self._read[name] = size, read

    def _check_block_scales(self, name: str, shape: list[int], scales: str) -> None:
        dtype, found = self._form(scales)
        if len(shape) != 4 or shape[-1] != BLOCK_BYTES:
            raise RequestError(
                f"{self._model}: {name} has the shape {shape}, but blocks of MXFP4 have [experts, outputs, groups, {BLOCK_BYTES}]; "
                "use another copy of the model"
            )
        if found != shape[:-1] or dtype != "U8":
            raise RequestError(
                f"{self._model}: {scales} has the shape {found} in {dtype}, but blocks of {shape} need {shape[:-1]} in U8; copy "
                "the model again"
            )

    def _check_scales(self, name: str, shape: list[int]) -> None:
        dtype, scales = self._form(name)
        if dtype not in (*STORED, *EXPONENTS):
            raise RequestError(
                f"{self._model}: {name} is stored in {dtype}, but scales are in {', '.join((*STORED, *EXPONENTS))}; use another "
                "copy of the model"
            )
        if len(scales) < 2 and math.prod(scales) == 1:
            return
        if len(scales) != len(shape) or len(shape) < 2:
            raise RequestError(
                f"{self._model}: {name} has the shape {scales} for weights of {shape}, but a scale is one number or one for each "
                "block; use another copy of the model"
            )
        if self._block is None:
            if not all(parts and size % parts == 0 for size, parts in zip(shape[-2:], scales[-2:], strict=True)):
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
        self._check_numbers(scales, bool(scale.isfinite().all()))
        block = self._block or [
            -(-size // parts) for size, parts in zip(weight.shape[-2:], scale.shape[-2:], strict=False)
        ]
        return from_fp8(weight, scale, block, self._dtype)

    def _mxfp4(self, name: str, scales: str) -> Any:
        blocks, exponents = (self._files[each].get_tensor(each) for each in (name, scales))
        self._check_numbers(scales, not bool((exponents == NO_NUMBER).any()))
        return from_mxfp4(blocks, exponents, self._dtype)

    def _check_numbers(self, scales: str, are_numbers: bool) -> None:
        if not are_numbers:
            raise RequestError(f"{self._model}: {scales} holds scales that are no numbers; copy the model again")


def check_described(model: Path) -> None:
    """Refuse weights with scales that ``config.json`` does not mention: they would be read without them.

    Args:
        model: folder of a model whose config names no quantization, with its weights in ``*.safetensors`` or others.

    Raises:
        RequestError: names a weight and its scale.
    """
    for file in open_weights(model, str(model), "pt"):
        names = set(file.keys())
        for name in sorted(names):
            dtype, scale = file.get_slice(name).get_dtype(), scale_of(name, names)
            if scale and (dtype in FP8 or (dtype == "U8" and name.endswith(BLOCKS))):
                raise RequestError(
                    f"{model}: {name} is quantized ({dtype}, with {scale}), but config.json has no quantization_config; "
                    "copy the model's config.json again"
                )


def scale_of(name: str, names: Container[str]) -> str | None:
    """Return the name of a weight's scale if it is there."""
    return next((each for each in scale_names(name) if each in names), None)


def scale_names(name: str) -> list[str]:
    """Return the names that the scale of a weight may have."""
    return [name.removesuffix(BLOCKS) + BLOCK_SCALES] if name.endswith(BLOCKS) else [name + end for end in SCALES]


def is_scale(name: str, names: Container[str]) -> bool:
    """Return True for the scale of a weight that also exists."""
    return any(name.endswith(end) and name.removesuffix(end) in names for end in SCALES) or (
        name.endswith(BLOCK_SCALES) and name.removesuffix(BLOCK_SCALES) + BLOCKS in names
    )


def _sides(said: Any, model: Path) -> list[int] | None:
    """Return the sides of a block as a model's config says them."""
    if said is None:
        return None
    if not isinstance(said, list) or len(said) != 2 or not all(type(side) is int and side > 0 for side in said):
        raise RequestError(
            f"{model / 'config.json'}: weight_block_size={said!r} is not the two sides of a block, such as [128, 128]; correct "
            "it in quantization_config"
        )
    return said


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
