"""The file that asks a run to stop: whoever can write to its run directory needs no access to its cluster."""

from __future__ import annotations

from contextlib import suppress

from raysft.errors import RequestError, StorageFailed, one_line
from raysft.storage.path import StoragePath
from raysft.storage.retry import FIRST_SECONDS, retry_for
from raysft.storage.run_directory import STOP_FILE

SIGNS = ("config.yaml", ".lock")
"""A run directory has one of these; the config is written once the data is prepared."""


def request_stop(run: StoragePath, reason: str) -> None:
    """Ask the run in a run directory to save its work and end; the run looks for this file every few seconds.

    A run that has not started yet ends as soon as it starts. It removes the file, so that the same command continues afterwards.

    Args:
        run: the run directory.
        reason: why, for the run's messages.

    Raises:
        RequestError: it is not a run directory, or cannot be written.
    """
    try:
        with retry_for(FIRST_SECONDS):
            if not any((run / sign).exists() for sign in SIGNS):
                raise RequestError(
                    f"{run}: contains no config.yaml; give a run directory, {{run.storage}}/{{run.name}}"
                )
            (run / STOP_FILE).write_text(f"{reason}\n")
    except (OSError, StorageFailed) as error:
        raise RequestError(
            f"{run / STOP_FILE}: cannot be written ({one_line(error)}); check the path and its credentials"
        ) from None


def stop_requested(run: StoragePath) -> str:
    """Return why the run should stop; empty if it should not, or if the storage does not respond."""
    try:
        with retry_for(0):
            file = run / STOP_FILE
            if not file.exists():
                return ""
            content = file.read_text()
    except (OSError, StorageFailed, UnicodeDecodeError):
        return ""
    return one_line(content) if content.strip() else f"the file {file}"


def clear_stop_request(run: StoragePath) -> None:
    """Remove the file; otherwise the next command would end at once."""
    with suppress(OSError, StorageFailed), retry_for(FIRST_SECONDS):
        (run / STOP_FILE).remove()
