"""Hashes that identify a model, an adapter or a tokenizer, and which files count."""

from __future__ import annotations

import hashlib
from pathlib import Path

from raysft.storage.local_cache import local_copy, on_hub

CODE_SUFFIXES = (".py",)
MODEL_SUFFIXES = (".safetensors", ".bin", *CODE_SUFFIXES)
"""Suffixes of the files that determine what a model computes, besides its configuration."""
TOKENIZER_SUFFIXES = (".json", ".jinja", ".txt", ".model", ".tiktoken", *CODE_SUFFIXES)
"""Suffixes of the files that determine how a model tokenizes and renders conversations; ``.json`` includes configurations."""
SAMPLES, SAMPLE_BYTES = 256, 1 << 16
"""What is hashed of a large file: a model of many GiB takes a second. Training changes all weights, or whole layers."""


def model_fingerprint(model: str) -> str:
    """Hash a model's or adapter's configuration, weights and code (samples of large files); for a Hub model, return its commit."""
    if on_hub(model):
        return model
    folder = Path(local_copy(model))
    weights = [(path.name, path.stat().st_size, _sampled_hash(path)) for path in _decisive_files(folder)]
    description = next(path for name in ("adapter_config.json", "config.json") if (path := folder / name).exists())
    return hashlib.sha256(description.read_bytes() + repr(weights).encode()).hexdigest()[:16]


def exact_fingerprint(model: str) -> str:
    """Identify a model or adapter by ``model_fingerprint`` and the times of its files, or a Hub model by its commit.

    The samples of a large file may miss a few rows that are edited in place; the file's time does not. A copy of the files counts
    as another model.
    """
    if on_hub(model):
        return model
    times = [path.stat().st_mtime_ns for path in _decisive_files(Path(local_copy(model)))]
    return f"{model_fingerprint(model)} {times}"


def _decisive_files(folder: Path) -> list[Path]:
    return sorted(path for suffix in MODEL_SUFFIXES for path in folder.glob(f"*{suffix}") if path.is_file())


def tokenizer_fingerprint(model: str) -> str:
    """Hash the tokenizer's files in a model's folder."""
    folder, digest = Path(local_copy(model)), hashlib.sha256()
    for path in sorted(path for path in folder.rglob("*") if path.suffix in TOKENIZER_SUFFIXES and path.is_file()):
        digest.update(str(path.relative_to(folder)).encode() + b"\0" + hashlib.sha256(path.read_bytes()).digest())
    return digest.hexdigest()


def _sampled_hash(file: Path) -> str:
    size, digest = file.stat().st_size, hashlib.sha256()
    with file.open("rb") as stream:
        if size <= SAMPLES * SAMPLE_BYTES:
            return hashlib.file_digest(stream, "sha256").hexdigest()
        for index in range(SAMPLES):
            stream.seek(index * (size - SAMPLE_BYTES) // (SAMPLES - 1))
            digest.update(stream.read(SAMPLE_BYTES))
    return digest.hexdigest()
