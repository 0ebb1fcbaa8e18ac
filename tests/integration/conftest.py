"""What tests on a local cluster of Ray begin with."""

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import ray

from raysft.cluster import workers
from raysft.cluster.ray_internals import head_without_services
from raysft.storage import hub
from tests.clusters import IDLE
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
        for name, value in IDLE.items():
            patch.setenv(name, value)
        patch.setattr(
            hub, "RETRY_SECONDS", 1.0
        )  # without a network, models that are not there would be asked for that long
        yield home
        ray.shutdown()


@pytest.fixture(scope="package")
def _start(home) -> Iterator[Callable[[], None]]:
    """Start a cluster of 2 CPUs, with workers as those of a run."""

    def start() -> None:
        workers.stop()  # that of a cluster that has ended: a server forks for one alone
        workers.start(use_gpu=False, trials=True)
        with head_without_services(), workers.forked_workers(joins=False) as options:
            ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False, **options)

    yield start
    ray.shutdown()
    workers.stop()


@pytest.fixture(scope="module")
def local_ray(home, _start) -> Path:
    """A cluster of 2 CPUs, started once for all files that this process tests; gives the home folder that it works in."""
    if not ray.is_initialized():
        _start()
    return home
