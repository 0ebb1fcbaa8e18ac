"""Tokenized examples as Parquet shards in a content-addressed cache.

A set is complete if and only if its manifest exists. Shards have unique names, and the manifest that lists them is written
last, atomically. So two runs that write the same set at the same time would both leave a complete one; a lock saves them the work.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial

from raysft.data.shards.manifest import Manifest, Shard, is_complete, load_manifest, save_manifest
from raysft.data.shards.parts import remove_parts
from raysft.data.shards.ray_pipeline import Notify, write_shard_sets
from raysft.data.shards.shard_set import ShardSet
from raysft.data.sources.columns import REQUIRED_FIELDS
from raysft.data.sources.files import DataFile
from raysft.data.tokenization.tokenizer import Tokenizer
from raysft.data.types import Rejected
from raysft.errors import RequestError
from raysft.storage.lock import LockDenied, Locked, lock
from raysft.storage.path import StoragePath

WAIT_SECONDS = 0.5
"""Time between two looks whether another run has written a set."""


def build_shards(
    sets: Sequence[ShardSet],
    model: str,
    max_rejected: float,
    chat_template: str | None = None,
    notify: Notify = lambda line: None,
    runs_code: bool = False,
    data_label: str | None = None,
) -> list[Manifest]:
    """Tokenize the sets that the cache lacks, and return the manifests of all sets, in order.

    Args:
        sets: the shard sets; the same set may occur twice.
        model: folder or Hub id of the model whose tokenizer is used.
        max_rejected: fraction of a source's records that may be unusable.
        chat_template: Jinja text to use instead of the tokenizer's own.
        notify: called with lines about the progress.
        runs_code: allow code that comes with the model to run.
        data_label: of the nodes for data, where tasks run. Default: all nodes.

    Raises:
        RequestError: too many records are unusable, one is longer than a row, or a set has no examples.
        RunStopped: the run was asked to stop; shards that are written are found again.
    """
    # Training and evaluation may use the same set; writing it twice would store every example twice.
    distinct = list({shards.directory: shards for shards in sets}.values())
    written: dict[StoragePath, list[Shard]] = {}
    with _missing(distinct, notify) as missing:
        if missing:
            _tell_of_mended(missing, notify)
            load_tokenizer = partial(Tokenizer.load, model, chat_template, runs_code)
            written = write_shard_sets(_by_source(missing), load_tokenizer, notify, data_label)
        for group in _by_source(missing):
            _refuse_overflow(group, written)
            shards = [shard for shard_set in group for shard in written[shard_set.directory]]
            rejected = [item for shard in shards for item in shard.rejected]
            _check_rejected(group[0].source.name, rejected, sum(shard.records for shard in shards), max_rejected)
            for shard_set in group:
                _refuse_empty(shard_set, written[shard_set.directory])
            _refuse_absent_columns(group[0], shards)
        for shard_set in missing:
            save_manifest(shard_set.manifest, shard_set.source.name, written[shard_set.directory])
            remove_parts(shard_set.directory)
    manifests = {
        shard_set.directory: load_manifest(shard_set.manifest, reused=shard_set.directory not in written)
        for shard_set in sets
    }
    # A set of the cache may have been written under a more lenient limit.
    for group in _by_source(sets):
        loaded = [manifests[shard_set.directory] for shard_set in group]
        rejected = [item for manifest in loaded for item in manifest.rejected]
        _check_rejected(group[0].source.name, rejected, sum(manifest.records for manifest in loaded), max_rejected)
    return [manifests[shard_set.directory] for shard_set in sets]


@contextmanager
def _missing(sets: Sequence[ShardSet], notify: Notify) -> Iterator[list[ShardSet]]:
    """Yield the sets that the cache lacks, with a lock on each; wait for those that another run is writing."""
    with ExitStack() as locks:
        # All runs take the locks in the same order, so that none waits for one that waits for it.
        ordered = sorted(sets, key=lambda shards: shards.directory.location)
        lacking = [shards.directory for shards in ordered if _take(shards, locks, notify)]
        yield [shards for shards in sets if shards.directory in lacking]


def _take(shards: ShardSet, locks: ExitStack, notify: Notify) -> bool:
    """Return True, with the set's lock, if the cache lacks the set."""
    told = False
    while not is_complete(shards.manifest):
        try:
            locks.enter_context(lock(shards.directory, notify))
        except LockDenied:
            return True  # it is written anyway, or the storage says why not
        except OSError as error:
            raise RequestError(
                f"data.cache: {shards.directory.parent} does not contain the tokenized data and cannot be written to "
                f"({error.strerror}); choose another folder"
            ) from None
        except Locked as held:
            if not told:
                notify(f"{held}; waiting for it, because it is writing the same data")
            told = True
            time.sleep(WAIT_SECONDS)
        else:
            return not is_complete(shards.manifest)
    return False


def _by_source(sets: Sequence[ShardSet]) -> list[list[ShardSet]]:
    """Group the sets of a source, which is read once for all of them and held to ``data.max_rejected`` as a whole."""
    groups: dict[tuple[str, tuple[DataFile, ...]], dict[StoragePath, ShardSet]] = {}
    for shard_set in sets:
        groups.setdefault((shard_set.source.model_dump_json(), shard_set.files), {})[shard_set.directory] = shard_set
    return [list(group.values()) for group in groups.values()]


def _refuse_overflow(group: Sequence[ShardSet], written: Mapping[StoragePath, Sequence[Shard]]) -> None:
    """Refuse examples that are too long before a manifest is written, so that corrected data is read again."""
    dropped = [item for shard_set in group for shard in written[shard_set.directory] for item in shard.dropped]
    if dropped and group[0].options.on_overflow == "error":
        more = f" (and {len(dropped) - 1} more)" if len(dropped) > 1 else ""
        raise RequestError(
            f"{dropped[0].record}: {dropped[0].reason}{more}; "
            "raise data.sequence_length, or set data.on_overflow to truncate, split or drop"
        )


def _refuse_empty(shard_set: ShardSet, shards: Sequence[Shard]) -> None:
    if any(shard.name for shard in shards):
        return
    split = {"train": "the training split", "holdout": "the held-out split"}.get(shard_set.split)
    subject = f"{split} (data.holdout={shard_set.holdout})" if split else "the source"
    paths = ", ".join(dict.fromkeys(file.path for file in shard_set.files))
    records, dropped = sum(shard.records for shard in shards), sum(len(shard.dropped) for shard in shards)
    counted = f"{records} records {'fall into it' if split else 'read'}"
    rejected = next((item for shard in shards for item in shard.rejected), None)
    reasons = [f"{rejected.record}: {rejected.reason}"] if rejected else []
    if dropped:
        longest, limit = max(shard.longest_dropped for shard in shards), shard_set.options.sequence_length
        reasons.insert(
            0, f"{dropped} dropped as longer than data.sequence_length={limit} (the longest has {longest} tokens)"
        )
        others = "set data.on_overflow to truncate or split"
        if shard_set.options.on_overflow != "drop":  # a single image is longer than a row
            others = "lower data.image_max_pixels"
        remedy = f"raise data.sequence_length, or {others}"
    elif rejected:
        remedy = "correct the data"
    else:
        holdout = {"holdout": ", or raise data.holdout", "train": ", or lower data.holdout"}.get(shard_set.split, "")
        remedy = f"add data{holdout}"
    raise RequestError(
        f"source {shard_set.source.name!r}: {subject} has no usable example in {paths:.100} "
        f"({'; '.join([counted, *reasons])}); {remedy}"
    )


def _refuse_absent_columns(shard_set: ShardSet, shards: Sequence[Shard]) -> None:
    """Refuse a column that is named for an optional field and that no record has: the field would be left out in silence.

    A record without a column of a required field is rejected, or is a prompt without an answer.
    """
    source = shard_set.source
    if shard_set.sample or source.max_examples:
        return  # records that are not read may have it
    required = {field for fields in REQUIRED_FIELDS.values() for field in fields}
    for field, column in source.columns.items():
        optional = column and column != field and field not in required
        if optional and not any(column in shard.columns for shard in shards):
            raise RequestError(
                f"source {source.name!r}: no record has the column {column!r} that {field} is mapped to; correct the name in "
                "data.train[].columns or in the registry, or remove it"
            )


def _tell_of_mended(sets: Sequence[ShardSet], notify: Notify) -> None:
    """Name the images because of which sources are tokenized again, to other data of theirs."""
    for name, file in {shards.source.name: shards.mended for shards in sets if shards.mended}.items():
        notify(
            f"source {name!r}: {StoragePath(file)} was added or changed since a record was rejected because of it, so the "
            "source is tokenized again; a run that started before that can resume once the file is restored"
        )


def _check_rejected(name: str, rejected: Sequence[Rejected], records: int, max_rejected: float) -> None:
    if len(rejected) > max_rejected * records:
        more = f" (and {len(rejected) - 1} more of {records} records of {name!r})" if len(rejected) > 1 else ""
        raise RequestError(
            f"{rejected[0].record}: {rejected[0].reason}{more}; "
            f"correct the data, or raise data.max_rejected={max_rejected:g}"
        )
