"""Stream rows to the workers with Ray Data, in the order of the row plan.

Rows reach a few dozen workers this way; more workers use ``node_reader``. One row of the Ray dataset, which is also one
block, holds one worker's rows of a few steps. Blocks alternate between the workers, so that the ordered split of Ray Data deals
them out in turn and no worker gets a step ahead. Nothing relies on Ray's order: each row carries its number, and the training loop
checks it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any, Protocol, cast

import numpy as np
import pyarrow as pa

from raysft.cluster.placement import TASK_CPUS
from raysft.cluster.scheduling_pace import pace
from raysft.data.rows import row_media
from raysft.data.rows.collate import Batch
from raysft.data.rows.row_plan import RowPlan, rows_for_rank

BLOCK_TOKENS = 1 << 18
"""Approximate tokens in a block: few blocks for many workers, and little delay before the first."""
ALL_TOKENS = 1 << 22
"""Approximate tokens in the blocks of all workers together: with many workers each has smaller ones."""
BLOCK_MEDIA = 256
"""Approximate images in a block: their files have about 100 KB each."""
MEDIUM_BYTES = 128 << 10
"""Approximate size of such a file."""
PREFETCH_BYTES = 64 << 20
"""Approximate size of the blocks that wait in memory for the workers; more if there are many workers."""
TASK_ROWS = 4096
"""Most rows that one task reads and packs."""


class Rows(Protocol):
    """What a task reads (``packed_dataset.PackedDataset``)."""

    @property
    def row_plan(self) -> Any: ...

    @property
    def media_per_row(self) -> float: ...

    def batch(self, rows: np.ndarray) -> Batch: ...

    def execution_options(self, workers: int, group: int = 1) -> Any: ...


@dataclass(frozen=True)
class Piece:
    """What one task reads: the blocks of all workers in some steps. The task looks up in the plan where their rows are."""

    first_step: int
    stop_step: int


COLUMNS = tuple(field.name for field in fields(Piece))
"""Columns in which a task receives its pieces."""


def steps_per_block(row_plan: RowPlan, workers: int, media_per_row: float = 0.0) -> int:
    """Return how many steps' rows a block holds."""
    step_tokens = -(-row_plan.global_batch_size // workers) * row_plan.capacity
    steps = min(BLOCK_TOKENS, ALL_TOKENS // workers) // step_tokens
    if media_per_row:
        steps = min(steps, int(BLOCK_MEDIA / (-(-row_plan.global_batch_size // workers) * media_per_row)))
    return max(1, steps)


def plan_pieces(row_plan: RowPlan, first_step: int, workers: int, media_per_row: float = 0.0) -> Iterator[Piece]:
    """Yield what each task reads: some steps within about one group of shards.

    Args:
        row_plan: the order of the rows.
        first_step: the step to begin with.
        workers: number of workers.
        media_per_row: average number of images in a row.
    """
    per_step, per_block = row_plan.global_batch_size, steps_per_block(row_plan, workers, media_per_row)
    most = max(1, TASK_ROWS // (per_step * per_block)) * per_block
    group_ends = np.unique(np.minimum(-(-row_plan.group_ends // per_step), row_plan.steps))
    start = first_step
    while start < row_plan.steps:
        following = np.searchsorted(group_ends, start, side="right")
        group_end = int(group_ends[following]) if start < group_ends[-1] else row_plan.steps
        stop = min(group_end, start + most)
        yield Piece(start, stop)
        start = stop


def blocks(row_plan: RowPlan, piece: Piece, workers: int, media_per_row: float = 0.0) -> Iterator[np.ndarray]:
    """Yield the numbers of the rows in each block of a piece; of groups of workers that have the same rows, once for each group."""
    per_block = steps_per_block(row_plan, workers, media_per_row)
    for first in range(piece.first_step, piece.stop_step, per_block):
        steps = range(first, min(first + per_block, piece.stop_step))
        for worker in range(workers):
            of_steps = [
                rows_for_rank(row_plan.rows, row_plan.global_batch_size, step, worker, workers) for step in steps
            ]
            yield np.concatenate(of_steps)


def ray_dataset(rows: Rows, pieces: Sequence[Piece], workers: int, group: int = 1) -> Any:
    """Return a Ray dataset of the blocks of all pieces, in order.

    Args:
        rows: what the tasks read.
        pieces: of the groups of workers.
        workers: their number.
        group: workers of a group, which all get the same rows.
    """
    import ray

    context = ray.data.DataContext.get_current().copy()
    # With a target of one byte, every table that a task yields becomes a separate block.
    context.target_max_block_size = 1
    context.execution_options = rows.execution_options(workers, group)
    context.enable_progress_bars = False
    pace(context)
    with ray.data.DataContext.current(context):
        items = [asdict(piece) for piece in pieces]
        dataset = ray.data.from_items(items, override_num_blocks=max(1, len(items)))
        # At most one task for each core, because each keeps a group of shards in memory.
        cpus = int(ray.cluster_resources().get("CPU", 1.0))
        pool = ray.data.TaskPoolStrategy(size=max(1, min(cpus, len(items))))
        return dataset.map_batches(
            cast(Any, read_pieces),
            batch_size=1,
            num_cpus=TASK_CPUS,
            compute=pool,
            fn_args=(rows, workers // group, group),
        )


def execution_options(row_plan: RowPlan, workers: int, media_per_row: float = 0.0, group: int = 1) -> Any:
    """Make Ray Data keep the order and read only a few blocks ahead for each worker; all workers of a group get the same."""
    import ray

    groups = workers // group

    step_tokens = -(-row_plan.global_batch_size // groups) * row_plan.capacity
    block_bytes = 20 * max(min(BLOCK_TOKENS, ALL_TOKENS // groups), step_tokens)
    if media_per_row:
        rows = -(-row_plan.global_batch_size // groups) * steps_per_block(row_plan, groups, media_per_row)
        block_bytes += int(rows * media_per_row) * MEDIUM_BYTES
    prefetch = ray.data.ExecutionResources(object_store_memory=max(PREFETCH_BYTES, 4 * workers * block_bytes))
    return ray.data.ExecutionOptions(preserve_order=True, resource_limits=prefetch)


def read_pieces(batch: dict[str, np.ndarray], rows: Rows, groups: int, group: int = 1) -> Iterator[pa.Table]:
    """Ray task: yield a table of one row for each block.

    Args:
        batch: [pieces] the fields of ``Piece``.
        rows: where to read.
        groups: number of groups of workers.
        group: workers of each.
    """
    for values in zip(*(batch[name].tolist() for name in COLUMNS), strict=True):
        for numbers in blocks(rows.row_plan, Piece(*values), groups, rows.media_per_row):
            table = one_row(rows.batch(numbers))
            yield from [table] * group


def one_row(batch: Batch) -> pa.Table:
    """Return a batch as a table of one row, which ``split_block`` divides again."""
    return pa.table(
        {
            name: row_media.to_arrow(array)
            if name == "media"
            else pa.array([array.reshape(-1)], pa.list_(pa.from_numpy_dtype(array.dtype)))
            for name, array in batch.items()
        }
    )


def split_block(table: pa.Table, rows_per_step: int) -> Iterator[Batch]:
    """Yield a worker's batch of each step.

    Args:
        table: a block, as a table of one row.
        rows_per_step: rows of one worker in a step.
    """
    lists = {name: table[name].combine_chunks()[0].values for name in table.column_names}
    media = lists.pop("media", None)
    flat = {name: values.to_numpy(zero_copy_only=True) for name, values in lists.items()}
    rows = len(flat["row"])
    shaped = {name: values if len(values) == rows else values.reshape(rows, -1) for name, values in flat.items()}
    for start in range(0, rows, rows_per_step):
        batch = {name: values[start : start + rows_per_step] for name, values in shaped.items()}
        if media is not None:  # read step by step: the bytes are copied
            batch["media"] = row_media.from_arrow(media.slice(start, rows_per_step))
        yield batch
