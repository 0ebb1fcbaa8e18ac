"""Tokenized examples as Parquet shards in a content-addressed cache, written once, in parallel, by Ray Data.

A set of shards is complete exactly when its manifest is there: shards get names of their own, and the manifest, which names
them, is put in place last in one atomic move. Two runs that write the same set at once both leave a whole one.
"""

from __future__ import annotations

import hashlib
import json
import uuid
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from raysft.config import Config, RequestError, Source
from raysft.data.files import DataFile, find_files
from raysft.data.holdout import is_held_out
from raysft.data.manifest import Manifest, load, save
from raysft.data.read import read
from raysft.data.tokenize import Tokenized, Tokenizer
from raysft.records import Example, Rejected

VERSION = 1
"""Part of every key: raise it when the same input would give other shards."""
SHARD_EXAMPLES = 10_000
"""Examples in a shard at most."""
TASK_BYTES = 16 << 20
"""Bytes of data files that one task reads at most (a single larger file is one task)."""
TASK_CPUS = 0.5
"""What a data task asks of Ray: tasks must find room beside training workers on a small machine."""
BATCH = 500
"""Examples that are tokenized at once."""
Part = Literal["all", "train", "holdout"]


@dataclass(frozen=True)
class ShardSet:
    """What is to be tokenized: one part of one source, under one key."""

    source: Source
    part: Part
    files: tuple[DataFile, ...]
    tokenizer: Tokenizer
    holdout: float
    stage: str
    overlong: str
    directory: Path
    """Folder of this key in the cache."""

    @property
    def manifest(self) -> Path:
        """The file that makes the set complete."""
        return self.directory / "manifest.parquet"


def shard_set(config: Config, source: Source, part: Part, model: str, with_prompts: bool) -> ShardSet:
    """Name a set by all that decides its content: files, tokenizer, template and options."""
    files = tuple(find_files(source))
    tokenizer = Tokenizer(
        model=model,
        sequence_length=config.data.sequence_length,
        mask_history=config.data.mask_history,
        train_on_prompt=config.data.train_on_prompt,
        with_prompts=with_prompts,
    )
    identity = {
        "version": VERSION,
        "files": [(file.path, file.identity) for file in files],
        "source": source.model_dump(mode="json", exclude={"path"}),
        "part": part,
        "holdout": config.data.holdout if part != "all" else 0,
        "stage": config.stage,
        "overlong": config.data.overlong,
        "tokenizer": {**asdict(tokenizer), "model": _tokenizer_identity(model)},
    }
    key = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:24]
    return ShardSet(
        source=source,
        part=part,
        files=files,
        tokenizer=tokenizer,
        holdout=config.data.holdout,
        stage=config.stage,
        overlong=config.data.overlong,
        directory=config.cache_directory / "shards" / f"{source.name}-{part}-{key}",
    )


def _tokenizer_identity(model: str) -> str:
    """Hash of the files that decide how a model tokenizes and renders; of the name where it is no folder."""
    digest = hashlib.sha256()
    folder = Path(model)
    if not folder.is_dir():
        return model
    for name in (
        "tokenizer.json",
        "tokenizer.model",
        "tokenizer_config.json",
        "chat_template.jinja",
        "special_tokens_map.json",
    ):
        if (folder / name).exists():
            digest.update(name.encode() + (folder / name).read_bytes())
    return digest.hexdigest()


def write(sets: Sequence[ShardSet], max_rejected: float) -> list[Manifest]:
    """Tokenize what is not in the cache yet, all missing sets in one pass of Ray Data, and give the manifests of all.

    Raises:
        RequestError: too many records cannot be used, one is longer than a row, or none is left.
    """
    # A set may stand among the training and the evaluation sets; written twice it would hold everything twice.
    missing = list({each.directory: each for each in sets if not each.manifest.exists()}.values())
    written = _write_missing(missing) if missing else {}
    manifests = []
    for each in sets:
        if each in missing:
            _refuse(each, written[each.directory], max_rejected)
            save(each.manifest, each.source.name, written[each.directory])
        manifest = load(each.manifest, reused=each not in missing)
        _check_rejected(each.source.name, manifest.rejected, manifest.records, max_rejected)
        manifests.append(manifest)
    return manifests


def _write_missing(missing: Sequence[ShardSet]) -> dict[Path, list[dict[str, Any]]]:
    import ray

    tasks = [{"task": (each, files)} for each in missing for files in _tasks(each)]
    context = ray.data.DataContext.get_current().copy()
    context.execution_options.preserve_order = True
    context.enable_progress_bars = False
    with ray.data.DataContext.current(context):
        dataset = ray.data.from_items(tasks, override_num_blocks=len(tasks))
        outcome = dataset.flat_map(_run_task, num_cpus=TASK_CPUS).take_all()
    by_set: dict[Path, list[dict[str, Any]]] = {each.directory: [] for each in missing}
    for row in outcome:
        shard = json.loads(row["shard"])
        if shard["failed"]:
            raise RequestError(shard["failed"])
        by_set[Path(shard["directory"])].append({**shard, "lengths": row["lengths"], "trained": row["trained"]})
    return by_set


def _tasks(each: ShardSet) -> Iterator[tuple[DataFile, ...]]:
    """Files for one task. The bounds do not depend on the cluster, so that shards come out the same everywhere."""
    if each.source.max_examples:
        yield each.files  # the first N are counted over all files
        return
    files: list[DataFile] = []
    for file in each.files:
        if files and sum(f.size for f in files) + file.size > TASK_BYTES:
            yield tuple(files)
            files = []
        files.append(file)
    yield tuple(files)


def _run_task(row: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Ray task: read, render, tokenize and write shards; one row out for each of them."""
    each, files = row["task"]
    try:
        for outcome in _write_shards(each, files):
            lengths, trained = outcome.pop("lengths"), outcome.pop("trained")
            yield {"shard": json.dumps(outcome), "lengths": lengths, "trained": trained}
    except RequestError as error:
        empty = np.empty(0, np.int32)
        yield {"shard": json.dumps({"failed": str(error)}), "lengths": empty, "trained": empty}


def _write_shards(each: ShardSet, files: Sequence[DataFile]) -> Iterator[dict[str, Any]]:
    each.directory.mkdir(parents=True, exist_ok=True)
    stream = _tokenized(each, files)
    done = False
    while not done:
        examples: list[Tokenized] = []
        rejected: list[Rejected] = []
        dropped: list[Rejected] = []
        while len(examples) < SHARD_EXAMPLES:
            item = next(stream, None)
            if item is None:
                done = True
                break
            if isinstance(item, Rejected):
                rejected.append(item)
            elif len(item.input_ids) > each.tokenizer.sequence_length:
                dropped.append(_overlong(item, each))
            else:
                examples.append(item)
        name = f"{uuid.uuid4().hex}.parquet"
        if examples:
            pq.write_table(_table(examples, each), each.directory / name, compression="zstd")
        yield {
            "failed": "",
            "directory": str(each.directory),
            "name": name if examples else "",
            "records": len({e.record for e in examples}) + len(rejected) + len(dropped),
            "rejected": [asdict(r) for r in rejected],
            "dropped": [asdict(r) for r in dropped],
            "lengths": np.array([len(e.input_ids) for e in examples], np.int32),
            "trained": np.array([e.trained for e in examples], np.int32),
        }


def _overlong(item: Tokenized, each: ShardSet) -> Rejected:
    reason = f"{len(item.input_ids)} tokens do not fit into data.sequence_length={each.tokenizer.sequence_length}"
    return Rejected(item.source, item.record, reason)


def _tokenized(each: ShardSet, files: Sequence[DataFile]) -> Iterator[Tokenized | Rejected]:
    examples = _examples(each, files)
    while batch := list(islice(examples, BATCH)):
        usable = [item for item in batch if isinstance(item, Example)]
        yield from (item for item in batch if isinstance(item, Rejected))
        yield from each.tokenizer(usable)


def _examples(each: ShardSet, files: Sequence[DataFile]) -> Iterator[Example | Rejected]:
    """The part's examples; what cannot be read belongs to the part that is trained on."""
    counted = 0
    for file in files:
        for item in read(file, each.source):
            if each.source.max_examples and counted >= each.source.max_examples:
                return
            if isinstance(item, Rejected):
                if each.part != "holdout":
                    yield item
                continue
            counted += 1
            _check_stage(item, each)
            if each.part == "all" or (each.part == "holdout") == is_held_out(item, each.holdout):
                yield item


def _check_stage(example: Example, each: ShardSet) -> None:
    if (each.stage == "sft") != bool(example.messages):
        have, want = ("conversations", "format: text") if example.messages else ("raw text", "conversations")
        raise RequestError(
            f"{example.record}: source {each.source.name!r} holds {have} and stage: {each.stage} wants {want}; "
            "change the stage or the source's format"
        )


def _table(examples: Sequence[Tokenized], each: ShardSet) -> pa.Table:
    columns: dict[str, Any] = {
        "input_ids": pa.array([e.input_ids for e in examples], pa.list_(pa.int32())),
        "labels": pa.array([e.labels for e in examples], pa.list_(pa.int32())),
        "source": pa.array([e.source for e in examples]).dictionary_encode(),
        "record": pa.array([e.record for e in examples]),
    }
    if each.tokenizer.with_prompts:
        columns["prompt"] = pa.array([e.prompt for e in examples])
        columns["prompt_ids"] = pa.array([e.prompt_ids for e in examples], pa.list_(pa.int32()))
        columns["reference"] = pa.array([e.reference for e in examples])
    return pa.table(columns)


def _refuse(each: ShardSet, shards: Sequence[dict[str, Any]], max_rejected: float) -> None:
    """Stop before a manifest is written, so that mended data is read again."""
    dropped = [Rejected(**item) for shard in shards for item in shard["dropped"]]
    if dropped and each.overlong == "error":
        more = f" (and {len(dropped) - 1} more)" if len(dropped) > 1 else ""
        raise RequestError(f"{dropped[0].record}: {dropped[0].reason}{more}; raise it, or set data.overlong=drop")
    rejected = [Rejected(**item) for shard in shards for item in shard["rejected"]]
    records = sum(shard["records"] for shard in shards)
    _check_rejected(each.source.name, rejected, records, max_rejected)
    if not any(shard["name"] for shard in shards):
        part = {"train": "the part to train on", "holdout": "the held-out part"}.get(each.part)
        what = f"{part} (data.holdout={each.holdout:g})" if part else "the source"
        paths = ", ".join(dict.fromkeys(file.path for file in each.files))
        raise RequestError(
            f"source {each.source.name!r}: {what} has no usable example ({records} records in {paths:.100}); add data"
        )


def _check_rejected(name: str, rejected: Sequence[Rejected], records: int, max_rejected: float) -> None:
    if len(rejected) > max_rejected * records:
        more = f" (and {len(rejected) - 1} more of {records} records of {name!r})" if len(rejected) > 1 else ""
        raise RequestError(
            f"{rejected[0].record}: {rejected[0].reason}{more}; mend it, or raise data.max_rejected={max_rejected:g}"
        )
