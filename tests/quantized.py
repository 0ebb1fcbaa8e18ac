"""Checkpoints in FP8 and MXFP4, quantized here number by number, as those that are published hold them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

BLOCK = (12, 20)
"""Sides of a block of FP8; no side of a matrix of the tiny models is a multiple of both."""
GROUP = 32
"""Numbers of MXFP4 that share a scale."""
FP4 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
EXACT = ("embed_tokens", "lm_head", "norm", "gate.weight", "bias")
"""Parts of the names of weights that such checkpoints leave as they are."""


def to_fp8(folder: Path, output: Path, block: tuple[int, int] = BLOCK) -> dict[str, torch.Tensor]:
    """Write a model with its matrices in FP8; returns what all weights stand for, in bfloat16."""
    stored, exact = {}, {}
    for name, weight in load_file(folder / "model.safetensors").items():
        if weight.dim() != 2 or any(part in name for part in EXACT):
            stored[name] = exact[name] = weight.bfloat16()
            continue
        rows, columns = weight.shape
        packed = torch.empty(weight.shape, dtype=torch.float8_e4m3fn)
        scales = torch.empty(-(-rows // block[0]), -(-columns // block[1]))
        meant = torch.empty(weight.shape)
        for row, line in enumerate(scales):
            for column in range(len(line)):
                place = tuple(slice(size * at, size * (at + 1)) for size, at in zip(block, (row, column), strict=True))
                line[column] = weight[place].abs().max() / 448
                packed[place] = (weight[place] / line[column]).to(torch.float8_e4m3fn)
                meant[place] = packed[place].float() * line[column]
        stored |= {name: packed, f"{name}_scale_inv": scales}
        exact[name] = meant.bfloat16()
    method = {"quant_method": "fp8", "activation_scheme": "dynamic", "fmt": "e4m3", "weight_block_size": list(block)}
    _write(folder, output, stored, method)
    return exact


def to_mxfp4(folder: Path, output: Path) -> dict[str, torch.Tensor]:
    """Write a gpt-oss model with its experts in MXFP4; returns what all weights stand for, in bfloat16."""
    stored, exact, levels = {}, {}, torch.tensor([*FP4, *(-value for value in FP4)])
    for name, weight in load_file(folder / "model.safetensors").items():
        if not name.endswith(("gate_up_proj", "down_proj")):
            stored[name] = exact[name] = weight.bfloat16()
            continue
        groups = weight.transpose(1, 2).unflatten(-1, (-1, GROUP))  # [experts, outputs, groups, numbers]
        exponents = groups.abs().amax(-1).log2().floor() - 2
        scaled = groups / exponents.exp2()[..., None]
        codes = (scaled[..., None] - levels).abs().argmin(-1)
        meant = levels[codes] * exponents.exp2()[..., None]
        pairs = codes.unflatten(-1, (-1, 2))
        stored[f"{name}_blocks"] = (pairs[..., 0] + 16 * pairs[..., 1]).to(torch.uint8)
        stored[f"{name}_scales"] = (exponents + 127).to(torch.uint8)
        exact[name] = meant.flatten(-2).transpose(1, 2).bfloat16().contiguous()
    _write(folder, output, stored, {"quant_method": "mxfp4", "modules_to_not_convert": ["model.layers.*.self_attn"]})
    return exact


def _write(folder: Path, output: Path, weights: dict[str, torch.Tensor], method: dict[str, Any]) -> None:
    output.mkdir()
    for file in folder.iterdir():
        if file.name != "model.safetensors":
            (output / file.name).write_bytes(file.read_bytes())
    described = json.loads((folder / "config.json").read_text()) | {"dtype": "bfloat16", "quantization_config": method}
    (output / "config.json").write_text(json.dumps(described))
    save_file(
        {name: each.contiguous() for name, each in weights.items()}, output / "model.safetensors", {"format": "pt"}
    )
