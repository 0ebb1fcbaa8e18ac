"""``trials.jsonl``: what became of each trial. A sweep that is started again, and pages about it, begin from this file."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from raysft.storage.json_files import read_jsonl

State = Literal["running", "done", "stopped", "failed", "interrupted"]
"""``stopped``: a scheduler ended it; ``interrupted``: the sweep's time was up; it continues when the sweep is restarted."""


@dataclass(frozen=True)
class TrialRecord:
    """One line: a trial, as it was when it changed. Of a trial's lines the last one counts."""

    trial: str
    """Name of the trial and of its run directory."""
    number: int
    """Trials are numbered from 0 in the order of their first start."""
    configuration: str
    """Equal for repeats of the same values."""
    values: dict[str, Any]
    """Value by dotted key."""
    seed: int
    """``run.seed``."""
    state: State = "running"
    """A driver that is killed leaves trials ``running``."""
    step: int | None = None
    """Optimizer steps of the latest results."""
    metrics: dict[str, float] = field(default_factory=dict)
    """Results so far, with the keys of ``all_results.json``."""
    reason: str = ""
    """Why it failed or was interrupted, in one line."""
    started: float = 0.0
    """Seconds since 1970, of the last start."""
    ended: float | None = None
    """Seconds since 1970."""
    parent: dict[str, Any] | None = None
    """Trial and step of the checkpoint that it went on from, if that is another trial's."""

    @property
    def ended_well(self) -> bool:
        """True if the trial needs no further start."""
        return self.state in ("done", "stopped")

    @property
    def seconds(self) -> float | None:
        """Seconds from its last start to its end."""
        return None if self.ended is None else round(self.ended - self.started, 2)


class Record:
    """The file of a sweep, written by one process at a time."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def read(self) -> dict[str, TrialRecord]:
        """Return the last line of each trial, by name, in the order of their numbers."""
        known = set(TrialRecord.__dataclass_fields__)
        last = {line["trial"]: {key: line[key] for key in known & line.keys()} for line in read_jsonl(self._path)}
        return {found.trial: found for found in sorted(map(_record, last.values()), key=lambda found: found.number)}

    def repair(self) -> None:
        """Remove an incomplete last line, which a killed writer leaves: the next line would be appended to it."""
        if self._path.exists() and not (content := self._path.read_bytes()).endswith(b"\n"):
            os.truncate(self._path, content.rfind(b"\n") + 1)

    def append(self, record: TrialRecord) -> TrialRecord:
        """Append a line, in one write, and return it once it is on the disk."""
        line = json.dumps(asdict(record), ensure_ascii=False) + "\n"
        descriptor = os.open(self._path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
        try:
            os.write(descriptor, line.encode("utf-8", errors="backslashreplace"))
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
        return record

    def update(self, record: TrialRecord, **changes: Any) -> TrialRecord:
        """Append a trial's record with some changes."""
        return self.append(replace(record, **changes))


def _record(line: Mapping[str, Any]) -> TrialRecord:
    return TrialRecord(**line)


def numbers(results: Mapping[str, Any], without: frozenset[str]) -> dict[str, float]:
    """Return the numbers among a trial's results, without the keys that Ray Tune adds.

    >>> numbers({"eval_loss": 1.5, "done": True, "pid": 7, "run_name": "a"}, frozenset({"pid"}))
    {'eval_loss': 1.5}
    """
    return {
        key: value
        for key, value in results.items()
        if isinstance(value, int | float) and not isinstance(value, bool) and key not in without
    }
