"""The start of the workers' process group. A start that fails is retried, with workers started again.

On its own, Ray Train then ends the training and keeps the workers' placement group, so that nothing else finds room. A start
fails easily: the first worker takes a free port, and releases it until torch listens there, so another process may take it in
between.

Before that, workers without a GPU set up their processes (``cpu_worker``).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ray.exceptions import RayTaskError
from ray.train.torch import TorchConfig

from raysft.errors import one_line
from raysft.train import cpu_worker
from raysft.train.ray_train_internals import TorchBackend, WorkerGroupStartupFailedError


class ProcessGroupFailed(WorkerGroupStartupFailedError):
    """The process group did not start. Ray Train starts the workers again, at most ``controller_failure_limit`` times."""


@dataclass
class RestartableTorchConfig(TorchConfig):
    """Like Ray's, with a start that can be retried."""

    @property
    def backend_cls(self) -> type[TorchBackend]:
        """What starts the process group, in the controller's process."""
        return RestartableBackend


class RestartableBackend(TorchBackend):
    """Releases the workers if their process group does not start."""

    def on_start(self, worker_group: Any, backend_config: TorchConfig) -> None:
        """Start the process group on all workers.

        Raises:
            ProcessGroupFailed: it did not start; the workers and their placement group are gone.
        """
        try:
            if backend_config.backend == "gloo":  # the workers have no GPUs
                worker_group.execute(cpu_worker.set_up)
            super().on_start(worker_group, backend_config)
        except Exception as error:
            worker_group.abort()
            own = error.cause if isinstance(error, RayTaskError) else error
            raise ProcessGroupFailed(f"{type(own).__name__}: {one_line(own)}") from error
