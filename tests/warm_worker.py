"""Ray's workers as forks of one process that has imported what they need.

The imports of a worker (Ray, torch, transformers, peft, DeepSpeed) take up to ten seconds of CPU time, a training has eight
processes, and the tests some fifty trainings. With ``ray.init(runtime_env={"py_executable": COMMAND})`` Ray starts this file in
place of Python. It hands its arguments, environment and output to the process of ``serving``, which forks, and waits for the
fork to end. What begins in a fresh interpreter is tested elsewhere: by commands of their own, on clusters of their own.
"""

import contextlib
import json
import os
import socket
import struct
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence

FILE = os.path.abspath(__file__)
COMMAND = f"{sys.executable} -S -E {FILE}"
IMPORTED = (
    "ray.data",
    "ray.train",
    "raysft.train.launch",
    "raysft.generate.ray_pipeline",
    "raysft.data.prepare",
    "deepspeed",
    "peft",
    "transformers.models.llama.modeling_llama",
)
START_SECONDS = 50.0
"""Longer than the imports take on a busy machine, and less than Ray waits for a worker."""


@contextlib.contextmanager
def serving(raylet: int, job: str) -> Iterator[None]:
    """Fork the workers of a raylet (its process id) for a job of Ray (its id) for a while.

    Ray's core reads its settings from the environment when it is loaded, these two among them. The process is a child of
    this one, so that whoever looks for a worker among the children finds it.
    """
    environment = {**os.environ, "RAY_RAYLET_PID": str(raylet), "RAY_JOB_ID": job}
    with subprocess.Popen(
        [sys.executable, FILE], env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    ) as process:
        try:
            yield
        finally:
            process.kill()


def _address() -> str:
    """Name of the socket in the kernel's abstract namespace, where it leaves no file."""
    return f"\0raysft-{os.environ['RAY_RAYLET_PID']}"


def _serve() -> None:
    sys.path[0] = os.path.dirname(os.path.dirname(FILE))
    import_all()
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listening:
        listening.bind(_address())
        listening.listen(64)
        listening.settimeout(1.0)
        while os.path.exists(f"/proc/{os.environ['RAY_RAYLET_PID']}"):
            with contextlib.suppress(ChildProcessError):
                while os.waitpid(-1, os.WNOHANG)[0]:
                    pass
            try:
                connection, _ = listening.accept()
            except TimeoutError:
                continue
            if os.fork() == 0:
                listening.close()
                _work(connection)
            connection.close()


def import_all(modules: Sequence[str] = IMPORTED) -> None:
    """Import what workers need, without drawing a random number in Ray's core.

    All forks would go on with the same numbers, which are the ids of their objects: two that start at a time would crash, and
    Ray renews the lease of one that crashes while it starts only after a minute. Importing a class of actors draws one.
    """
    from types import SimpleNamespace

    from ray import ActorClassID, actor

    actor.ActorClassID = SimpleNamespace(from_random=lambda: ActorClassID(os.urandom(ActorClassID.size())))  # pyright: ignore
    for name in modules:
        __import__(name)


def _work(connection: socket.socket) -> None:
    """Be the worker that was asked for."""
    import atexit
    import runpy
    import traceback

    import numpy as np

    connection.setblocking(True)
    head, outputs, _, _ = socket.recv_fds(connection, 4, 2)
    size, received = struct.unpack("!I", head)[0], b""
    while len(received) < size:
        received += connection.recv(size - len(received))
    request = json.loads(received)
    for number, output in enumerate(outputs, 1):
        os.dup2(output, number)
        os.close(output)
    os.environ.clear()
    os.environ.update(request["environment"])
    os.chdir(request["folder"])
    sys.argv = request["arguments"]
    sys.path[0] = os.path.dirname(sys.argv[0])
    np.random.seed()  # forks would draw alike; Python's own generator is seeded by the fork
    code = 1
    try:
        runpy.run_path(sys.argv[0], run_name="__main__")
        code = 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        traceback.print_exc()
    finally:
        with contextlib.suppress(Exception):
            atexit._run_exitfuncs()
        os._exit(code)


def _ask() -> None:
    """Ask for a fork that runs the script and the arguments of the command line, and live as long as it does."""
    limit = time.monotonic() + START_SECONDS
    while True:
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
            try:
                connection.connect(_address())
            except ConnectionRefusedError:
                if time.monotonic() > limit:  # nobody answers: as without this file
                    os.execv(sys.executable, [sys.executable, *sys.argv[1:]])
                time.sleep(0.05)
                continue
            request = {"arguments": sys.argv[1:], "environment": dict(os.environ), "folder": os.getcwd()}
            content = json.dumps(request).encode()
            socket.send_fds(connection, [struct.pack("!I", len(content))], [1, 2])
            connection.sendall(content)
            with contextlib.suppress(ConnectionResetError):
                connection.recv(1)  # comes back when the fork ends
            return


if __name__ == "__main__":
    _ask() if sys.argv[1:] else _serve()
