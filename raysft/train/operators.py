"""DeepSpeed's operators in C++, which it compiles on a machine where they are first needed."""

from __future__ import annotations

import fcntl
import os
import shutil
import sys
from pathlib import Path

import torch

from raysft.storage.local_cache import cache_home

CPU_ADAM = "CPUAdamBuilder"
"""Adam for optimizer states that are offloaded."""
ASYNC_IO = "AsyncIOBuilder"
"""Files on an NVMe disk."""


def has_compiler() -> bool:
    """Return True if operators can be compiled here."""
    return any(shutil.which(name) for name in ("c++", "g++", "clang++"))


def load_operator(builder_name: str) -> None:
    """Compile the operator of this class of DeepSpeed's, or load it if it is compiled; DeepSpeed then finds it in this process.

    torch, which compiles for DeepSpeed, marks a compilation by a file named ``lock``, and waits without end for one that a killed
    process has left. So raysft compiles in a folder of its own and one process at a time, which the operating system watches over:
    whoever has its turn and finds such a mark knows that its owner is dead.
    """
    from deepspeed.ops import op_builder

    builder = getattr(op_builder, builder_name)()
    given = os.environ.get("TORCH_EXTENSIONS_DIR")
    folder = _folder(given)
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / f".{builder.name}.turn").open("w") as turn:
        fcntl.flock(turn, fcntl.LOCK_EX)
        (folder / builder.name / "lock").unlink(missing_ok=True)
        os.environ["TORCH_EXTENSIONS_DIR"] = str(folder)
        try:
            builder.load(verbose=False)
        finally:
            if given is None:
                del os.environ["TORCH_EXTENSIONS_DIR"]
            else:
                os.environ["TORCH_EXTENSIONS_DIR"] = given


def _folder(given: str | None) -> Path:
    """Where raysft compiles for this torch and this Python, below ``TORCH_EXTENSIONS_DIR`` if the user sets it."""
    root = Path(given) / "raysft" if given else cache_home() / "extensions"
    return root / f"torch{torch.__version__}-{sys.implementation.cache_tag}"
