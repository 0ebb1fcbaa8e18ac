"""Records of a source → one shard for each part of it."""

from __future__ import annotations

import gc
import uuid
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from operator import itemgetter
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from raysft.config import Source
from raysft.data.shards.manifest import Shard
from raysft.data.sources.files import DataFile
from raysft.data.sources.formats import to_examples
from raysft.data.sources.holdout import is_held_out
from raysft.data.sources.readers import RawRecord
from raysft.data.sources.sampling import RandomSample
from raysft.data.tokenization.tokenize import ExampleTokenizer
from raysft.data.tokenization.tokenized_example import Overflow, TokenizedExample, TokenizeOptions
from raysft.data.tokenization.tokenizer import Tokenizer
from raysft.data.tokenization.turn_ends import TurnObservation
from raysft.data.types import Example, Rejected
from raysft.errors import RequestError
from raysft.storage.path import StoragePath

TOKENIZE_BATCH = 500
"""Examples that are tokenized at once."""
Split = Literal["all", "train", "holdout"]


@dataclass(frozen=True)
class ShardSet:
    """What is to be tokenized: one part of one source, under one key."""

    source: Source
    split: Split
    files: tuple[DataFile, ...]
    options: TokenizeOptions
    holdout: float
    sample: RandomSample | None
    """Which of the records, where not all or the first."""
    directory: StoragePath
    """Folder of this key in the cache."""

    @property
    def manifest(self) -> StoragePath:
        """The file that makes the set complete."""
        return self.directory / "manifest.parquet"

    def takes(self, example: Example) -> bool:
        """Whether an example belongs to this part of the source."""
        return self.split == "all" or (self.split == "holdout") == is_held_out(example, self.holdout)


def write_shards(
    parts: Sequence[ShardSet], records: Iterable[tuple[str, RawRecord]], tokenizer: Tokenizer
) -> list[Shard]:
    """Tokenize some records of a source into one shard for each of its parts."""
    # Thousands of small objects are made that all stay: the collector would look through them again and again.
    gc.disable()
    try:
        return _write_shards(parts, records, tokenizer)
    finally:
        gc.enable()


def _write_shards(
    parts: Sequence[ShardSet], records: Iterable[tuple[str, RawRecord]], tokenizer: Tokenizer
) -> list[Shard]:
    drafts = [ShardWriter(each, ExampleTokenizer(tokenizer, each.options)) for each in parts]
    # What cannot be read belongs to the part that is trained on.
    main = next((draft for draft in drafts if draft.split.split != "holdout"), None)
    for item, form in to_examples(records, parts[0].source):
        if isinstance(item, Rejected):
            if main:
                main.reject(item)
            continue
        _check_stage(item, parts[0])
        for draft in drafts:
            if draft.split.takes(item):
                draft.add(item, form)
    return [draft.finish() for draft in drafts]


class ShardWriter:
    """A shard that is being written."""

    def __init__(self, split: ShardSet, tokenizing: ExampleTokenizer) -> None:
        self.split, self.tokenizing = split, tokenizing
        self.waiting: list[Example] = []
        self.examples: list[TokenizedExample] = []
        self.rejected: list[Rejected] = []
        self.dropped: list[Rejected] = []
        self.longest_dropped = 0
        self.counts = Counter[str]()
        self.turns = Counter[TurnObservation]()
        self.formats: set[str] = set()
        self.records = 0

    def reject(self, rejected: Rejected) -> None:
        self.records += 1
        self.rejected.append(rejected)

    def add(self, example: Example, form: str) -> None:
        self.records += 1
        self.formats.add(form)
        self.waiting.append(example)
        if len(self.waiting) == TOKENIZE_BATCH:
            self._tokenize()

    def _tokenize(self) -> None:
        for outcome in self.tokenizing(self.waiting):
            if isinstance(outcome, TokenizedExample):
                self.examples.append(outcome)
                self.turns.update(turn for _, turn in outcome.observations)
                for name, number in outcome.counts:
                    self.counts[name] += number
            elif isinstance(outcome, Overflow):
                self.dropped.append(outcome.rejected)
                self.longest_dropped = max(self.longest_dropped, outcome.tokens)
                self.counts["dropped_tokens"] += outcome.tokens
            else:
                self.rejected.append(outcome)
        self.waiting = []

    def finish(self) -> Shard:
        if self.waiting:
            self._tokenize()
        name = f"{uuid.uuid4().hex}.parquet" if self.examples else ""
        if name:
            table = _table(self.examples, self.split)
            (self.split.directory / name).write(lambda stream: pq.write_table(table, stream, compression="zstd"))
        return Shard(
            name=name,
            records=self.records,
            lengths=np.array([len(each.input_ids) for each in self.examples], np.int32),
            loss_tokens=np.array([each.loss_tokens for each in self.examples], np.int32),
            weights=np.array([each.weight for each in self.examples], np.float32),
            rejected=tuple(self.rejected),
            dropped=tuple(self.dropped),
            longest_dropped=self.longest_dropped,
            counts=dict(self.counts),
            largest_token=max(
                ((each.largest, each.record) for each in self.examples), key=itemgetter(0), default=(0, "")
            ),
            turns=self.turns,
            formats=tuple(sorted(self.formats)),
        )


def _check_stage(example: Example, each: ShardSet) -> None:
    text = bool(example.text) and example.prompt_length is None
    if not example.ids and (each.options.stage == "pt") != text:
        have, want = ("raw text", "conversations") if text else ("conversations", "format: text")
        raise RequestError(
            f"{example.record}: source {each.source.name!r} holds {have} and stage: {each.options.stage} wants {want}; "
            "change the stage or the source's format"
        )


def _table(examples: Sequence[TokenizedExample], each: ShardSet) -> pa.Table:
    columns: dict[str, Any] = {
        "input_ids": _lists([example.input_ids for example in examples]),
        "labels": _lists([example.labels for example in examples]),
        "source": pa.array([example.source for example in examples]).dictionary_encode(),
        "record": pa.array([example.record for example in examples]),
    }
    if each.options.with_prompts:
        columns["prompt"] = pa.array([example.prompt for example in examples])
        columns["prompt_ids"] = _lists([example.prompt_ids for example in examples])
        columns["reference"] = pa.array([example.reference for example in examples])
    return pa.table(columns)


def _lists(arrays: Sequence[np.ndarray]) -> pa.Array:
    """Arrays of int32 as one column of lists."""
    offsets = np.concatenate([[0], np.cumsum([len(array) for array in arrays])]).astype(np.int32)
    return pa.ListArray.from_arrays(pa.array(offsets), pa.array(np.concatenate(arrays)))
