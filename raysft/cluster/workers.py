"""Start Ray's workers as forks of one process that has imported what they need.

The imports of a training worker (torch, transformers, peft, DeepSpeed, Ray) take six seconds of CPU time, a run has ten
processes, and a laptop has few cores. So one more process, the server, imports them once, while the driver imports, reads the
config and starts the cluster: a short run's first step comes in half the time.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from typing import Any

from raysft.cluster.forkserver import ADDRESS, COMMAND, FILE, NO_GPUS, TRIALS
from raysft.cluster.ray_internals import setup_worker


class ForkServer:
    """The server, as its driver sees it."""

    def __init__(self, trials: bool = False) -> None:
        # Only this user can open the folder; the server removes it.
        folder = tempfile.mkdtemp(prefix="raysft-fork-")
        self.address = os.path.join(folder, "socket")
        with contextlib.ExitStack() as stack:
            stack.callback(shutil.rmtree, folder, ignore_errors=True)
            listening = stack.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_STREAM))
            listening.bind(self.address)  # fails if TMPDIR is long
            listening.listen(64)
            # DeepSpeed looks for a GPU when it is imported: there is none to see. And threads of forks would take over the memory
            # pools of this process's threads, which glibc sets up differently.
            own = {**NO_GPUS, "MALLOC_ARENA_MAX": "1"}
            self._process = subprocess.Popen(
                [sys.executable, FILE, str(listening.fileno()), self.address, *(TRIALS if trials else ())],
                env={**os.environ, **own},
                stdin=subprocess.PIPE,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                pass_fds=[listening.fileno()],
                start_new_session=True,  # Ctrl-C is for the driver
            )
            listening.close()
            stack.pop_all()

    def stop(self) -> None:
        """End the server; its forks continue."""
        self._process.kill()
        self._process.wait()
        shutil.rmtree(os.path.dirname(self.address), ignore_errors=True)


_running: list[ForkServer] = []
"""The server of this process, if it has one."""


def start(use_gpu: bool, trials: bool = False) -> None:
    """Start the server, unless it runs already or cannot be.

    Args:
        trials: True if some workers are whole runs.
        use_gpu: True if the workers use GPUs. No server starts for them: an import may initialize CUDA (torchao does, and
            transformers imports it if it is installed), and CUDA cannot be used in a fork of such a process.
    """
    # Forks of a process with threads are unsafe elsewhere.
    if not (_running or use_gpu) and sys.platform == "linux":
        with contextlib.suppress(OSError):
            _running.append(ForkServer(trials))


def are_forks() -> bool:
    """Return True if Ray's workers are forks of a server: that of this process, or one that this process is a fork of."""
    return bool(_running) or ADDRESS in os.environ


def stop() -> None:
    """End the server, if it runs."""
    while _running:
        _running.pop().stop()


@contextlib.contextmanager
def forked_workers(joins: bool) -> Iterator[dict[str, Any]]:
    """Make ``ray.init`` in this block start its workers as forks of the server, if it runs; yield options for it.

    Args:
        joins: True to join a cluster, whose only node is this one; False to start one.
    """
    if not _running:
        yield {}
    elif joins:
        variables = {ADDRESS: _running[0].address}
        yield {"runtime_env": {"py_executable": COMMAND, "env_vars": variables}}
    else:
        os.environ[ADDRESS] = _running[0].address  # the raylet inherits it, and the workers from the raylet
        try:
            with setup_worker(FILE):
                yield {}
        finally:
            del os.environ[ADDRESS]
