"""Tokenized examples as Parquet shards in a content-addressed cache, written once, in parallel, by Ray Data.

A set of shards is complete exactly when its manifest is there: shards get names of their own, and the manifest, which names
them, is put in place last in one atomic move. Two runs that write the same set at once both leave a whole one.
"""

from __future__ import annotations

import hashlib
import json
import os
import pickle
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

from raysft.cluster.placement import TASK_CPUS
from raysft.config import Config, Source
from raysft.data.shards.manifest import Manifest, Shard, is_complete, load_manifest, save_manifest
from raysft.data.shards.shard_writer import ShardSet, Split, write_shards
from raysft.data.sources.files import DataFile, find_files
from raysft.data.sources.readers import RawRecord, read_raw
from raysft.data.sources.registry import resolve_source
from raysft.data.sources.sampling import RandomSample
from raysft.data.tokenization.tokenized_example import TokenizeOptions
from raysft.data.tokenization.tokenizer import Tokenizer
from raysft.data.types import Rejected
from raysft.errors import RequestError
from raysft.storage.local_cache import local_copy
from raysft.storage.path import StoragePath

CACHE_VERSION = 6
"""Part of every key: raise it when the same input would give other shards."""
SHARD_RECORDS = 5_000
"""Records that one task tokenizes, and a shard holds, at most."""
SHARD_BYTES = 16 << 20
"""Bytes of them, about. Neither bound depends on the cluster, so that shards come out the same everywhere."""
READ_BYTES = 64 << 20
"""Bytes of data files that one task reads at most (a single larger file is one task)."""
TOKENIZER_SUFFIXES = (".json", ".jinja", ".txt", ".model", ".tiktoken", ".py")
"""Endings of a tokenizer's files."""
READ_CPUS = 0.1
QUEUE_BYTES = 128 << 20
"""Records and finished shards that wait in memory between tasks, about."""
Notify = Callable[[str], None]


def shard_set(config: Config, source: Source, split: Split, model: str, with_prompts: bool) -> ShardSet:
    """Name a set by all that decides its content: files, tokenizer, template and options."""
    source = resolve_source(config, source)
    files = tuple(find_files(source))
    options = TokenizeOptions.of(config, with_prompts)
    sample = RandomSample(source.num_samples, config.run.seed) if source.num_samples else None
    # Texts to continue are cut when rows are planned, so that their shards serve every length of row.
    decisive = asdict(options) if config.stage == "sft" else {"stage": "pt", "control_tokens": options.control_tokens}
    identity = {
        "version": CACHE_VERSION,
        "files": [(Path(file.path).name, file.identity) for file in files],
        "source": source.model_dump(mode="json", exclude={"path", "weight"}),
        "split": split,
        "holdout": config.data.holdout if split != "all" else 0,
        "options": decisive,
        "tokenizer": _tokenizer_identity(model),
        "template": config.chat_template,
        "sample": asdict(sample) if sample else None,
    }
    key = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:24]
    return ShardSet(
        source=source,
        split=split,
        files=files,
        options=options,
        holdout=config.data.holdout,
        sample=sample,
        directory=config.cache_directory / "shards" / f"{source.name}-{split}-{key}",
    )


def _tokenizer_identity(model: str) -> str:
    """Hash of all files that may decide how a model tokenizes and renders: of a folder all but the weights, of a model on the
    hub its commit."""
    folder = Path(local_copy(model))
    if not folder.is_dir():
        from transformers import PreTrainedConfig

        return f"{model}@{PreTrainedConfig.get_config_dict(model)[0].get('_commit_hash')}"
    digest = hashlib.sha256()
    for path in sorted(path for path in folder.rglob("*") if path.suffix in TOKENIZER_SUFFIXES and path.is_file()):
        digest.update(str(path.relative_to(folder)).encode() + b"\0" + hashlib.sha256(path.read_bytes()).digest())
    return digest.hexdigest()


def build_shards(
    sets: Sequence[ShardSet],
    model: str,
    max_rejected: float,
    chat_template: str | None = None,
    notify: Notify = lambda line: None,
    runs_code: bool = False,
) -> list[Manifest]:
    """Tokenize what is not in the cache yet, all missing sets in one pass of Ray Data, and give the manifests of all.

    Args:
        sets: what is wanted.
        model: folder or hub id that holds the tokenizer.
        max_rejected: share of a set's records that may be unusable.
        chat_template: Jinja text to use instead of the tokenizer's own.
        notify: takes lines that say how far it is.
        runs_code: code that comes with the model may run.

    Raises:
        RequestError: too many records cannot be used, one is longer than a row, or none is left.
    """
    # A set may stand among the training and the evaluation sets; written twice it would hold everything twice.
    missing = list({each.directory: each for each in sets if not is_complete(each.manifest)}.values())
    written: dict[StoragePath, list[Shard]] = {}
    if missing:
        written = _write_missing(missing, partial(Tokenizer.load, model, chat_template, runs_code), notify)
    for parts in _by_source(missing):
        _refuse_overflow(parts, written)
        rejected = [item for each in parts for shard in written[each.directory] for item in shard.rejected]
        records = sum(shard.records for each in parts for shard in written[each.directory])
        _check_rejected(parts[0].source.name, rejected, records, max_rejected)
        for each in parts:
            _refuse_empty(each, written[each.directory])
    for each in missing:
        save_manifest(each.manifest, each.source.name, written[each.directory])
    manifests = {each.directory: load_manifest(each.manifest, reused=each.directory not in written) for each in sets}
    for parts in _by_source(sets):
        whole = [manifests[each.directory] for each in parts]
        rejected = [item for manifest in whole for item in manifest.rejected]
        _check_rejected(parts[0].source.name, rejected, sum(each.records for each in whole), max_rejected)
    return [manifests[each.directory] for each in sets]


def _by_source(sets: Sequence[ShardSet]) -> list[list[ShardSet]]:
    """Sets that are parts of the same source, which is read once for all of them and judged as a whole."""
    parts: dict[tuple[str, tuple[DataFile, ...]], dict[StoragePath, ShardSet]] = {}
    for each in sets:
        parts.setdefault((each.source.model_dump_json(), each.files), {})[each.directory] = each
    return [list(group.values()) for group in parts.values()]


def _write_missing(
    missing: Sequence[ShardSet], load_tokenizer: Callable[[], Tokenizer], notify: Notify
) -> dict[StoragePath, list[Shard]]:
    import ray

    cpus = ray.cluster_resources().get("CPU", 1.0)
    # Processes for the tasks start, and import what these need, while the tokenizer is loaded here.
    ready = ray.remote(num_cpus=TASK_CPUS - READ_CPUS)(_warm_up)
    starting = [ready.remote() for _ in range(max(1, int(cpus)))]
    tokenizer = load_tokenizer()
    del starting
    sets = _by_source(missing)
    tasks = [
        {"task": (number, files, parts[0].source.max_examples, parts[0].sample)}
        for number, parts in enumerate(sets)
        for files in _read_tasks(parts[0])
    ]
    # Ray counts what waits at the start, and reading tasks give more later.
    warnings.filterwarnings("ignore", message="The maximum number of concurrent tasks", category=UserWarning)

    def pool(size: float) -> Any:
        return ray.data.TaskPoolStrategy(size=max(1, int(size)))

    context = ray.data.DataContext.get_current().copy()
    context.execution_options.preserve_order = True
    context.enable_progress_bars = False
    context.issue_detectors_config.high_memory_detector_config.detection_time_interval_s = -1
    # Reading is quicker than tokenizing: it is not to fill the memory with what waits.
    context.execution_options.resource_limits = ray.data.ExecutionResources(object_store_memory=QUEUE_BYTES)
    # Half of that for each of the two: else records that wait take all, and tokenizing may go on with one task alone.
    context.op_resource_reservation_ratio = 1.0
    context.target_max_block_size = 1  # each row, some records or a shard, travels by itself
    by_set: dict[StoragePath, list[Shard]] = {each.directory: [] for each in missing}
    with ray.data.DataContext.current(context):
        rows = (
            ray.data.from_items(tasks, override_num_blocks=len(tasks))
            .flat_map(_read_task, num_cpus=READ_CPUS, compute=pool(cpus / 4))
            .flat_map(
                partial(_tokenize_task, sets=sets, tokenizer=tokenizer),
                num_cpus=TASK_CPUS - READ_CPUS,
                # One task more than there are cores: Ray Data needs a tenth of a second to follow one by the next.
                compute=pool(cpus + max(1, cpus / 4)),
            )
            .iter_rows()
        )
        progress = _ProgressReport(notify)
        for row in rows:
            if row["failed"]:
                raise RequestError(row["failed"])
            shard: Shard = pickle.loads(row["shard"])
            by_set[StoragePath(row["directory"])].append(shard)
            progress.add(shard)
    return by_set


class _ProgressReport:
    """Says every few seconds how far tokenizing is."""

    def __init__(self, notify: Notify, seconds: float = 10.0) -> None:
        self.notify, self.seconds = notify, seconds
        self.begun = self.told = time.monotonic()
        self.records = self.tokens = 0

    def add(self, shard: Shard) -> None:
        self.records += shard.records
        self.tokens += int(shard.lengths.sum())
        now = time.monotonic()
        if now - self.told >= self.seconds:
            self.told = now
            speed = self.tokens / (now - self.begun)
            self.notify(f"tokenizing: {self.records:,} records, {self.tokens:,} tokens, {speed:,.0f} tokens/s")


def _warm_up() -> None:
    """Ray task: import what the tasks need."""
    import ray.data  # noqa: F401
    import transformers.utils.chat_template_utils  # noqa: F401


def _read_tasks(each: ShardSet) -> Iterator[tuple[DataFile, ...]]:
    """Files for one reading task."""
    if each.source.max_examples or each.sample:
        yield each.files  # records are counted over all files
        return
    files: list[DataFile] = []
    for file in each.files:
        if files and sum(f.size for f in files) + file.size > READ_BYTES:
            yield tuple(files)
            files = []
        files.append(file)
    yield tuple(files)


def _read_task(row: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Ray task: read files; one row out for the records of each shard."""
    reading, files, limit, sample = row["task"]
    try:
        for records in record_batches(files, limit, sample):
            yield {"reading": reading, "records": pickle.dumps(records), "failed": ""}
    except RequestError as error:
        yield {"reading": reading, "records": b"", "failed": str(error)}


def record_batches(
    files: Sequence[DataFile], limit: int | None = None, sample: RandomSample | None = None
) -> Iterator[list[tuple[str, RawRecord]]]:
    """Records of files with their places, as many at a time as one task tokenizes.

    Args:
        files: where to read.
        limit: records to read at most.
        sample: takes them from a part drawn at random.
    """
    records: list[tuple[str, RawRecord]] = []
    total = 0

    def read() -> Iterator[tuple[str, int, RawRecord]]:
        return ((f"{file.path}:{position}", size, raw) for file in files for position, size, raw in read_raw(file))

    for where, size, raw in sample.select(read, limit) if sample else islice(read(), limit):
        if records and (len(records) >= SHARD_RECORDS or total + size > SHARD_BYTES):
            yield records
            records, total = [], 0
        records.append((where, raw))
        total += size
    yield records


def _tokenize_task(
    row: dict[str, Any], sets: Sequence[Sequence[ShardSet]], tokenizer: Tokenizer
) -> Iterator[dict[str, Any]]:
    """Ray task: render, tokenize and write shards; one row out for each part of the source."""
    # There is a task for each core: threads of their own would only get in each other's way.
    os.environ.setdefault("RAYON_NUM_THREADS", "1")
    failed = row["failed"]
    if not failed:
        parts = sets[row["reading"]]
        try:
            for each, shard in zip(parts, write_shards(parts, pickle.loads(row["records"]), tokenizer), strict=True):
                yield {"directory": each.directory.location, "shard": pickle.dumps(shard), "failed": ""}
            return
        except RequestError as error:
            failed = str(error)
    yield {"directory": "", "shard": b"", "failed": failed}


def _refuse_overflow(parts: Sequence[ShardSet], written: Mapping[StoragePath, Sequence[Shard]]) -> None:
    """Stop before a manifest is written, so that mended data is read again."""
    dropped = [item for each in parts for shard in written[each.directory] for item in shard.dropped]
    if dropped and parts[0].options.on_overflow == "error":
        more = f" (and {len(dropped) - 1} more)" if len(dropped) > 1 else ""
        raise RequestError(
            f"{dropped[0].record}: {dropped[0].reason}{more}; raise it, or set data.on_overflow to truncate, split or drop"
        )


def _refuse_empty(each: ShardSet, shards: Sequence[Shard]) -> None:
    if any(shard.name for shard in shards):
        return
    split = {"train": "the part to train on", "holdout": "the held-out part"}.get(each.split)
    what = f"{split} (data.holdout={each.holdout:g})" if split else "the source"
    paths = ", ".join(dict.fromkeys(file.path for file in each.files))
    records, dropped = sum(shard.records for shard in shards), sum(len(shard.dropped) for shard in shards)
    rejected = next((item for shard in shards for item in shard.rejected), None)
    why = f"; {rejected.record}: {rejected.reason}" if rejected else ""
    if dropped:
        longest, limit = max(shard.longest_dropped for shard in shards), each.options.sequence_length
        why = (
            f"; {dropped} were dropped because they are longer than data.sequence_length={limit} "
            f"(the longest has {longest} tokens){why}"
        )
        remedy = "raise it, or set data.on_overflow to truncate or split"
    elif rejected:
        remedy = "mend the data"
    else:
        remedy = "add data, or raise data.holdout" if each.split == "holdout" else "add data"
    raise RequestError(
        f"source {each.source.name!r}: {what} has no usable example ({records} records in {paths:.100}){why}; {remedy}"
    )


def _check_rejected(name: str, rejected: Sequence[Rejected], records: int, max_rejected: float) -> None:
    if len(rejected) > max_rejected * records:
        more = f" (and {len(rejected) - 1} more of {records} records of {name!r})" if len(rejected) > 1 else ""
        raise RequestError(
            f"{rejected[0].record}: {rejected[0].reason}{more}; mend it, or raise data.max_rejected={max_rejected:g}"
        )
