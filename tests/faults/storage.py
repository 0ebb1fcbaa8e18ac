"""Storage that fails: a real S3 server that answers with errors or never, a machine lost with its disk, a full disk."""

from __future__ import annotations

import random
import shutil
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from raysft.storage.path import StoragePath
from tests.faults.nodes import once
from tests.faults.runs import Moment, Outcome, attempt, compared, said, steps_of
from tests.objects import Server, s3_server


@contextmanager
def away(folder: Path) -> Iterator[tuple[Server, tuple[str, str]]]:
    """An S3 server, and the settings of a run that is kept there."""
    with s3_server() as server:
        cache = f"data.cache={folder / 'runs' / 'cache'}"
        yield server, (f"run.storage='{server.uri('runs')}'", cache)


def fetched(server: Server, folder: Path, name: str) -> None:
    """Bring a run from the server to where the others are."""
    run = StoragePath.of(server.uri(f"runs/{name}"))
    for file in run.walk():
        if not file.startswith("checkpoints/"):
            (run / file).download(folder / "runs" / name / file)


Fault = Callable[[Path, str, str, random.Random], Outcome]
"""(folder, name of the training that was left alone, what the fault is called, draws) → what became of it."""


def copies(run: Path) -> Path:
    """Where the command works on the small files of a run that is kept elsewhere."""
    return next((run.parent.parent / "home/.cache/raysft/runs").glob(f"*/{run.name}"), run)


def failing(status: int, late: float = 0.0) -> Fault:
    """A fault: whatever concerns checkpoints fails for 15 seconds from the first one on."""

    def fault(folder: Path, reference: str, fault: str, draw: random.Random) -> Outcome:
        name = fault.replace(" ", "-")
        with away(folder) as (server, settings):
            # Hidden files and logs too: nothing of the run is taken or given.
            server.fails(r"/runs/.*checkpoint_0000000[3-9]", 15, status, late)
            code = attempt(folder, name, None, *settings, home=folder / "home")
            refused = server.refused
            fetched(server, folder, name)
        outcome = compared(folder, reference, name, fault, 1, code)
        outcome.survived &= refused > 0
        return outcome

    return fault


def loses_its_machine(folder: Path, reference: str, fault: str, draw: random.Random) -> Outcome:
    """The process is killed while a checkpoint is on its way, and its disk is gone; another machine goes on."""
    name = "machine"

    def moment(run: Path, seconds: float) -> bool:
        return len(steps_of(copies(run))) >= 7

    with away(folder) as (server, settings):
        server.fails("checkpoint_00000006", 600)
        code = attempt(folder, name, moment, *settings, home=folder / "home")
        assert code is None, said(folder, name)
        server.heals()
        shutil.rmtree(folder / "home")
        code = attempt(folder, name, None, *settings, home=folder / "home")
        fetched(server, folder, name)
    return compared(folder, reference, name, fault, 1, code)


def is_full(folder: Path, reference: str, fault: str, draw: random.Random) -> Outcome:
    """The disk that holds the run is full from some step on: the command ends with one line, and goes on when there is room."""
    name, small = "full", folder / "small"
    small.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64m", "tmpfs", str(small)], check=True)
    try:

        def fill() -> None:
            with suppress(OSError), (small / "ballast").open("wb", buffering=0) as ballast:
                while True:
                    ballast.write(bytes(4096))

        moment: Moment = once(lambda run, seconds: len(steps_of(small / name)) >= 6, fill)
        settings = (f"run.storage={small}", f"data.cache={folder / 'runs' / 'cache'}")
        first = attempt(folder, name, moment, *settings)
        told = said(folder, name).splitlines()[-1]
        (small / "ballast").unlink(missing_ok=True)
        code = attempt(folder, name, None, *settings)
        shutil.copytree(small / name, folder / "runs" / name, dirs_exist_ok=True)
    finally:
        subprocess.run(["umount", str(small)], check=True)
    outcome = compared(folder, reference, name, fault, 1, code)
    outcome.survived &= first == 1 and "No space left" in told
    return outcome
