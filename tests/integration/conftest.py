"""What tests on a local cluster of Ray begin with."""

import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
import ray

from tests import warm_worker
from tests.objects import credentials


@pytest.fixture(scope="package")
def home(tmp_path_factory) -> Iterator[Path]:
    """A home folder for this process and its Ray, and credentials for S3 servers; Ray ends with the last test of this folder."""
    home = tmp_path_factory.mktemp("home")
    with credentials(), pytest.MonkeyPatch.context() as patch:
        # Ray keeps the token of its clusters at home, and in this process the one that it has read before.
        token = Path.home() / ".ray" / "auth_token"
        if token.exists():
            patch.setenv("RAY_AUTH_TOKEN_PATH", str(token))
        if "MPLCONFIGDIR" not in os.environ:
            patch.setenv(
                "MPLCONFIGDIR", str(Path.home() / ".cache" / "matplotlib")
            )  # a list of fonts, which takes seconds
        patch.setenv("HOME", str(home))
        # As in a cluster that raysft starts: its processes do not step back before other programs of the machine.
        patch.setenv("RAY_worker_niceness", "0")
        yield home
        ray.shutdown()


@pytest.fixture(scope="package")
def _warm(home) -> Iterator[Callable[[], None]]:
    """Start a cluster of 2 CPUs whose workers are forks of a process that has imported what they need."""
    with ExitStack() as stack:

        def start() -> None:
            ray.init(
                address="local",
                num_cpus=2,
                include_dashboard=False,
                log_to_driver=False,
                runtime_env={"py_executable": warm_worker.COMMAND},
            )
            (raylet,) = ray._private.worker._global_node.all_processes["raylet"]
            job = ray.get_runtime_context().get_job_id()
            stack.enter_context(warm_worker.serving(raylet.process.pid, job))

        yield start


@pytest.fixture(scope="module")
def local_ray(home, _warm) -> Path:
    """A cluster of 2 CPUs, started once for all files that this process tests; gives the home folder that it works in."""
    if not ray.is_initialized():
        _warm()
    return home
