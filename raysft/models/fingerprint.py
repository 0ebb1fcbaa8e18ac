"""What a model or an adapter is, as one hash."""

from __future__ import annotations

import hashlib
from pathlib import Path

from raysft.storage.local_cache import local_copy

FINGERPRINTED_SUFFIXES = (".safetensors", ".bin", ".py")
"""Endings of the files that decide what a model computes, besides its config."""


def model_fingerprint(model: str) -> str:
    """Hash of a model's or adapter's config, weights and code (of large files samples); the id of a model on the hub."""
    folder = Path(local_copy(model))
    if not folder.is_dir():
        return model
    decisive = (path for ending in FINGERPRINTED_SUFFIXES for path in folder.glob(f"*{ending}"))
    weights = sorted((path.name, path.stat().st_size, _sampled(path)) for path in decisive)
    hf_config = next(path for name in ("adapter_config.json", "config.json") if (path := folder / name).exists())
    return hashlib.sha256(hf_config.read_bytes() + repr(weights).encode()).hexdigest()[:16]


SAMPLES, SAMPLE_BYTES = 256, 1 << 16
"""Of a large file, so that a model of many GiB is known in a second; a training changes all of its weights, or whole layers."""


def _sampled(file: Path) -> str:
    size, digest = file.stat().st_size, hashlib.sha256()
    with file.open("rb") as stream:
        if size <= SAMPLES * SAMPLE_BYTES:
            return hashlib.file_digest(stream, "sha256").hexdigest()
        for index in range(SAMPLES):
            stream.seek(index * (size - SAMPLE_BYTES) // (SAMPLES - 1))
            digest.update(stream.read(SAMPLE_BYTES))
    return digest.hexdigest()
