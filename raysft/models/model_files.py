"""Which files of a folder belong to its model or adapter: those that the Hub would have, and its licence and card.

A folder written by training holds more, such as optimizer state; a cloned one holds its history.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Sequence
from fnmatch import fnmatch
from pathlib import Path

from raysft.storage.hub_snapshots import BESIDE_WEIGHTS, OTHER_WEIGHTS, WEIGHTS
from raysft.storage.run_directory import MODEL_MARKS

INDEXES = ("model.safetensors.index.json", "pytorch_model.bin.index.json")
"""The index of weights in parts, by format."""
DOCUMENTS = ("*.md", "LICEN[CS]E*", "NOTICE*", "COPYING*", "USE_POLICY*")
OF_TRAININGS = ("trainer_state.json", "*_results.json", "zero_to_fp32.py", "running_log.txt", "wandb/*")
"""Files that trainers leave next to a model, with names like those of its own files."""


def model_files(folder: Path) -> list[Path]:
    """List the files of a model or an adapter; of several formats of its weights, the one that is loaded."""
    weights, index = next((each for each in zip(WEIGHTS, INDEXES, strict=True) if _matching(folder, each[0])), ((), ""))
    unwanted = (*OTHER_WEIGHTS, *OF_TRAININGS, "*.index.json")
    return [
        path
        for path in _matching(folder, (*BESIDE_WEIGHTS, *DOCUMENTS, *weights))
        if path == folder / index
        or not any(fnmatch(path.relative_to(folder).as_posix(), pattern) for pattern in unwanted)
    ]


def other_files(folder: Path) -> list[str]:
    """Names of what is in a model's folder but does not belong to it; hidden files are left out."""
    taken = {path.relative_to(folder).parts[0] for path in model_files(folder)}
    return sorted(path.name for path in folder.iterdir() if path.name not in taken and not path.name.startswith("."))


def copy_files(folder: Path, output: Path, files: Sequence[Path]) -> None:
    """Copy files of a folder into another one, with their places in it."""
    for path in files:
        target = output / path.relative_to(folder)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, target)


def _matching(folder: Path, patterns: Sequence[str]) -> list[Path]:
    return sorted(path for path in _files(folder) if any(fnmatch(path.name, pattern) for pattern in patterns))


def _files(folder: Path) -> Iterator[Path]:
    for path in folder.iterdir():
        if path.name.startswith("."):
            continue
        if path.is_dir():
            if not any(
                (path / mark).exists() for mark in MODEL_MARKS
            ):  # or it is another model, such as a checkpoint's
                yield from _files(path)
        elif path.is_file():
            yield path
