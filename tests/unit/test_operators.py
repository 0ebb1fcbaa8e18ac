"""DeepSpeed's operators, where one cannot be compiled, and after a process that compiled one was killed."""

from __future__ import annotations

import fcntl
import os
import re
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil
import pytest

from raysft.environment import environment
from raysft.errors import RequestError
from raysft.train import operators
from raysft.train.operators import CPU_ADAM, has_compiler, load_operator
from tests.processes import forked

COMPILER = """#!/bin/sh
[ "$1" = --version ] || [ "$1" = -dumpfullversion ] && exec c++ "$@"
echo "pybind11.h:1:10: fatal error: Python.h: No such file or directory" >&2
exit 1
"""
"""A compiler on a machine without Python's headers."""


@pytest.mark.skipif(not has_compiler(), reason="needs a C++ compiler")
def test_a_compilation_that_was_killed_holds_up_nobody(tmp_path):
    with compiling(tmp_path):
        left = wait_for(lambda: mark(tmp_path))
    assert mark(tmp_path) == left, "a process that is killed leaves its mark"
    with compiling(tmp_path):
        assert wait_for(lambda: mark(tmp_path) not in (None, left)), "the next one makes a mark of its own"


@pytest.mark.skipif(not has_compiler(), reason="needs a C++ compiler")
def test_what_does_not_compile_is_refused_in_the_words_of_the_compiler(tmp_path, monkeypatch):
    compiler = tmp_path / "c++"
    compiler.write_text(COMPILER)
    compiler.chmod(0o755)
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    monkeypatch.setenv("CXX", str(compiler))
    with pytest.raises(RequestError) as refused:
        load_operator(CPU_ADAM)
    line = str(refused.value)
    assert line.startswith("train.offload: DeepSpeed's cpu_adam cannot be compiled in")
    assert "\n" not in line
    assert "fatal error: Python.h: No such file or directory" in line
    assert line.endswith("set train.offload.optimizer and train.offload.parameters to none")


def test_a_folder_that_cannot_be_written_is_refused(tmp_path, monkeypatch):
    (tmp_path / "raysft").touch()
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    with pytest.raises(RequestError, match=r"cpu_adam cannot be compiled in .*\(\[Errno 20\] Not a directory"):
        load_operator(CPU_ADAM)
    assert os.environ["TORCH_EXTENSIONS_DIR"] == str(tmp_path)


def test_another_process_is_awaited_only_so_long(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    monkeypatch.setattr(operators, "TURN_SECONDS", 0.5)
    monkeypatch.setattr(builder(), "load", lambda self, verbose: None)
    load_operator(CPU_ADAM)
    with next(tmp_path.rglob(".cpu_adam.turn")).open("w") as turn:
        fcntl.flock(turn, fcntl.LOCK_EX)
        with pytest.raises(RequestError, match="another process has been compiling"):
            load_operator(CPU_ADAM)
    load_operator(CPU_ADAM)


def test_a_damaged_operator_is_removed_so_that_the_next_process_compiles(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))

    def load(self: object, verbose: bool) -> None:
        file = Path(os.environ["TORCH_EXTENSIONS_DIR"], "cpu_adam", "cpu_adam.so")
        file.parent.mkdir()
        file.touch()
        raise ImportError(f"{file}: file too short")

    monkeypatch.setattr(builder(), "load", load)
    with pytest.raises(ImportError, match="too short"):
        load_operator(CPU_ADAM)
    assert not list(tmp_path.rglob("cpu_adam"))


def test_ninja_is_found_beside_a_python_that_was_started_by_its_path(tmp_path, monkeypatch):
    found = []
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(builder(), "load", lambda self, verbose: found.append(shutil.which("ninja")))
    load_operator(CPU_ADAM)
    assert found == [os.path.join(os.path.dirname(sys.executable), "ninja")]
    assert os.environ["PATH"] == str(tmp_path)


def test_what_debuggers_need_is_not_compiled(tmp_path, monkeypatch):
    flags: list[str] = []
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    monkeypatch.setattr(builder(), "load", lambda self, verbose: flags.extend(self.cxx_args()))
    load_operator(CPU_ADAM)
    assert [flag for flag in flags if flag.startswith("-g")][-1] == "-g0"
    assert "-O3" in flags


def test_all_files_of_adam_are_compiled_as_one(tmp_path, monkeypatch):
    files: list[str] = []
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    monkeypatch.setattr(builder(), "load", lambda self, verbose: files.extend(self.sources()))
    own = [builder()().deepspeed_src_path(source) for source in builder()().sources()]
    load_operator(CPU_ADAM)
    (whole,) = files
    assert re.findall(r'#include "(.*)"', Path(whole).read_text()) == own
    assert all(Path(source).is_file() for source in own)
    os.utime(whole, (1, 1))
    load_operator(CPU_ADAM)
    assert Path(whole).stat().st_mtime == 1, "it would be compiled again"


def test_each_environment_has_a_folder_of_its_own(tmp_path, monkeypatch):
    """Both compile from their own files, whose paths are a part of what is compiled."""
    import deepspeed

    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    monkeypatch.setattr(builder(), "load", lambda self, verbose: None)
    for _ in range(2):
        load_operator(CPU_ADAM)
    (own,) = tmp_path.rglob("cpu_adam.cpp")
    monkeypatch.setattr(deepspeed, "__file__", str(tmp_path / "other" / "deepspeed" / "__init__.py"))
    load_operator(CPU_ADAM)
    assert {own} < set(tmp_path.rglob("cpu_adam.cpp"))


def test_torchs_modules_and_optimizers_are_not_compiled_in(tmp_path, monkeypatch):
    searched: list[str] = []
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    monkeypatch.setattr(builder(), "load", lambda self, verbose: searched.extend(self.include_paths()))
    own = builder()().include_paths()
    load_operator(CPU_ADAM)
    assert searched[1:] == own
    header = Path(searched[0], "torch", "extension.h")
    assert "all.h" not in header.read_text()
    os.utime(header, (1, 1))
    load_operator(CPU_ADAM)
    assert header.stat().st_mtime == 1, "all would be compiled again"


def builder() -> type:
    """DeepSpeed's class for the operator."""
    from deepspeed.ops import op_builder

    return getattr(op_builder, CPU_ADAM)


@contextmanager
def compiling(folder: Path) -> Iterator[None]:
    """A process that compiles, killed with its compilers at the end."""
    with environment(TORCH_EXTENSIONS_DIR=str(folder)):
        process = forked(load_operator, CPU_ADAM)
        process.start()
    try:
        yield
    finally:
        compilers = psutil.Process(process.pid).children(recursive=True)  # ninja gives each a process group of its own
        process.kill()  # first, as it would clean up after compilers that fail
        process.join()
        for compiler in compilers:
            with suppress(psutil.NoSuchProcess):
                compiler.kill()


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
