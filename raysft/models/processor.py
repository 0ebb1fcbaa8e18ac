"""The processor of a model for text and images: it knows which tokens stand for an image, and makes pixels of it."""

from __future__ import annotations

import json
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from raysft.errors import RequestError, one_line

FILES = ("processor_config.json", "preprocessor_config.json")
"""A folder with one of them has a processor beside its tokenizer."""


def has_processor(folder: str | Path) -> bool:
    """True if a model's folder has a processor beside its tokenizer."""
    return any((Path(folder) / name).is_file() for name in FILES)


def load_processor(folder: str | Path, runs_code: bool = False) -> Any:
    """Load a model's processor; without torchvision, also those of models for videos, without their part for videos.

    Args:
        folder: of the model.
        runs_code: allow code that comes with the model to run.

    Raises:
        RequestError: it cannot be loaded.
    """
    from transformers import AutoProcessor

    kind = None if find_spec("torchvision") else _class_with_videos(Path(folder))
    try:
        return (_without_videos(kind) if kind else AutoProcessor).from_pretrained(folder, trust_remote_code=runs_code)
    except Exception as error:  # of any type: its files and the code that they name decide
        raise RequestError(f"{folder}: its processor cannot be loaded ({one_line(error)}); check its files") from None


def _class_with_videos(folder: Path) -> Any:
    """The class of transformers that a folder's processor has, if it has a part for videos; None for all others."""
    import transformers

    for file in (*FILES, "tokenizer_config.json"):
        with suppress(OSError, ValueError, AttributeError):
            named = json.loads((folder / file).read_text()).get("processor_class")
            kind = getattr(transformers, named or "", None)
            if kind is not None:
                return kind if "video_processor" in kind.get_attributes() else None
    return None


def _without_videos(kind: Any) -> Any:
    """A processor class without its part for videos: transformers makes that one with torchvision alone."""

    class WithoutVideos(kind):
        @classmethod
        def get_attributes(cls) -> list[str]:
            return [name for name in super().get_attributes() if name != "video_processor"]

    WithoutVideos.__name__ = kind.__name__  # files of a saved processor name its class
    return WithoutVideos
