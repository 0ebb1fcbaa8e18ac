"""Processes that tests start, and look for."""

from __future__ import annotations

import multiprocessing
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from multiprocessing import forkserver
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any
from unittest.mock import patch

import psutil

ENVIRONMENT = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
"""What every fork begins with, whichever test asks for the first one; with a GPU, DeepSpeed would choose it."""


def forks() -> Any:
    """How to start processes that are forks of one, which all tests of a pytest process share.

    It has the imports, which take six seconds of CPU time, and has run nothing; ``prepared_forks.py`` says which.
    """
    context: Any = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.prepared_forks"])
    with patch.dict(os.environ, ENVIRONMENT, clear=True):
        forkserver.ensure_running()
    return context


def forked(function: Callable[..., object], *arguments: object) -> BaseProcess:
    """A fork, to be started, that calls a function in this process's environment."""
    return forks().Process(target=_in_environment, args=(dict(os.environ), function, arguments))


def command(arguments: Sequence[str], folder: Path, output: Path, environment: Mapping[str, str]) -> BaseProcess:
    """A fork, to be started, that runs ``raysft``: a new process would import for six seconds.

    Args:
        arguments: of the command.
        folder: in which it works.
        output: file for what it prints.
        environment: its variables.
    """
    return forks().Process(target=_in_environment, args=(dict(environment), _command, (arguments, folder, output)))


def _command(arguments: Sequence[str], folder: Path, output: Path) -> None:
    from raysft.cli import main

    os.chdir(folder)
    with output.open("wb") as file:
        for stream in (1, 2):
            os.dup2(file.fileno(), stream)
    sys.exit(main(arguments))


def _in_environment(
    environment: dict[str, str], function: Callable[..., object], arguments: tuple[object, ...]
) -> None:
    os.environ.clear()
    os.environ.update(environment)
    function(*arguments)


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
