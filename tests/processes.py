"""Processes that tests look for."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from contextlib import suppress

import psutil


def children_named(text: str) -> Iterator[psutil.Process]:
    """Yield the living processes below this one that have a text in their name or command line."""
    for process in psutil.Process().children(recursive=True):
        with suppress(psutil.Error):  # it has ended, though nobody may have reaped it
            if text in " ".join([process.name(), *process.cmdline()]):
                yield process


def kill_all(process: subprocess.Popen) -> None:
    """Kill a process and all that it has started at once, as if its machine were gone."""
    everything = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
    for one in everything:
        with suppress(psutil.NoSuchProcess):
            one.kill()
    process.wait()
