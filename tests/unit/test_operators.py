"""DeepSpeed's operators, after a process that compiled one was killed."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest

from raysft.train.operators import CPU_ADAM, has_compiler

LOAD = f"from raysft.train.operators import load_operator; load_operator({CPU_ADAM!r})"


@pytest.mark.skipif(not has_compiler(), reason="needs a C++ compiler")
def test_a_compilation_that_was_killed_holds_up_nobody(tmp_path):
    with compiling(tmp_path):
        left = wait_for(lambda: mark(tmp_path))
    assert mark(tmp_path) == left, "a process that is killed leaves its mark"
    with compiling(tmp_path):
        assert wait_for(lambda: mark(tmp_path) not in (None, left)), "the next one makes a mark of its own"


@contextmanager
def compiling(folder: Path) -> Iterator[None]:
    """A process that compiles, killed with its compilers at the end."""
    environment = {**os.environ, "TORCH_EXTENSIONS_DIR": str(folder)}
    process = subprocess.Popen([sys.executable, "-c", LOAD], env=environment)
    try:
        yield
    finally:
        for each in [*psutil.Process(process.pid).children(recursive=True), process]:
            each.kill()  # compilers, too: ninja gives each a process group of its own
        process.wait()


def mark(folder: Path) -> tuple[Path, int] | None:
    """torch's mark of a compilation, and when it was made."""
    return next(((path, path.stat().st_ctime_ns) for path in folder.rglob("cpu_adam/lock")), None)


def wait_for(condition: Callable[[], object], seconds: float = 120) -> object:
    """Return what the condition is, once it is true."""
    deadline = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < deadline, f"waited {seconds} s"
        time.sleep(0.05)
    return found
