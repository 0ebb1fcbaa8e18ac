"""Store predictions on disk as they arrive, so that a restarted call generates only what is missing."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from raysft.config import Config
from raysft.models.adapter_files import adapter_base
from raysft.models.fingerprint import model_fingerprint, tokenizer_fingerprint
from raysft.storage.json_files import read_jsonl, write_json, write_jsonl
from raysft.storage.local_cache import model_copy

_WITHOUT_EFFECT = {
    "enabled", "model", "sources", "compare_base", "num_actors", "gpus_per_engine", "max_examples", "batching", "batch_size",
    "metrics",
}  # fmt: skip
"""Settings of ``generate`` that do not change the prediction of a prompt."""


def fingerprint(config: Config, model: str, prompts: Path) -> str:
    """Hash everything that decides the predictions: the model and its tokenizer, the prompts' content, and the settings."""
    folder = model_copy(model)
    base = adapter_base(folder)
    models = [
        (model_fingerprint(str(place)), tokenizer_fingerprint(str(place)))
        for place in (folder, base)
        if place is not None
    ]
    settings = config.generate.model_dump(mode="json", exclude=_WITHOUT_EFFECT)
    if config.model.quantization:
        settings |= config.model.model_dump(include={"quantization", "quantization_type", "double_quantization"})
    with prompts.open("rb") as file:
        content = hashlib.file_digest(file, "sha256").hexdigest()
    whole = [models, content, settings, config.dtype, config.run.seed if config.generate.do_sample else None]
    return hashlib.sha256(json.dumps(whole, sort_keys=True).encode()).hexdigest()[:16]


class PredictionStore:
    """Files of one output: ``.{name}.partial`` while it grows, then ``output`` and ``.{name}.done``.

    The first line of the partial file and the ``done`` file hold the fingerprint; content with another fingerprint is ignored.
    """

    def __init__(self, output: Path, fingerprint: str) -> None:
        self._output = output
        self._partial = output.with_name(f".{output.name}.partial")
        self._done = output.with_name(f".{output.name}.done")
        self._fingerprint = fingerprint
        self._file: Any = None

    def finished(self) -> dict[str, Any] | None:
        """Return the facts of the call that wrote ``output`` if it is complete and none of its prompts failed, else None."""
        if not (self._output.exists() and self._done.exists()):
            return None
        try:
            facts = json.loads(self._done.read_text(encoding="utf-8"))
        except ValueError:
            return None
        if not isinstance(facts, dict):
            return None
        same = facts.get("fingerprint") == self._fingerprint and facts.get("bytes") == self._output.stat().st_size
        return facts if same and not facts.get("failed") else None

    def open(self) -> dict[str, dict[str, Any]]:
        """Start or continue; returns the entries that exist already, by id."""
        self._output.parent.mkdir(parents=True, exist_ok=True)
        entries = self._read()
        self._file = self._partial.open("a" if entries is not None else "w", encoding="utf-8")
        if entries is None:
            self._write([{"fingerprint": self._fingerprint}])
        return entries or {}

    def append(self, entries: Sequence[dict[str, Any]]) -> None:
        """Add entries (each with an ``id``); once this returns, they survive a crash of the machine."""
        self._write(entries)

    def close(self) -> None:
        """Close the partial file and keep it."""
        if self._file is not None:
            self._file.close()
            self._file = None

    def finish(self, rows: list[dict[str, Any]], facts: dict[str, Any], failed: int = 0) -> None:
        """Write ``output`` atomically, mark it complete, and remove the partial file.

        Args:
            failed: number of entries that the next call retries; the partial file stays for it.
        """
        self.close()
        write_jsonl(self._output, rows)
        size = self._output.stat().st_size
        write_json(self._done, {**facts, "fingerprint": self._fingerprint, "bytes": size, "failed": failed})
        if not failed:
            self._partial.unlink(missing_ok=True)

    def _read(self) -> dict[str, dict[str, Any]] | None:
        """Read the entries of this fingerprint and cut off a torn last line; None if there are none to continue from."""
        if not self._partial.exists():
            return None
        content = self._partial.read_bytes()
        whole = content.rfind(b"\n") + 1
        if whole != len(content):  # or the next entry would be appended to the torn one
            os.truncate(self._partial, whole)
        try:
            header, *entries = list(read_jsonl(self._partial))
            return {entry["id"]: entry for entry in entries} if header["fingerprint"] == self._fingerprint else None
        except (ValueError, TypeError, KeyError):
            return None

    def _write(self, entries: Sequence[dict[str, Any]]) -> None:
        self._file.write("".join(json.dumps(entry, ensure_ascii=False) + "\n" for entry in entries))
        self._file.flush()
        os.fsync(self._file.fileno())
