"""Follow a run through the files in its run directory, without access to its cluster."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from raysft.errors import RunFailed
from raysft.report.read_run import read_lines
from raysft.storage.path import StoragePath
from raysft.storage.retry import retry_for
from raysft.storage.sync import open_read_only
from raysft.submit.following import INTERRUPTED, Lost
from raysft.submit.run_status import holder_of, state_of
from raysft.telemetry.train_log import progress_line

POLL_SECONDS, REMOTE_POLL_SECONDS = 2.0, 15.0
"""Time between two looks at the log, on a filesystem and in an object store."""
HOLDER_SECONDS = 30.0
"""Time between two looks whether a process works in the run directory."""
GONE_SECONDS = 600.0
"""How long there may be none: a job that is started again on a new cluster needs minutes."""
LOG = "trainer_log.jsonl"

Notify = Callable[[str], None]


def go_on_from_files(place: StoragePath | None, lost: Lost, shown: str, notify: Notify) -> int:
    """Follow the run of a job through its files, after its cluster was lost.

    Args:
        place: its run directory. Default: what the cluster has told.
        lost: why it cannot be followed otherwise.
        shown: the end of what was shown of its output.
        notify: receives the lines.

    Returns:
        The exit code: 0 if the run is done.

    Raises:
        Lost: this machine does not see the run directory.
        RunFailed: the run has ended before its end.
    """
    place = place or _told(lost)
    if place is None or not _is_visible(place):
        raise lost
    notify(str(lost))
    notify(f"continuing with {place / LOG}, which has its steps and evaluations, but no other output")
    try:
        return _Progress(place, shown, notify).to_end()
    except KeyboardInterrupt:
        notify(f"\n{place}: is still running; check on it with: raysft status {place}")
        return INTERRUPTED


def _told(lost: Lost) -> StoragePath | None:
    try:
        return StoragePath.of(lost.run_directory) if lost.run_directory else None
    except ValueError:
        return None


def _is_visible(place: StoragePath) -> bool:
    try:
        with retry_for(0):
            return (place / "config.yaml").exists()
    except Exception:  # no such storage, no right, no answer
        return False


class _Progress:
    """Shows each record of a training log once, as the run itself prints it."""

    def __init__(self, place: StoragePath, shown: str, notify: Notify) -> None:
        self._place, self._shown, self._notify = place, shown, notify
        self._records: list[dict[str, Any]] | None = None
        """Those that were shown; None before the first look."""

    def to_end(self) -> int:
        """Show records until nobody works in the run directory."""
        looked, alone_since = float("-inf"), None
        while True:
            self.look()
            now = time.monotonic()
            if now - looked > HOLDER_SECONDS:
                with retry_for(notify=self._notify):
                    holder = holder_of(self._place, lambda line: None)
                looked = time.monotonic()
                alone_since = None if holder else now if alone_since is None else alone_since
                if not holder and self._is_done():
                    self.look()
                    self._notify(f"{self._place}: is done")
                    return 0
                if alone_since is not None and now - alone_since > GONE_SECONDS:
                    raise RunFailed(
                        f"{self._place}: is not done, and no process has worked in it for {GONE_SECONDS / 60:.0f} minutes; submit "
                        "it again, and it resumes from its newest checkpoint"
                    )
            time.sleep(POLL_SECONDS if self._place.local else REMOTE_POLL_SECONDS)

    def look(self) -> None:
        """Show what is new."""
        with open_read_only(self._place, self._notify, only={LOG}) as directory:
            records = list(read_lines(directory.trainer_log))
        known = self._records
        first = self._after_shown(records) if known is None else _equal_at_start(known, records)
        if known is not None and first < len(known):
            step = records[first - 1]["current_steps"] if first else 0
            self._notify(f"{self._place}: went back to step {step}, that of its checkpoint")
        for record in records[first:]:
            self._notify(progress_line(record))
        self._records = records

    def _after_shown(self, records: list[dict[str, Any]]) -> int:
        """Index of the first record after those that the run's own output had; at least the last one is shown."""
        lines = set(self._shown.splitlines())
        for index in range(len(records) - 1, -1, -1):
            if progress_line(records[index]) in lines:
                return index + 1
        return max(0, len(records) - 1)

    def _is_done(self) -> bool:
        with open_read_only(self._place, self._notify) as directory:
            return state_of(directory) == "done"


def _equal_at_start(before: list[dict[str, Any]], now: list[dict[str, Any]]) -> int:
    """Number of records at the beginning that are equal in both: a run that resumes cuts its log off at the checkpoint.

    >>> _equal_at_start([{"step": 1}, {"step": 2}], [{"step": 1}, {"step": 2}, {"step": 3}])
    2
    """
    for index, (one, other) in enumerate(zip(before, now, strict=False)):
        if one != other:
            return index
    return min(len(before), len(now))
