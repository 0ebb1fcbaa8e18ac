"""Tokenize the records of a source and write one shard for each of its splits."""

from __future__ import annotations

import gc
import uuid
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import replace
from operator import itemgetter
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from raysft.data.shards.manifest import Shard
from raysft.data.shards.media_column import media_column
from raysft.data.shards.shard_set import ShardSet
from raysft.data.sources.content import content_digest, piece_digest
from raysft.data.sources.formats import to_examples
from raysft.data.sources.media import MediaOpener
from raysft.data.sources.readers import RawRecord
from raysft.data.tokenization.tokenize import ExampleTokenizer
from raysft.data.tokenization.tokenized_example import Overflow, TokenizedExample
from raysft.data.tokenization.tokenizer import Tokenizer
from raysft.data.tokenization.turn_ends import TurnObservation
from raysft.data.types import Example, Rejected
from raysft.errors import RequestError

TOKENIZE_BATCH = 500
"""Examples tokenized in one call."""


def write_shards(
    sets: Sequence[ShardSet], records: Iterable[tuple[str, RawRecord]], tokenizer: Tokenizer
) -> list[Shard]:
    """Tokenize records of one source, and write one shard for each of its sets."""
    # Tokenizing creates thousands of small objects that all stay alive; garbage collection would only scan them repeatedly.
    gc.disable()
    try:
        return _write_shards(sets, records, tokenizer)
    finally:
        gc.enable()


def _write_shards(
    sets: Sequence[ShardSet], records: Iterable[tuple[str, RawRecord]], tokenizer: Tokenizer
) -> list[Shard]:
    writers = [ShardWriter(shard_set, ExampleTokenizer(tokenizer, shard_set.options)) for shard_set in sets]
    # A record that cannot be read has no opening to hash; it counts for the split that is trained on.
    reject_into = next((writer for writer in writers if writer.shard_set.split != "holdout"), None)
    columns_seen = set[str]()
    for item, form in to_examples(records, sets[0].source, columns_seen):
        if isinstance(item, Rejected):
            if reject_into:
                reject_into.reject(item)
            continue
        _check_stage(item, sets[0])
        for writer in writers:
            if not writer.shard_set.includes(item):
                continue
            if item.unanswered and not writer.shard_set.takes_prompts:
                writer.reject(Rejected(item.source, item.record, item.unanswered))
            else:
                writer.add(item, form)
    named = columns_seen.intersection(filter(None, sets[0].source.columns.values()))
    return [replace(writer.finish(), columns=tuple(sorted(named))) for writer in writers]


class ShardWriter:
    """Collects the examples of one shard, tokenizes them in batches and writes the file."""

    def __init__(self, shard_set: ShardSet, tokenize: ExampleTokenizer) -> None:
        self.shard_set, self.tokenize = shard_set, tokenize
        self.open_media = MediaOpener(shard_set.media, {file.path: file.uri for file in shard_set.files})
        self.pending: list[Example] = []
        self.examples: list[TokenizedExample] = []
        self.digests: list[bytes] = []
        self.rejected: list[Rejected] = []
        self.dropped: list[Rejected] = []
        self.longest_dropped = 0
        self.counts = Counter[str]()
        self.turns = Counter[TurnObservation]()
        self.formats: set[str] = set()
        self.records = 0

    def reject(self, rejected: Rejected) -> None:
        """Count a record that could not be read."""
        self.records += 1
        self.rejected.append(rejected)

    def add(self, example: Example, form: str) -> None:
        """Add an example, and the format of its record."""
        self.records += 1
        self.formats.add(form)
        self.pending.append(example)
        if len(self.pending) == TOKENIZE_BATCH:
            self._tokenize_pending()

    def _tokenize_pending(self) -> None:
        # A model for text alone refuses images, wherever they are.
        opened = list(self.open_media(self.pending)) if self.tokenize.processor else self.pending
        self.rejected += [item for item in opened if isinstance(item, Rejected)]
        examples = [item for item in opened if isinstance(item, Example)]
        digests = {example.record: content_digest(example) for example in examples}
        pieces = Counter[str]()
        for result in self.tokenize(examples):
            if isinstance(result, TokenizedExample):
                self.examples.append(result)
                self.digests.append(piece_digest(digests[result.record], pieces[result.record]))
                pieces[result.record] += 1
                self.turns.update(turn for _, turn in result.observations)
                for name, number in result.counts:
                    self.counts[name] += number
            elif isinstance(result, Overflow):
                self.dropped.append(result.rejected)
                self.longest_dropped = max(self.longest_dropped, result.tokens)
                self.counts["dropped_tokens"] += result.tokens
            else:
                self.rejected.append(result)
        self.pending = []

    def finish(self) -> Shard:
        """Write the file, and return what the manifest needs to know about it."""
        if self.pending:
            self._tokenize_pending()
        name = f"{uuid.uuid4().hex}.parquet" if self.examples else ""
        if name:
            table = _table(self.examples, self.shard_set.options.with_prompts)
            (self.shard_set.directory / name).write(lambda stream: pq.write_table(table, stream, compression="zstd"))
        return Shard(
            name=name,
            records=self.records,
            lengths=np.array([len(example.input_ids) for example in self.examples], np.int32),
            loss_tokens=np.array([example.loss_tokens for example in self.examples], np.int32),
            weights=np.array([example.weight for example in self.examples], np.float32),
            rejected=tuple(self.rejected),
            dropped=tuple(self.dropped),
            longest_dropped=self.longest_dropped,
            counts=dict(self.counts + self.open_media.counts),
            largest_token=max(
                ((example.largest, example.record) for example in self.examples), key=itemgetter(0), default=(0, "")
            ),
            turns=self.turns,
            formats=tuple(sorted(self.formats)),
            digests=np.frombuffer(b"".join(self.digests), np.uint64).reshape(-1, 2),
            media=sum(max(len(example.media), len(example.prompt_media)) for example in self.examples),
            unusable=self.open_media.unusable,
        )


def _check_stage(example: Example, shard_set: ShardSet) -> None:
    stage, name = shard_set.options.stage, shard_set.source.name
    is_text = bool(example.text) and example.prompt_length is None
    if example.ids or (stage == "pt") == is_text:
        return
    if is_text:
        raise RequestError(
            f"{example.record}: stage: {stage} trains on conversations, but source {name!r} contains raw text; "
            "set stage: pt, or another format for the source"
        )
    raise RequestError(
        f"{example.record}: stage: {stage} trains on raw text, but source {name!r} contains conversations; "
        "set stage: sft, or format: text for the source"
    )


def _table(examples: Sequence[TokenizedExample], with_prompts: bool) -> pa.Table:
    columns: dict[str, Any] = {
        "input_ids": _list_column([example.input_ids for example in examples]),
        "labels": _list_column([example.labels for example in examples]),
        "source": pa.array([example.source for example in examples]).dictionary_encode(),
        "record": pa.array([example.record for example in examples]),
    }
    if with_prompts:
        columns["prompt"] = pa.array([example.prompt for example in examples])
        columns["prompt_ids"] = _list_column([example.prompt_ids for example in examples])
        columns["reference"] = pa.array([example.reference for example in examples])
        if any(example.prompt_media for example in examples):
            columns["prompt_media"] = media_column([example.prompt_media for example in examples])
    if any(example.media for example in examples):
        columns["media"] = media_column([example.media for example in examples])
    return pa.table(columns)


def _list_column(arrays: Sequence[np.ndarray]) -> pa.Array:
    """Build one column of lists from int32 arrays."""
    offsets = np.concatenate([[0], np.cumsum([len(array) for array in arrays])]).astype(np.int32)
    return pa.ListArray.from_arrays(pa.array(offsets), pa.array(np.concatenate(arrays)))
