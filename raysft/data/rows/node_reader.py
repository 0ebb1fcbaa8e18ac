"""Rows for many workers: each node has a reader that makes the rows of its own workers.

Ray Data would deal out the rows of all workers through one actor. A reader knows the row plan and is asked for blocks by their
steps, so it needs no other process, and a restarted reader answers as the first one did. Blocks stay in the memory of
their node.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import pyarrow as pa

from raysft.cluster.placement import selector_of
from raysft.data.rows.ray_stream import Rows, one_row, steps_per_block
from raysft.data.rows.row_plan import rows_for_rank

KEPT_BLOCKS = 4
"""Blocks that a reader keeps for each of its workers. All of them are made at the first request for one, because they draw from the
same shards; and no worker gets further ahead of another than the blocks that it requests early."""


class NodeReader:
    """Makes the rows of some workers.

    Args:
        rows: where to read.
        workers: the ranks of the workers.
        all_workers: total number of workers in the training run.
    """

    def __init__(self, rows: Rows, workers: Sequence[int], all_workers: int) -> None:
        self._rows, self._workers, self._all_workers = rows, list(workers), all_workers
        self._blocks = lru_cache(maxsize=KEPT_BLOCKS)(self._make)

    def block(self, first_step: int, stop_step: int, worker: int) -> pa.Table:
        """Return a worker's rows of some steps, as a table of one row."""
        return self._blocks(first_step, stop_step)[self._workers.index(worker)]

    def _make(self, first_step: int, stop_step: int) -> list[pa.Table]:
        plan = self._rows.row_plan
        numbers = [
            rows_for_rank(plan.rows, plan.global_batch_size, step, worker, self._all_workers)
            for worker in self._workers
            for step in range(first_step, stop_step)
        ]
        batch, each = self._rows.batch(np.concatenate(numbers)), len(numbers) // len(self._workers) * len(numbers[0])
        starts = range(0, each * len(self._workers), each)
        return [one_row({name: values[start : start + each] for name, values in batch.items()}) for start in starts]


@dataclass(frozen=True)
class NodeShard:
    """A worker's rows from its node's reader, with the interface of a shard of Ray Data."""

    reader: Any
    """Actor of ``NodeReader``."""
    worker: int
    """Its rank, or the number of its group."""
    steps: range
    """First step of each block."""
    stop_step: int
    """The step after the last."""

    def iter_batches(self, *, prefetch_batches: int, **_: Any) -> Iterator[pa.Table]:
        """Yield the blocks in order.

        Args:
            prefetch_batches: how many to request beyond the one that is needed next.
        """
        import ray

        asked: deque[Any] = deque()
        for step in self.steps:
            stop = min(step + self.steps.step, self.stop_step)
            asked.append(self.reader.block.remote(step, stop, self.worker))
            if len(asked) > prefetch_batches:
                yield ray.get(asked.popleft())
        while asked:
            yield ray.get(asked.popleft())


def node_shards(
    rows: Rows, first_step: int, nodes: Sequence[str], data_label: str | None = None, group: int = 1
) -> list[NodeShard]:
    """Start a reader for each node, and return a shard for each worker.

    Args:
        rows: where to read.
        first_step: the step to begin with.
        nodes: [workers] Ray's id of the node of each worker.
        data_label: of the nodes for data, where readers run. Default: each runs on the node that it reads for.
        group: this many consecutive workers have the same rows, those of one number.
    """
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    steps = range(
        first_step, rows.row_plan.steps, steps_per_block(rows.row_plan, len(nodes) // group, rows.media_per_row)
    )
    of_node: dict[str, list[int]] = {}
    for worker, node in enumerate(nodes):
        of_node.setdefault(node, []).append(worker)
    # It reserves no CPU, so it always finds room alongside the workers. It has no state that a restart would lose.
    actor = ray.remote(num_cpus=0, max_restarts=-1, max_task_retries=-1)(NodeReader)
    shards: dict[int, NodeShard] = {}
    for node, workers in of_node.items():
        place: dict[str, Any] = {"scheduling_strategy": NodeAffinitySchedulingStrategy(node, soft=False)}
        if data_label:
            place = {"scheduling_strategy": "SPREAD", "label_selector": selector_of(data_label)}
        numbers = list(dict.fromkeys(worker // group for worker in workers))
        reader = actor.options(**place).remote(rows, numbers, len(nodes) // group)
        shards |= {worker: NodeShard(reader, worker // group, steps, rows.row_plan.steps) for worker in workers}
    return [shards[worker] for worker in range(len(nodes))]
