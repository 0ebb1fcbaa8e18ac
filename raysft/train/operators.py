"""DeepSpeed's C++ operators, which it compiles on each machine when they are first needed."""

from __future__ import annotations

import fcntl
import hashlib
import os
import re
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from raysft.environment import environment
from raysft.errors import RequestError, one_line
from raysft.storage.local_cache import cache_home
from raysft.train.machine import processor

CPU_ADAM = "CPUAdamBuilder"
"""Adam for offloaded optimizer states."""
ASYNC_IO = "AsyncIOBuilder"
"""Files on an NVMe disk."""
WITHOUT_DEBUGGING = "-g0"
"""Without the debug information that DeepSpeed asks for: it takes a third of the compiler's time (90 s of CPU time, not 63 s)."""
COMPILED_TOGETHER = {CPU_ADAM}
"""Operators whose files are compiled as one, with fewer headers: torch's, which every file includes, take most of the time (13
s of CPU time, not 59 s)."""
HEADERS = """\
#pragma once
#include <torch/types.h>
#include <torch/csrc/utils/pybind.h>
"""
"""What they need from ``torch/extension.h``, which includes the whole C++ API: modules, optimizers, data loaders, TorchScript."""
TURN_SECONDS = 500.0
"""How long to wait for a process that is compiling; it takes a minute or two, and the other workers wait 600 s for this one."""


def has_compiler() -> bool:
    """Return True if operators can be compiled here."""
    return any(shutil.which(name) for name in ("c++", "g++", "clang++"))


def load_operator(builder_name: str) -> None:
    """Compile the operator of this DeepSpeed class, or load it if it is compiled; DeepSpeed then finds it in this process.

    torch, which compiles for DeepSpeed, marks a compilation with a file named ``lock``, and waits forever for one left by a
    killed process. So raysft compiles in its own folder, one process at a time, with a lock of the operating system: a process that
    holds that lock and finds such a file knows that its owner is dead.

    Raises:
        RequestError: it cannot be compiled on this machine.
        ImportError: the compiled file is damaged; it is removed, so that the next process compiles again.
    """
    from deepspeed.ops import op_builder

    builder, folder = getattr(op_builder, builder_name)(), _folder(os.environ.get("TORCH_EXTENSIONS_DIR"))
    # A Python that was started by its path may have ninja next to it, but not in PATH.
    path = os.pathsep.join([os.environ.get("PATH", os.defpath), os.path.dirname(sys.executable)])
    flags = builder.cxx_args
    builder.cxx_args = lambda: [*flags(), WITHOUT_DEBUGGING]
    try:
        with _turn(folder, builder.name), environment(TORCH_EXTENSIONS_DIR=str(folder), PATH=path):
            if builder_name in COMPILED_TOGETHER:
                whole, headers, further = _including(builder, folder), _headers(folder), builder.include_paths()
                builder.sources, builder.include_paths = (lambda: [whole]), (lambda: [headers, *further])
            builder.load(verbose=False)
    except ImportError:
        shutil.rmtree(folder / builder.name, ignore_errors=True)
        raise
    except (OSError, RuntimeError, subprocess.SubprocessError) as error:
        raise RequestError(
            f"train.offload: DeepSpeed's {builder.name} cannot be compiled in {folder} on {socket.gethostname()} "
            f"({_reason(error)}); correct that, or set train.offload.optimizer and train.offload.parameters to none"
        ) from error


@contextmanager
def _turn(folder: Path, operator: str) -> Iterator[None]:
    """Wait until no other process is compiling the operator in the folder, and make others wait for the block."""
    folder.mkdir(parents=True, exist_ok=True)
    limit = time.monotonic() + TURN_SECONDS
    with (folder / f".{operator}.turn").open("w") as turn:
        while True:
            try:
                fcntl.flock(turn, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > limit:
                    raise TimeoutError(f"another process has been compiling it for {TURN_SECONDS:.0f} s") from None
                time.sleep(0.2)
        (folder / operator / "lock").unlink(missing_ok=True)
        yield


def _including(builder: Any, folder: Path) -> str:
    """Write a file that includes all files of an operator, and return its path."""
    path = folder / f"{builder.name}.cpp"
    sources = [builder.deepspeed_src_path(source) for source in builder.sources()]
    _write(path, "".join(f'#include "{source}"\n' for source in sources))
    return str(path)


def _headers(folder: Path) -> str:
    """Write the file that stands in for ``torch/extension.h``, and return the folder to search for headers first."""
    _write(folder / "headers" / "torch" / "extension.h", HEADERS)
    return str(folder / "headers")


def _write(path: Path, text: str) -> None:
    """Write a file that the compiler reads, unless it exists: a newer file would be compiled again."""
    if not path.exists() or path.read_text() != text:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


def _folder(given: str | None) -> Path:
    """Where raysft compiles for this CPU, torch, DeepSpeed and Python; under ``TORCH_EXTENSIONS_DIR`` if the user sets it.

    Nodes with different processors may share a home folder, and the operators use every instruction that a processor has. So may
    several environments with the same packages: the paths of their sources differ, and each would recompile what another one
    has compiled.
    """
    from deepspeed import __file__ as package
    from deepspeed import __version__

    root = Path(given) / "raysft" if given else cache_home() / "extensions"
    kind = hashlib.sha256(f"{processor()}\n{Path(package).parent}".encode()).hexdigest()[:8]
    return root / f"torch{torch.__version__}-deepspeed{__version__}-{sys.implementation.cache_tag}-{kind}"


def _reason(error: BaseException) -> str:
    """Return the compiler's own message, which torch puts after its command."""
    text = str(error)
    found = re.search(r"^.*\berror: .*$|^.*No space left.*$", text, re.MULTILINE)
    return one_line(found.group() if found else text)
