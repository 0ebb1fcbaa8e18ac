"""The ``scaling`` section."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import Field, field_validator

from raysft.config.section import Positive, Section


class ScalingSection(Section):
    num_workers: Positive | tuple[Positive, Positive] = 1
    """Training workers; one GPU each, with ``use_gpu``. ``[fewest, most]``: as many as the cluster has room for at the moment;
    training goes on with fewer when a node leaves, and with more again, from its next checkpoint on, when one comes. The
    numerics_keys stays the same: a step always has ``train.global_batch_size`` rows."""
    wait_minutes: Annotated[float, Field(gt=0)] = 30
    """How long to wait for nodes, once training has begun, while the cluster has room for fewer workers than are wanted."""
    use_gpu: bool = False
    """Train and generate on GPUs."""
    cpus_per_worker: Annotated[float, Field(gt=0)] = 1.0
    """CPUs that Ray reserves for a worker. Leave at least half a CPU of the cluster to the data tasks."""
    threads_per_worker: Positive | None = None
    """Threads of a worker's computation without GPU. Default: the node's cores divided by its workers."""
    address: str | None = None
    """Ray cluster to join. Default: the one this process is started in or that runs on this machine, else a new one of
    this machine alone. ``local`` asks for a new one in any case. Give HOST:PORT of the cluster's head; addresses of Ray Client
    (``ray://``) cannot be used."""

    @field_validator("num_workers", mode="before")
    @classmethod
    def _is_a_number_or_two(cls, value: Any) -> Any:
        numbers = list(value) if isinstance(value, list | tuple) else [value, value]
        whole = all(isinstance(each, int) and not isinstance(each, bool) and each > 0 for each in numbers)
        if not whole or len(numbers) != 2 or numbers[0] > numbers[1]:
            raise ValueError("is neither a positive number nor [fewest, most]; use 2, or [1, 4]")
        return value

    @property
    def fewest_workers(self) -> int:
        """Workers below which a training waits."""
        return self.num_workers if isinstance(self.num_workers, int) else self.num_workers[0]

    @property
    def most_workers(self) -> int:
        """Workers that a training never has more of."""
        return self.num_workers if isinstance(self.num_workers, int) else self.num_workers[1]

    @property
    def is_elastic(self) -> bool:
        """Whether the number of workers may change while a training goes on."""
        return self.fewest_workers < self.most_workers
