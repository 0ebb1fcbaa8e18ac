"""Read, tokenize and write shards in parallel, in one pass of Ray Data over all shard sets."""

from __future__ import annotations

import os
import pickle
import time
import warnings
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from functools import partial
from itertools import islice
from typing import Any, cast

from raysft.cluster.connect import ensure_cluster
from raysft.cluster.placement import TASK_CPUS, selector_of
from raysft.cluster.scheduling_pace import pace
from raysft.data.shards.manifest import Shard
from raysft.data.shards.parts import kept_parts, load_part, part_name, save_part
from raysft.data.shards.shard_set import ShardSet
from raysft.data.shards.shard_writer import write_shards
from raysft.data.sources.files import DataFile
from raysft.data.sources.readers import COMPRESSIONS, RawRecord, read_raw
from raysft.data.sources.sampling import RandomSample, RecordSlice
from raysft.data.tokenization.tokenizer import Tokenizer
from raysft.errors import RequestError
from raysft.stopping import current
from raysft.storage.path import StoragePath

SHARD_RECORDS = 5_000
"""Most records in a shard, and in one tokenizing task."""
SHARD_BYTES = 16 << 20
"""Approximate limit on the bytes of these records. No limit depends on the cluster, so shards are the same everywhere. A request to
stop is heard after each, and what is under way is repeated: of the slowest records, tool calls, 11 s of CPU time."""
READ_BYTES = 64 << 20
"""Limit on the bytes that one reading task reads; a larger file gets its own task."""
LOCAL_BYTES = 64 << 20
"""Data up to this size is tokenized in the driver. The processes of the tasks take longer to start than they save: on two cores,
preparing 4 MB takes 5 s in all instead of 14 s, and 51 MB 13 s instead of 20 s."""
COMPRESSED, COMPRESSED_TIMES = (*COMPRESSIONS, ".parquet"), 4
"""Ends of the names of compressed files, and about how many times as large their text is."""
READ_CPUS = 0.1
"""CPUs of a reading task."""
QUEUE_BYTES = 128 << 20
"""Approximate limit on the records and shards that wait in memory between tasks."""
Notify = Callable[[str], None]
Kept = Mapping[StoragePath, frozenset[str]]
"""The parts of each set that an earlier call has left; empty if none are looked for and kept."""


def write_shard_sets(
    sets_by_source: Sequence[Sequence[ShardSet]],
    load_tokenizer: Callable[[], Tokenizer],
    notify: Notify,
    data_label: str | None = None,
) -> dict[StoragePath, list[Shard]]:
    """Tokenize all sets; the sets of one source are written in one pass over its files.

    Args:
        sets_by_source: the sets to write, grouped by source.
        load_tokenizer: loads the tokenizer; called once.
        notify: called with lines about the progress.
        data_label: of the nodes for data, where tasks run. Default: all nodes.

    Returns:
        Folder of a set → its shards, in the order of the records.

    Raises:
        RequestError: a file cannot be read, or does not fit the stage.
        RunStopped: the run was asked to stop.
    """
    tasks = [
        {"task": (number, files, sets[0].source.max_examples, sets[0].sample)}
        for number, sets in enumerate(sets_by_source)
        for files in read_tasks(sets[0])
    ]
    size = sum(text_bytes(file) for sets in sets_by_source for file in sets[0].files)
    make_rows = _in_this_process if size <= LOCAL_BYTES else partial(_on_cluster, data_label=data_label)
    shards: dict[StoragePath, list[Shard]] = {each.directory: [] for sets in sets_by_source for each in sets}
    # What fits into one shard is written as a whole or not at all.
    kept = {directory: kept_parts(directory) for directory in shards} if size > min(SHARD_BYTES, LOCAL_BYTES) else {}
    progress, stopping = _ProgressReport(notify), current()
    with closing(make_rows(tasks, sets_by_source, load_tokenizer, kept)) as rows:  # at an error, Ray Data stops at once
        for row in rows:
            if row["error"]:
                raise RequestError(row["error"])
            shard: Shard = pickle.loads(row["shard"])
            shards[StoragePath(row["directory"])].append(shard)
            progress.add(shard)
            stopping.check()
    return shards


def text_bytes(file: DataFile) -> int:
    """Approximate bytes of a file's text."""
    return file.size * (COMPRESSED_TIMES if file.path.endswith(COMPRESSED) else 1)


def _in_this_process(
    tasks: Sequence[dict[str, Any]],
    sets_by_source: Sequence[Sequence[ShardSet]],
    load_tokenizer: Callable[[], Tokenizer],
    kept: Kept,
) -> Generator[dict[str, Any], None, None]:
    """Do what ``_on_cluster`` does, in the same order, for data that is tokenized before a worker would have started."""
    tokenizer = load_tokenizer()
    for task in tasks:
        for records in read_task(task):
            yield from _tokenize_task(records, sets_by_source, tokenizer, kept)


def _on_cluster(
    tasks: Sequence[dict[str, Any]],
    sets_by_source: Sequence[Sequence[ShardSet]],
    load_tokenizer: Callable[[], Tokenizer],
    kept: Kept,
    data_label: str | None,
) -> Generator[dict[str, Any], None, None]:
    """Yield a row for each shard (or an error) from a pipeline of Ray Data: read, then tokenize and write."""
    import ray

    # While the tokenizer loads, the cluster starts, then its workers, and they import what the tasks need.
    with ThreadPoolExecutor(1) as thread:
        loading = thread.submit(load_tokenizer)
        ensure_cluster()
        cpus = ray.cluster_resources().get("CPU", 1.0)
        warm_up = ray.remote(num_cpus=TASK_CPUS - READ_CPUS, label_selector=selector_of(data_label))(_warm_up)
        warming = [warm_up.remote() for _ in range(max(1, int(cpus)))]
        tokenizer = loading.result()
        del warming
    # Ray compares the pool sizes with the number of inputs, but reading tasks produce more of them later.
    warnings.filterwarnings("ignore", message="The maximum number of concurrent tasks", category=UserWarning)

    def pool(size: float) -> Any:
        return ray.data.TaskPoolStrategy(size=max(1, int(size)))

    with ray.data.DataContext.current(data_context(data_label)):
        yield from (
            ray.data.from_items(list(tasks), override_num_blocks=len(tasks))
            .flat_map(read_task, num_cpus=READ_CPUS, compute=pool(cpus / 4))
            .flat_map(
                partial(_tokenize_on_core, sets_by_source=sets_by_source, tokenizer=tokenizer, kept=kept),
                num_cpus=TASK_CPUS - READ_CPUS,
                # More tasks than cores: Ray Data takes a tenth of a second to start the next one after one has finished.
                compute=pool(cpus + max(1, cpus / 4)),
            )
            .iter_rows()
        )


def data_context(data_label: str | None) -> Any:
    """Settings of Ray Data with which records of any size flow through a pipeline in order."""
    import ray

    context = ray.data.DataContext.get_current().copy()
    context.execution_options.preserve_order = True
    context.execution_options.label_selector = selector_of(data_label) or None
    context.enable_progress_bars = False
    context.issue_detectors_config.high_memory_detector_config.detection_time_interval_s = -1
    # Reading is faster than tokenizing; the limit keeps records that wait from filling the memory.
    context.execution_options.resource_limits = ray.data.ExecutionResources(object_store_memory=QUEUE_BYTES)
    # Reserve half of the limit for each operator. Otherwise waiting records take all of it, and one tokenizing task is left.
    context.op_resource_reservation_ratio = 1.0
    pace(context)
    context.target_max_block_size = 1  # send each row (the records of a shard, or a shard) on its own
    return context


class _ProgressReport:
    """Reports the progress of tokenizing every few seconds."""

    def __init__(self, notify: Notify, interval_seconds: float = 10.0) -> None:
        self.notify, self.interval_seconds = notify, interval_seconds
        self.start = self.last_report = time.monotonic()
        self.records = self.tokens = 0

    def add(self, shard: Shard) -> None:
        """Count a finished shard, and report if it is time to."""
        self.records += shard.records
        self.tokens += int(shard.lengths.sum())
        now = time.monotonic()
        if now - self.last_report >= self.interval_seconds:
            self.last_report = now
            speed = self.tokens / (now - self.start)
            self.notify(f"tokenizing: {self.records:,} records, {self.tokens:,} tokens, {speed:,.0f} tokens/s")


def _warm_up() -> None:
    """Ray task: import what the other tasks need."""
    import ray.data  # noqa: F401
    import transformers.utils.chat_template_utils  # noqa: F401


def read_tasks(shard_set: ShardSet) -> Iterator[tuple[DataFile, ...]]:
    """Group the files of a source into reading tasks."""
    if shard_set.source.max_examples or shard_set.sample:
        yield shard_set.files  # these count records across all files
        return
    files: list[DataFile] = []
    for file in shard_set.files:
        if files and sum(f.size for f in files) + file.size > READ_BYTES:
            yield tuple(files)
            files = []
        files.append(file)
    yield tuple(files)


def read_task(row: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Read files, and return one row for the records of each shard."""
    source, files, limit, sample = row["task"]
    try:
        for records in record_batches(files, limit, sample):
            yield {"source": source, "records": pickle.dumps(records), "error": ""}
    except RequestError as error:
        yield {"source": source, "records": b"", "error": str(error)}


def record_batches(
    files: Sequence[DataFile], limit: int | None = None, sample: RandomSample | RecordSlice | None = None
) -> Iterator[list[tuple[str, RawRecord]]]:
    """Read records with their locations, one list for each shard; the last list may be empty.

    Args:
        files: files to read, in order.
        limit: most records to read.
        sample: random sample or slice to take records from.
    """
    records: list[tuple[str, RawRecord]] = []
    total = 0

    def read() -> Iterator[tuple[str, int, RawRecord]]:
        return ((f"{file.path}:{position}", size, raw) for file in files for position, size, raw in read_raw(file))

    for location, size, raw in sample.select(read, limit) if sample else islice(read(), limit):
        if records and (len(records) >= SHARD_RECORDS or total + size > SHARD_BYTES):
            yield records
            records, total = [], 0
        records.append((location, raw))
        total += size
    yield records


def _shards(
    sets: Sequence[ShardSet],
    records: list[tuple[str, RawRecord]],
    tokenizer: Tokenizer,
    kept: Kept,
) -> list[Shard]:
    """Return the shards of some records, one for each set: those of an earlier call, or new ones, kept for a later one."""
    if not kept:
        return write_shards(sets, records, tokenizer)
    name = part_name(location for location, _ in records)
    if all(name in kept[each.directory] for each in sets):
        known = [load_part(each.directory, name) for each in sets]
        if None not in known:
            return cast(list[Shard], known)
    shards = write_shards(sets, records, tokenizer)
    if not any(shard.unusable for shard in shards):  # the next call may find those images
        for each, shard in zip(sets, shards, strict=True):
            save_part(each.directory, name, shard)
    return shards


def _tokenize_task(
    row: dict[str, Any],
    sets_by_source: Sequence[Sequence[ShardSet]],
    tokenizer: Tokenizer,
    kept: Kept,
) -> Iterator[dict[str, Any]]:
    """Tokenize records and write shards, and return one row for each set of the source."""
    error = row["error"]
    if not error:
        sets = sets_by_source[row["source"]]
        try:
            for shard_set, shard in zip(
                sets, _shards(sets, pickle.loads(row["records"]), tokenizer, kept), strict=True
            ):
                yield {"directory": shard_set.directory.location, "shard": pickle.dumps(shard), "error": ""}
            return
        except RequestError as caught:
            error = str(caught)
    yield {"directory": "", "shard": b"", "error": error}


def _tokenize_on_core(row: dict[str, Any], **options: Any) -> Iterator[dict[str, Any]]:
    """Ray task: ``_tokenize_task`` in a process that shares the machine with one such task for each core."""
    os.environ.setdefault("RAYON_NUM_THREADS", "1")  # more threads would only compete with the other tasks
    return _tokenize_task(row, **options)
