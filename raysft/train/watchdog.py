"""Finds workers that hang: each worker watches itself, tells the driver, saves its stacks, and ends when nothing helps.

Ray Train asks an actor's main thread whether it is alive, but training runs in another thread: nobody would notice. When a
worker stops, the others wait for it in a collective, so none of them makes progress; their phases say who is holding up whom.
"""

from __future__ import annotations

import faulthandler
import os
import tempfile
import threading
import time
from collections.abc import Callable
from contextlib import suppress

from raysft.storage.path import StoragePath
from raysft.telemetry.events import WorkerHangs, WorkersAlive
from raysft.train.phases import Phase, Phases

EXIT_CODE = 86
"""Exit code of a worker that ends itself, for Ray's logs."""
LEAST_SECONDS = 120.0
"""Time without progress from which a worker is called stuck, unless ``train.hang_minutes`` is less than twice as long."""
STEPS = 10
"""How many times a step's usual length a worker may take for one before it is called stuck."""
PATIENCE: dict[Phase, int] = {"setup": 4, "export": 4, "generation": 4, "decision": 4}
"""Phases that may take longer, because a model is large or another process computes or decides, and how many times longer."""
ALIVE_SECONDS = 60.0
"""Time between two signs of life to the driver."""

Report = Callable[[WorkerHangs | WorkersAlive], None]


class Watchdog:
    """A thread that watches the phases of this worker; it costs the training nothing."""

    def __init__(
        self,
        phases: Phases,
        rank: int,
        workers: int,
        where: str,
        folder: StoragePath,
        report: Report,
        hang_minutes: float | None,
        end: Callable[[int], None] = os._exit,
    ) -> None:
        """
        Args:
            phases: of this worker.
            rank: of this worker.
            workers: number of all workers.
            where: its host and GPU.
            folder: where stacks are kept (``diagnosis`` of the run directory).
            report: sends to the driver; every worker calls it.
            hang_minutes: ``train.hang_minutes``; None to never end the process.
            end: ends the process.
        """
        self._phases, self._rank, self._workers, self._where = phases, rank, workers, where
        self._folder, self._report = folder, report
        self._hang = 60 * hang_minutes if hang_minutes else None
        self._end = end
        self._told, self._alive = -1.0, time.monotonic()
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._run, name="watchdog", daemon=True)

    def __enter__(self) -> Watchdog:
        # Python's own thread writes the stacks and ends the process if this one cannot run because another holds the lock.
        # A unique name: a killed process leaves its file behind, which may be another user's.
        self._own_stacks = tempfile.NamedTemporaryFile(
            "w", encoding="utf-8", prefix=f"raysft-stacks-{os.getpid()}-", suffix=".txt", delete=False
        )
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._closing.set()
        self._thread.join(10)
        faulthandler.cancel_dump_traceback_later()
        self._own_stacks.close()
        with suppress(OSError):
            os.unlink(self._own_stacks.name)

    def limits(self, phase: Phase) -> tuple[float, float | None]:
        """Return the seconds without progress after which a worker is called stuck, and after which it ends itself."""
        patience = PATIENCE.get(phase, 1)
        stuck = patience * max(LEAST_SECONDS, STEPS * self._phases.longest_step)
        if self._hang is None:
            return stuck, None
        return min(stuck, patience * self._hang / 2), patience * max(self._hang, STEPS * self._phases.longest_step)

    def _run(self) -> None:
        every = min(5.0, self._hang / 20) if self._hang else 5.0
        while not self._closing.wait(every):
            self._look()

    def _look(self) -> None:
        phase, progressed, idle = self._phases.phase, self._phases.progressed, self._phases.idle()
        stuck, end = self.limits(phase)
        if end is not None:
            later = min(end + LEAST_SECONDS, threading.TIMEOUT_MAX)
            faulthandler.dump_traceback_later(later, exit=True, file=self._own_stacks)
        if self._rank == 0 and time.monotonic() - self._alive > ALIVE_SECONDS:
            self._alive = time.monotonic()
            self._report(WorkersAlive(self._phases.step, phase))
        if idle < stuck:
            return
        ends = end is not None and idle >= end
        if progressed != self._told or ends:
            self._told = progressed
            stacks = ""
            with suppress(OSError):  # a full disk must not keep a worker from ending
                stacks = self._keep_stacks(phase, idle)
            step = self._phases.step
            self._report(WorkerHangs(self._rank, self._workers, self._where, step, phase, round(idle), stacks, ends))
        if ends:
            self._end(EXIT_CODE)

    def _keep_stacks(self, phase: Phase, idle: float) -> str:
        """Write the stacks of all threads into the run directory; returns the file's name, empty if that failed."""
        with tempfile.TemporaryFile("w+", encoding="utf-8") as file:
            print(
                f"worker {self._rank} ({self._where}), step {self._phases.step}: no progress in {phase} for {idle:.0f} s\n",
                file=file,
            )
            file.flush()
            faulthandler.dump_traceback(file)
            file.seek(0)
            text = file.read()
        place = self._folder / f"worker-{self._rank}-step-{self._phases.step}.txt"
        written = threading.Event()

        def write() -> None:
            with suppress(Exception):
                if place.local:
                    place.local.parent.mkdir(parents=True, exist_ok=True)
                place.write_bytes(text.encode())
                written.set()

        # The storage may be what hangs.
        thread = threading.Thread(target=write, daemon=True)
        thread.start()
        thread.join(30)
        return place.name if written.is_set() else ""
