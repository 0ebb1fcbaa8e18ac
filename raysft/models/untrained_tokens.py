"""Tokens that a model has never been trained on, as the rows of its embedding and its output head show."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from raysft.models.weight_files import EMBEDDINGS, open_weights
from raysft.storage.local_cache import local_copy

HEADS = (".lm_head.weight", ".embed_out.weight")
SAMPLED = 64
"""Rows, evenly spaced, that show how long rows are."""
SHORT = 0.1
"""A row shorter than this fraction of the median was never trained, like those of Llama 3's reserved tokens."""


def untrained_tokens(model: str, tokens: Sequence[int], special: Iterable[int]) -> list[int]:
    """Return which tokens have a row of almost zero, or the same row as another special token, in a matrix of the model.

    Rows that were drawn at random look like trained ones and are not found, nor is anything in a model that is not on this machine.

    Args:
        model: folder, URI or Hub id.
        tokens: ids to check.
        special: ids of the tokenizer's special tokens.
    """
    found: set[int] = set()
    folder = _folder(model)
    for matrix in _matrices(folder) if tokens and folder else ():
        size = matrix.get_shape()[0]
        steps = range(0, size, max(1, size // SAMPLED))
        typical = sorted(float(_row(matrix, index).norm()) for index in steps)[len(steps) // 2]
        others = {index: _row(matrix, index) for index in special if index < size}
        for token in (token for token in tokens if token < size):
            row = _row(matrix, token)
            twin = any(index != token and bool((row == other).all()) for index, other in others.items())
            if twin or float(row.norm()) < SHORT * typical:
                found.add(token)
    return [token for token in tokens if token in found]


def _folder(model: str) -> Path | None:
    folder = Path(local_copy(model))
    if folder.is_dir():
        return folder
    from huggingface_hub import snapshot_download

    with suppress(Exception):
        return Path(snapshot_download(model, local_files_only=True))
    return None


def _matrices(folder: Path) -> Iterator[Any]:
    """Yield slices of the embedding and the head."""
    with suppress(OSError):  # the Hub cache may hold only part of the files
        for weights in open_weights(folder, str(folder), "pt"):
            for name in weights.keys():  # noqa: SIM118
                if f".{name}".endswith((*EMBEDDINGS, *HEADS)) and len(weights.get_slice(name).get_shape()) == 2:
                    yield weights.get_slice(name)


def _row(matrix: Any, index: int) -> Any:
    return matrix[index : index + 1].float()[0]
