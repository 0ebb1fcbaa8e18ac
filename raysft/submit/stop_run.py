"""Stop a run through its run directory, without access to its cluster."""

from __future__ import annotations

import socket
import time

from raysft.errors import RunFailed
from raysft.run.stop_file import clear_stop_request, request_stop
from raysft.storage.path import StoragePath
from raysft.storage.retry import FIRST_SECONDS, retry_for
from raysft.storage.run_directory import STOP_FILE, RunDirectory
from raysft.submit.run_status import Notify, holder_of, newest_checkpoint

WAIT_SECONDS = 600.0
"""How long a run may take to save its work: a step, and a checkpoint."""
POLL_SECONDS = 2.0
LOOK_SECONDS = 15.0
"""Time between two looks whether the run's process lives."""


def stop_run(place: StoragePath, notify: Notify) -> None:
    """Ask the run in a run directory to save its work and end, wait until it has, and say where it resumes.

    Raises:
        RequestError: it is not a run directory.
        RunFailed: it has not ended in time.
    """
    with retry_for(FIRST_SECONDS, notify):
        holder = holder_of(place, notify)
    if not holder:
        notify(f"{place}: no process is running in it")
        return
    request_stop(place, f"raysft stop on {socket.gethostname()}")
    notify(f"{place}: {holder} was asked to save its work and end; waiting up to {WAIT_SECONDS / 60:.0f} min")
    limit, looked = time.monotonic() + WAIT_SECONDS, time.monotonic()
    with retry_for(FIRST_SECONDS, notify):
        while (place / STOP_FILE).exists():  # who ends removes it
            if time.monotonic() - looked > LOOK_SECONDS:
                looked = time.monotonic()
                if not holder_of(place, lambda line: None):  # it was killed, or had just ended
                    clear_stop_request(place)
                    break
            if time.monotonic() > limit:
                raise RunFailed(
                    f"{place}: has not ended {WAIT_SECONDS:.0f} s after it was asked to; check on {holder}, or end it there"
                )
            time.sleep(POLL_SECONDS)
        checkpoint = newest_checkpoint(RunDirectory.of(place))
    notify(f"{place}: has ended" + (f"; newest checkpoint {checkpoint}" if checkpoint else ""))
