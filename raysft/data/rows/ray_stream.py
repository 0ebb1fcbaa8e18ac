"""Stream rows to the workers with Ray Data, in the order of the row plan.

One row of the Ray dataset, which is also one block, holds one worker's rows of a few steps. Blocks alternate between the workers,
so that the ordered split of Ray Data deals them out in turn and no worker gets a step ahead. Nothing relies on Ray's order: each
row carries its number, and the training loop checks it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import pyarrow as pa

from raysft.cluster.placement import TASK_CPUS
from raysft.data.rows.collate import Batch, RowSlices, collate
from raysft.data.rows.row_plan import RowPlan, rows_for_rank

BLOCK_TOKENS = 1 << 18
"""Approximate tokens in a block: few blocks for many workers, and little delay before the first."""
PREFETCH_BYTES = 64 << 20
"""Approximate size of the blocks that wait in memory for the workers; more if there are many workers."""
TASK_ROWS = 4096
"""Rows that one task reads and packs at most."""


@dataclass(frozen=True)
class ReadTask:
    """Blocks that one Ray task reads and packs."""

    blocks: tuple[RowSlices, ...]
    paths: tuple[str, ...]
    """Paths of all shards."""
    capacity: int
    document_mask: bool


def plan_blocks(
    row_plan: RowPlan, find_slices: Callable[[np.ndarray], RowSlices], first_step: int, workers: int
) -> Iterator[tuple[RowSlices, ...]]:
    """Yield the blocks that each task reads: those of some steps within about one group of shards.

    Args:
        row_plan: the order of the rows.
        find_slices: finds the segments of rows, given their numbers.
        first_step: the step to begin with.
        workers: number of workers.
    """
    per_step = row_plan.global_batch_size
    per_worker = -(-per_step // workers)
    steps_per_block = max(1, BLOCK_TOKENS // (per_worker * row_plan.capacity))
    max_steps = max(1, TASK_ROWS // (per_step * steps_per_block)) * steps_per_block
    group_ends = np.unique(np.minimum(-(-row_plan.group_ends // per_step), row_plan.steps))
    start = first_step
    while start < row_plan.steps:
        following = np.searchsorted(group_ends, start, side="right")
        group_end = int(group_ends[following]) if start < group_ends[-1] else row_plan.steps
        stop = min(group_end, start + max_steps)
        blocks = []
        for first in range(start, stop, steps_per_block):
            steps = range(first, min(first + steps_per_block, stop))
            for worker in range(workers):
                rows = [rows_for_rank(row_plan.rows, per_step, step, worker, workers) for step in steps]
                blocks.append(find_slices(np.concatenate(rows)))
        yield tuple(blocks)
        start = stop


def ray_dataset(tasks: Sequence[ReadTask], options: Any) -> Any:
    """Return a Ray dataset of all blocks, in order.

    Args:
        tasks: what to read.
        options: ``ray.data.ExecutionOptions``.
    """
    import ray

    context = ray.data.DataContext.get_current().copy()
    # With a target of one byte, every table that a task yields becomes a block by itself.
    context.target_max_block_size = 1
    context.execution_options = options
    context.enable_progress_bars = False
    with ray.data.DataContext.current(context):
        dataset = ray.data.from_items([{"task": task} for task in tasks], override_num_blocks=max(1, len(tasks)))
        # At most one task for each core, because each keeps a group of shards in memory.
        cpus = int(ray.cluster_resources().get("CPU", 1.0))
        pool = ray.data.TaskPoolStrategy(size=max(1, min(cpus, len(tasks))))
        return dataset.map_batches(cast(Any, read_blocks), batch_size=1, num_cpus=TASK_CPUS, compute=pool)


def execution_options(row_plan: RowPlan, workers: int) -> Any:
    """Make Ray Data keep the order and read no further ahead than a few blocks for each worker."""
    import ray

    block_bytes = 20 * max(BLOCK_TOKENS, row_plan.global_batch_size * row_plan.capacity // workers)
    prefetch = ray.data.ExecutionResources(object_store_memory=max(PREFETCH_BYTES, 4 * workers * block_bytes))
    return ray.data.ExecutionOptions(preserve_order=True, resource_limits=prefetch)


def read_blocks(batch: dict[str, Any]) -> Iterator[pa.Table]:
    """Ray task: yield a table of one row for each block."""
    for task in batch["task"]:
        for slices in task.blocks:
            rows = collate(slices, task.paths, task.capacity, task.document_mask)
            yield pa.table(
                {
                    name: pa.array([values.reshape(-1)], pa.list_(pa.from_numpy_dtype(values.dtype)))
                    for name, values in rows.items()
                }
            )


def split_block(table: pa.Table, rows_per_step: int) -> Iterator[Batch]:
    """Yield a worker's batch of each step.

    Args:
        table: a block, as a table of one row.
        rows_per_step: rows of one worker in a step.
    """
    flat = {name: table[name].combine_chunks()[0].values.to_numpy(zero_copy_only=True) for name in table.column_names}
    rows = len(flat["row"])
    shaped = {name: values if len(values) == rows else values.reshape(rows, -1) for name, values in flat.items()}
    for start in range(0, rows, rows_per_step):
        yield {name: values[start : start + rows_per_step] for name, values in shaped.items()}
