"""What Ray Train asks at each start of the workers: which checkpoint they resume from, and which rows each of them gets.

Ray Train unpickles this in its own processes, which never train. Nothing here imports torch, which would take them seconds.
"""

from __future__ import annotations

from typing import Any

import ray.data
import ray.train

from raysft.cluster.placement import selector_of
from raysft.storage.path import StoragePath
from raysft.storage.retry import retry_for
from raysft.telemetry.events import Emit, Waiting
from raysft.train.checkpoint import catalog
from raysft.train.checkpoint.resume import ResumePoint
from raysft.train.job import SPLIT_WORKERS, TrainJob

RESUME, TRAIN = "resume", "train"
"""Names under which Ray Train hands a worker the ``ResumePoint`` (or None) and the rows that begin there."""


class Resumption:
    """Decides where the workers resume. Ray Train's controller asks at each start: the newest checkpoint may be another one.

    The decision travels as if it were a dataset, since datasets are what Ray Train makes again for each start.
    """

    def __init__(self, checkpoints: StoragePath, emit: Emit) -> None:
        self._checkpoints, self._emit = checkpoints, emit
        self._decision: ResumePoint | None = None

    def datasets(self) -> dict[str, Any]:
        """Functions that Ray Train calls for each dataset, in this order; each returns a resume point or None."""
        return {RESUME: self._decide, TRAIN: lambda: self._decision}

    def _decide(self) -> ResumePoint | None:
        with retry_for(notify=lambda line: self._emit(Waiting(line))):
            self._decision = catalog.newest(self._checkpoints)
        return self._decision


class PlannedDataConfig(ray.train.DataConfig):
    """Makes the training data from the resume point on, for the number of workers of this start."""

    def __init__(self, job: TrainJob) -> None:
        super().__init__(datasets_to_split=[TRAIN])
        self._job, self._split_workers = job, SPLIT_WORKERS

    def configure(
        self, datasets: Any, world_size: int, worker_handles: Any, worker_node_ids: Any, **options: Any
    ) -> Any:
        """Divide the rows from the resume point on among the workers; give each of them the resume point itself."""
        (name, resume), rows = *datasets.items(), self._job.train_rows
        if name == RESUME:
            return [{RESUME: resume}] * world_size
        scaling, first = self._job.config.scaling, resume.cursor.step if resume else 0
        data_label, group = scaling.data_label, scaling.sequence_parallel
        if world_size > self._split_workers:
            return [{name: shard} for shard in rows.node_shards(first, worker_node_ids, data_label, group)]
        execution = rows.execution_options(world_size, group)
        execution.label_selector = selector_of(data_label) or None
        base = ray.train.DataConfig(execution_options=execution)
        made = {name: rows.dataset(first, world_size, group)}
        return base.configure(made, world_size, worker_handles, worker_node_ids, **options)
