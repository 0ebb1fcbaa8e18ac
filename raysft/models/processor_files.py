"""The files of a processor, which copies of a model include: even those of parts that cannot be loaded here."""

from __future__ import annotations

import json
import shutil
from contextlib import suppress
from pathlib import Path
from typing import Any

from raysft.models.processor import FILES, has_processor

ALL_FILES = (*FILES, "video_preprocessor_config.json")
"""Descriptions of a processor and its parts. The chat template is the tokenizer's, which is saved next to them."""
LEGACY_TEMPLATE = "chat_template.json"
"""A processor uses it instead of the ``chat_template.jinja`` next to it."""


def save_tokenizer(tokenizer: Any, folder: Path) -> None:
    """Save a tokenizer for a model, and the other files of the processor that it belongs to."""
    tokenizer.save_pretrained(folder)
    if tokenizer.name_or_path:
        copy_processor(Path(tokenizer.name_or_path), folder)


def copy_processor(model: Path, folder: Path) -> None:
    """Copy the files of a model's processor, and the code that they name, into a folder that has none."""
    if not has_processor(model) or has_processor(folder):
        return
    found = [path for name in ALL_FILES if (path := model / name).is_file()]
    if any("auto_map" in path.read_text(encoding="utf-8") for path in found):
        found += [path for path in sorted(model.glob("*.py")) if not (folder / path.name).exists()]
    for path in found:
        shutil.copyfile(path, folder / path.name)


def processor_template(model: Path) -> str | None:
    """Return the chat template that a model's processor has in a separate file; None if it has the tokenizer's."""
    if has_processor(model):
        with suppress(OSError, ValueError, AttributeError):
            return json.loads((model / LEGACY_TEMPLATE).read_text(encoding="utf-8")).get("chat_template")
    return None
