"""Adapters whose embeddings differ in size from their base's: trained after ``resize_token_embeddings``, as for new tokens.

peft saves the whole embedding and output head of such a model with its adapter (``save_embedding_layers``), and loads them only
into a model that has already been resized.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from raysft.errors import RequestError
from raysft.models.weight_files import adapter_shapes

WHOLE = re.compile(r"((base_layer|original_module|modules_to_save|token_adapter)\.)*weight")
"""What follows a module's name in the name of its whole weight, as peft's tuners wrap it."""


def fit_embeddings(model: Any, adapter: Path, least: int = 0) -> int:
    """Give a model as many embeddings, and rows of its output head, as an adapter holds.

    Args:
        model: a base, perhaps with other adapters merged into it.
        adapter: the folder of the adapter.
        least: how many it has from earlier adapters.

    Returns:
        How many the adapter holds; 0 if it trains none.

    Raises:
        RequestError: it holds fewer than the model needs.
    """
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    names = [name for name, module in model.named_modules() if module is embedding or module is head]
    held = {name: count for name in names if (count := _rows(adapter, name))}
    former, rows = embedding.weight.shape[0], max(held.values(), default=0)
    if 0 < rows < least:
        raise RequestError(
            f"{adapter}: has embeddings for {rows} tokens, but an earlier adapter has them for {least}; merge only one of them"
        )
    tied = head is None or head.weight is embedding.weight
    if rows > former and not tied and len(held) < len(names):
        lacking = next(name for name in names if name not in held)
        raise RequestError(
            f"{adapter}: has {rows} tokens and its base {former}, but the adapter has no {lacking} for the new ones; save it "
            "again, with save_embedding_layers=True"
        )
    if rows and rows != former:
        model.resize_token_embeddings(rows, mean_resizing=False)
    return rows


def _rows(adapter: Path, module: str) -> int | None:
    """Rows of a module's whole weight in an adapter; None if it holds none."""
    for name, shape in adapter_shapes(adapter).items():
        _, found, rest = name.partition(f".{module}.")
        if found and len(shape) == 2 and WHOLE.fullmatch(rest):
            return shape[0]
    return None
