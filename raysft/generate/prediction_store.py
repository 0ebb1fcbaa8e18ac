"""Store predictions on disk as they arrive, so that a restarted call generates only what is missing."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from raysft.config import Config
from raysft.models.adapter_files import adapter_base
from raysft.models.fingerprint import model_fingerprint, tokenizer_fingerprint
from raysft.storage.json_files import write_json, write_jsonl
from raysft.storage.local_cache import model_copy
from raysft.storage.path import StoragePath

_WITHOUT_EFFECT = {
    "enabled", "every_steps", "model", "sources", "compare_base", "num_actors", "gpus_per_engine", "max_examples", "batching",
    "batch_size", "metrics",
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
    with prompts.open("rb") as file:
        content = hashlib.file_digest(file, "sha256").hexdigest()
    return _hashed([models, content, *_settings(config)])


def prediction_identity(config: Config, prompts: Sequence[str]) -> str:
    """Hash what decides the predictions of a training besides its model: the prompts, by the keys of their sets, and settings."""
    return _hashed([*prompts, config.generate.max_examples, *_settings(config)])


def _settings(config: Config) -> list[Any]:
    """The settings that decide what a model predicts."""
    settings = config.generate.model_dump(mode="json", exclude=_WITHOUT_EFFECT)
    if config.model.quantization:
        settings |= config.model.model_dump(include={"quantization", "quantization_type", "double_quantization"})
    return [settings, config.dtype, config.run.seed if config.generate.do_sample else None]


def _hashed(content: list[Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]


class Stored(NamedTuple):
    """An entry in the partial file, which is read again when the output is written."""

    id: str
    place: int
    """Where its line begins."""
    error: str
    cut: bool
    """True if the prompt lost its beginning."""

    @classmethod
    def of(cls, entry: dict[str, Any], place: int) -> Stored:
        return cls(entry["id"], place, entry.get("error") or "", bool(entry.get("cut")))


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
        self._written: Any = None

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

    def take_over(self, others: Iterable[Path]) -> dict[str, Any] | None:
        """Copy another complete output with the same fingerprint, if there is one; returns its facts."""
        for other in others:
            store = PredictionStore(other, self._fingerprint)
            if facts := store.finished():
                self._done.unlink(missing_ok=True)
                StoragePath.of(self._output).upload(other)
                StoragePath.of(self._done).upload(store._done)
                return facts
        return None

    def open(self) -> list[Stored]:
        """Start or continue; returns the entries that exist already, in the order in which they came."""
        self._output.parent.mkdir(parents=True, exist_ok=True)
        entries = self._stored()
        self._file = self._partial.open("ab" if entries is not None else "wb")
        if entries is None:
            self._write([{"fingerprint": self._fingerprint}])
        self._written = self._partial.open("rb")
        return entries or []

    def append(self, entries: Sequence[dict[str, Any]]) -> list[Stored]:
        """Add entries (each with an ``id``); once this returns, they survive a crash of the machine."""
        places = self._write(entries)
        return [Stored.of(entry, place) for entry, place in zip(entries, places, strict=True)]

    def entry(self, place: int) -> dict[str, Any]:
        """Read an entry again."""
        self._written.seek(place)
        return json.loads(self._written.readline())

    def close(self) -> None:
        """Close the partial file and keep it."""
        for file in (self._file, self._written):
            if file is not None:
                file.close()
        self._file = self._written = None

    def finish(self, rows: Iterable[dict[str, Any]], facts: dict[str, Any], failed: int = 0) -> None:
        """Write ``output`` atomically, mark it complete, and remove the partial file.

        Args:
            rows: the output, line by line; they may be made of what ``entry`` reads.
            facts: about the call.
            failed: number of entries that the next call retries; the partial file stays for it.
        """
        write_jsonl(self._output, rows)
        self.close()
        size = self._output.stat().st_size
        write_json(self._done, {**facts, "fingerprint": self._fingerprint, "bytes": size, "failed": failed})
        if not failed:
            self._partial.unlink(missing_ok=True)

    def _stored(self) -> list[Stored] | None:
        """Find the entries of this fingerprint and cut off a torn last line; None if there are none to continue from."""
        if not self._partial.exists():
            return None
        entries: list[Stored] = []
        place, same = 0, False
        try:
            with self._partial.open("rb") as file:
                for line in file:
                    if not line.endswith(b"\n"):
                        break
                    value = json.loads(line)
                    if place:
                        entries.append(Stored.of(value, place))
                    else:
                        same = value["fingerprint"] == self._fingerprint
                    place += len(line)
        except (ValueError, TypeError, KeyError, AttributeError):
            return None
        if place != self._partial.stat().st_size:  # or the next entry would be appended to the torn one
            os.truncate(self._partial, place)
        return entries if same else None

    def _write(self, entries: Sequence[dict[str, Any]]) -> list[int]:
        """Append lines; returns where each begins."""
        lines = [(json.dumps(entry, ensure_ascii=False) + "\n").encode() for entry in entries]
        places = self._file.tell() + np.cumsum([0, *map(len, lines)])[:-1]
        self._file.write(b"".join(lines))
        self._file.flush()
        os.fsync(self._file.fileno())
        return places.tolist()
