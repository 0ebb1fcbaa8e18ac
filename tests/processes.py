"""Processes that tests start, and look for."""

from __future__ import annotations

import multiprocessing
import os
import subprocess
from collections.abc import Callable, Iterator
from contextlib import suppress
from multiprocessing import forkserver
from multiprocessing.process import BaseProcess
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
