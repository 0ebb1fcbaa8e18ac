"""Checkpoints are written while training continues. A storage that fails costs a checkpoint, never the training."""

from __future__ import annotations

import errno
import threading
import time
import uuid
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from typing import Any

import torch.distributed as dist

from raysft.errors import StorageFailed
from raysft.storage.path import StoragePath
from raysft.storage.retry import reason_of, retry_for
from raysft.telemetry.events import CheckpointFailed, CheckpointSaved, Emit, Waiting
from raysft.train.checkpoint import catalog, parts, state
from raysft.train.checkpoint.cursor import Cursor
from raysft.train.checkpoint.parts import Snapshot

SAVE_SECONDS = 1800
"""How long the end of training waits for the last checkpoint."""
STALL_SECONDS = 300
"""How long training waits for the previous checkpoint; well below the timeout of other workers in a collective."""


class AsyncWriter:
    """Write one worker's part of each checkpoint in a thread, one at a time. All workers create their writers together."""

    def __init__(self, checkpoints: StoragePath, keep: int | None, emit: Emit) -> None:
        """
        Args:
            checkpoints: the folder of them all.
            keep: how many complete ones stay, as for ``catalog.prune``.
            emit: receives ``CheckpointSaved``, ``CheckpointFailed`` and ``Waiting``.
        """
        self._checkpoints, self._keep, self._emit = checkpoints, keep, emit
        self._rank, self._failing = dist.get_rank(), threading.Event()
        attempt = [uuid.uuid4().hex[:8]]
        dist.broadcast_object_list(attempt, src=0)
        self._attempt = attempt[0]
        """Part of the folders' names, the same on all workers."""
        self._thread: threading.Thread | None = None
        self._step = 0
        """Of the one that is being written."""
        self._owed: Callable[[], Snapshot] | None = None
        """Makes the newest one, where it is not written."""

    def __call__(self, engine: Any, cursor: Cursor, log: list[dict[str, Any]]) -> None:
        """Copy this worker's part, and write it while training continues."""
        self._owed = partial(state.snapshot, engine, cursor, log)
        # A second copy of the state would double its memory: wait for a slow storage, but not for one that fails.
        if self._wait(STALL_SECONDS, while_failing=False):
            self._start()
        else:
            self._unsaved(cursor.step, f"that after step {self._step} is still being written", skipped=True)

    def close(self) -> None:
        """Wait for the last checkpoint. The state no longer changes, so one that is still owed can be copied now."""
        done = self._wait(SAVE_SECONDS)
        if done and self._owed:
            self._start()
            done = self._wait(SAVE_SECONDS)
        if not done:
            self._unsaved(self._step, f"its storage did not finish the write within {SAVE_SECONDS} s")

    def _start(self) -> None:
        assert self._owed
        part, self._owed = self._owed(), None
        self._step = part.cursor.step
        self._failing.clear()
        self._thread = threading.Thread(target=self._write, args=(part,), name="checkpoint", daemon=True)
        self._thread.start()

    def _wait(self, seconds: float, while_failing: bool = True) -> bool:
        """Wait until the previous checkpoint is written or given up; return True if it is."""
        limit = time.monotonic() + seconds
        while self._thread is not None and self._thread.is_alive():
            if time.monotonic() > limit or (self._failing.is_set() and not while_failing):
                return False
            self._thread.join(0.2)
        return True

    def _write(self, part: Snapshot) -> None:
        folder = self._checkpoints / catalog.folder_name(part.cursor.step, self._attempt)
        try:
            with retry_for(notify=self._say):
                parts.write(part, folder)
        except Exception as error:
            self._unsaved(part.cursor.step, _reason(error))
            with suppress(Exception), retry_for(0):
                parts.remove_part(part, folder)
            return
        if self._rank == 0:
            self._emit(CheckpointSaved(part.cursor.step, part.cursor.rows))
            # What cannot be removed now is removed after the next checkpoint.
            with suppress(Exception), retry_for(0):
                catalog.prune(self._checkpoints, self._keep)

    def _unsaved(self, step: int, reason: str, skipped: bool = False) -> None:
        self._emit(CheckpointFailed(step, reason, skipped))

    def _say(self, line: str) -> None:
        self._failing.set()
        self._emit(Waiting(line))


def _reason(error: Exception) -> str:
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return f"{reason_of(error)}; free some, or lower train.keep_last"
    return str(error) if isinstance(error, StorageFailed) else f"{type(error).__name__}: {reason_of(error)}"
