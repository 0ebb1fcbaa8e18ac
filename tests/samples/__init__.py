"""Small data of our own making, for tests of what real data holds; more of it is used where it lies beside the repository.

``alpaca.json`` and ``calls.json`` (ShareGPT, with functions) are for every test; ``tools.jinja`` is a chat template that shows
functions and calls.
"""

from __future__ import annotations

from pathlib import Path

HERE = Path(__file__).parent
MORE = Path(__file__).parents[3] / "shared" / "data"
"""Larger data sets, and a tokenizer of a real model, that are not part of this repository."""
TOOLS_TEMPLATE = (HERE / "tools.jinja").read_text()


def files(*names: str, more: tuple[str, ...] = ()) -> list[Path]:
    """Files of these samples, and those of the larger data sets that are there."""
    return [HERE / name for name in names] + [MORE / name for name in more if (MORE / name).is_file()]


def tokenizers() -> list[Path]:
    """Folders of the tokenizers of real models that are there."""
    return [folder for folder in (MORE / "tokenizers" / "qwen3",) if folder.is_dir()]
