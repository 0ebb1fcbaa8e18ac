"""A process that forks Ray's workers, and the file that Ray starts in place of a worker.

The file hands its arguments, environment and outputs to the server, which has imported what workers need and forks, and lives as
long as the fork does. If no server answers, it becomes the worker that Ray would have started. ``workers.py`` starts the server.

Ray's core reads its settings from the environment when it is loaded, and the id of its raylet, so the server imports it for the
first request, and forks for that raylet only. Its forks are of no job until they get their first task, as workers are that Ray
starts in advance. The server sees no GPU: CUDA does not work in a fork of a process that has asked for one. The server ends with
the driver.
"""

from __future__ import annotations

import atexit
import contextlib
import json
import os
import select
import shlex
import socket
import struct
import sys
import weakref
from collections.abc import Sequence
from typing import Any

FILE = os.path.abspath(__file__)
COMMAND = shlex.join([sys.executable, "-S", "-E", FILE])
"""What workers of a cluster that is joined are started with."""
ADDRESS = "RAYSFT_FORKSERVER"
"""Environment variable with the path of the server's socket."""
LIBRARIES = (
    "raysft.train.imported_code",
    "torch",
    "transformers",
    "peft",
    "raysft.train.deepspeed_import",
    "deepspeed.module_inject.auto_ep_layer",
    "transformers.optimization",
    "pandas",
    "pyarrow.dataset",
    "pyarrow.parquet",
)
"""What workers import, without Ray. The first one reads which code is on disk."""
TRIALS = (
    "raysft.report.card",
    "raysft.report.page",
    "raysft.report.summary",
    "torch.utils.tensorboard.writer",
    "evaluate",
    "nltk.translate.bleu_score",
)
"""What trials of a sweep import besides, as each is a whole run, without Ray."""
MODULES = (
    "ray.data",
    "ray.train",
    "raysft.data.prepare",
    "raysft.train.launch",
    "raysft.train.engine",
    "raysft.generate.ray_pipeline",
    "raysft.generate.engine_actor",
    "raysft.generate.engines.static",
)
"""What workers import that imports Ray."""
ANSWER_SECONDS = 40.0
"""Longer than the imports take on a busy machine. Ray waits for a worker for 60."""
POLL_SECONDS = 1.0
RAYLET, JOB = "RAY_RAYLET_PID", "RAY_JOB_ID"
NO_JOB = "ffffffff"
NO_GPUS = {"CUDA_VISIBLE_DEVICES": ""}
LANGUAGE, CONTEXT = "--language=", "--serialized-runtime-env-context="
"""Arguments that Ray's ``setup_worker.py`` takes, besides those of the worker."""


def _serve(listening: socket.socket, more: Sequence[str]) -> tuple[socket.socket, Request] | None:
    """Import, then fork for each request until the driver has ended.

    Args:
        listening: where requests come.
        more: libraries to import besides ``LIBRARIES``.

    Returns:
        In a fork, the connection that shows that it is alive, and what it is to be.
    """
    sys.path[0] = os.path.dirname(os.path.dirname(os.path.dirname(FILE)))
    from raysft.garbage import postpone_collection, resume_collection

    postpone_collection()
    for name in (*LIBRARIES, *more):
        __import__(name)
    raylet = ""
    while True:
        ready, _, _ = select.select([listening, sys.stdin], [], [], POLL_SECONDS)
        with contextlib.suppress(ChildProcessError):
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass
        if sys.stdin in ready:  # it is closed
            return None
        if listening not in ready:
            continue
        connection, _ = listening.accept()
        with contextlib.suppress(OSError, ValueError, KeyError, struct.error):  # what others than ``_fork`` may send
            request = Request.receive(connection)
            if not raylet:
                raylet = request.environment[RAYLET]
                _import_ray({**request.environment, JOB: NO_JOB, **NO_GPUS})
                _keep_at_exit()
                resume_collection()
            if raylet == request.environment[RAYLET] and os.fork() == 0:
                listening.close()
                return connection, request
            request.close()
        connection.close()


def _import_ray(environment: dict[str, str]) -> None:
    """Import Ray in a worker's environment."""
    os.environ.clear()
    os.environ.update(environment)
    from raysft.cluster.ray_internals import draw_actor_ids_from_system, import_worker_modules

    draw_actor_ids_from_system()
    for name in MODULES:
        __import__(name)
    import_worker_modules()


def _keep_at_exit() -> None:
    """Let what is alive now be, when a fork ends: torch would take its operators out of its tables one by one."""
    for finalizer in list(getattr(weakref.finalize, "_registry", ())):
        finalizer.atexit = False


class Request:
    """What a worker is to be."""

    def __init__(self, content: dict[str, Any], outputs: Sequence[int]) -> None:
        self.arguments: list[str] = content["arguments"]
        self.environment: dict[str, str] = content["environment"]
        self.folder: str = content["folder"]
        self.score: str = content["score"]
        """How likely the kernel ends it when memory is short."""
        self.outputs = outputs
        """File descriptors of its outputs."""

    @classmethod
    def receive(cls, connection: socket.socket) -> Request:
        """Receive what ``_fork`` sends."""
        connection.settimeout(POLL_SECONDS)
        head, outputs, _, _ = socket.recv_fds(connection, 4, 2)
        try:
            received = b""
            while len(received) < struct.unpack("!I", head)[0]:
                part = connection.recv(1 << 16)
                if not part:
                    raise ConnectionResetError
                received += part
            return cls(json.loads(received), outputs)
        except BaseException:
            for output in outputs:
                os.close(output)
            raise

    def close(self) -> None:
        for output in self.outputs:
            os.close(output)


def _work(connection: socket.socket, request: Request) -> None:
    """Be the worker that was asked for."""
    import runpy

    import numpy as np

    connection.sendall(b"+")
    os.setpgid(0, 0)  # Ray may end all processes of a worker's group
    with open(os.devnull, encoding="ascii") as nothing:
        os.dup2(nothing.fileno(), 0)
    for number, output in enumerate(request.outputs, 1):
        os.dup2(output, number)
    request.close()
    with contextlib.suppress(OSError), open("/proc/self/oom_score_adj", "w", encoding="ascii") as score:
        score.write(request.score)
    os.environ.clear()
    os.environ.update(request.environment)
    os.chdir(request.folder)
    sys.argv = request.arguments
    sys.path[0] = os.path.dirname(sys.argv[0])
    np.random.seed()  # forks would draw alike; Python's own generator is seeded by the fork
    runpy.run_path(sys.argv[0], run_name="__main__")


def _leave(server: int) -> None:
    """End a fork without letting Python free what it has imported: each page of it would be copied first, in 0.5 s of CPU time."""
    if os.getpid() != server:
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(OSError, ValueError):
                stream.flush()
        os._exit(0)


def _ask(arguments: Sequence[str]) -> None:
    """Ask for a fork that runs the script and the arguments, and live as long as it does."""
    worker = [argument for argument in arguments if not argument.startswith((LANGUAGE, CONTEXT))]
    context: dict[str, Any] = {}
    for argument in arguments:
        if argument.startswith(CONTEXT):
            context = json.loads(argument.removeprefix(CONTEXT) or "{}")
    variables: dict[str, str] = context.get("env_vars") or {}
    # What else Ray's setup_worker.py can do, it does itself.
    plain = not context.get("command_prefix") and not context.get("override_worker_entrypoint")
    plain &= context.get("py_executable") in (None, sys.executable, COMMAND)
    plain &= "$" not in "".join(variables.values())
    if not (plain and worker[0].endswith(".py") and _fork(worker, variables)):
        setup = [] if len(worker) == len(arguments) else [_setup_worker()]
        os.execv(sys.executable, [sys.executable, *setup, *arguments])


def _fork(worker: Sequence[str], variables: dict[str, str]) -> bool:
    """Ask the server for a fork, and wait for its end; False if there is none."""
    with contextlib.suppress(OSError), open("/proc/self/oom_score_adj", encoding="ascii") as score:
        environment = {**os.environ, **variables}
        content = {"arguments": worker, "environment": environment, "folder": os.getcwd(), "score": score.read()}
        sent = json.dumps(content).encode()
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
            connection.settimeout(ANSWER_SECONDS)
            connection.connect(environment[ADDRESS])  # that of the driver which has joined, if one has
            socket.send_fds(connection, [struct.pack("!I", len(sent))], [1, 2])
            connection.sendall(sent)
            try:
                answer = connection.recv(1)
            except TimeoutError:
                # It hangs. Those that come later do not wait for it: Ray would end them before they have imported by themselves.
                os.unlink(environment[ADDRESS])
                return False
            if answer == b"+":
                connection.settimeout(None)
                with contextlib.suppress(ConnectionResetError):
                    connection.recv(1)  # comes back when the fork ends
                return True
    return False


def _setup_worker() -> str:
    """Return the path of Ray's ``setup_worker.py``, which this file replaces, without importing Ray."""
    from importlib.util import find_spec

    spec = find_spec("ray")
    assert spec is not None
    return os.path.join(*(spec.submodule_search_locations or ()), "_private", "workers", "setup_worker.py")


def main(arguments: Sequence[str]) -> None:
    """Serve on the socket that is given as a file descriptor and a path, with more libraries to import, or ask for a worker."""
    if not arguments[0].isdigit():
        _ask(arguments)
        return
    # As the first one, before the imports register theirs, so that it is called last.
    atexit.register(_leave, os.getpid())
    worker = None
    try:
        worker = _serve(socket.socket(fileno=int(arguments[0])), arguments[2:])
    finally:
        if worker is None:
            import shutil

            shutil.rmtree(os.path.dirname(arguments[1]), ignore_errors=True)
    if worker is not None:
        _work(*worker)


if __name__ == "__main__":
    main(sys.argv[1:])
