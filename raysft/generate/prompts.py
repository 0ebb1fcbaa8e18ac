"""Prompts of a Parquet file, of which a process keeps names and lengths; texts and tokens stay in files."""

from __future__ import annotations

import io
import json
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, BinaryIO, cast

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from raysft.data.types import TokenizedMedium
from raysft.errors import RequestError

COLUMNS = ("id", "source", "prompt", "input_ids", "label")
MEDIA = "media"
"""Column of the prompts' images; a file of prompts without any has none."""
READ_ROWS = 4096
"""Prompts that are read from the file at a time."""
TOKEN_BYTES = 4


@dataclass(frozen=True)
class Prompts:
    """Prompts in the order of their file."""

    ids: list[str]
    """Their unique names."""
    offsets: np.ndarray
    """[prompts + 1] int64: prompt i has the tokens offsets[i] to offsets[i + 1]."""
    tokens: BinaryIO
    """The tokens of all prompts, one after another, as int32."""
    end_tokens: tuple[int, ...] = ()
    """IDs of the tokens that end an answer to these prompts."""
    path: Path | None = None
    """The Parquet file."""
    media: pa.ChunkedArray | None = None
    """[prompts] list of struct: the images of each prompt, as of ``TokenizedMedium``; None if none has any."""

    @classmethod
    def read(cls, path: Path) -> Prompts:
        """Read names, and copy the tokens to a file without a name.

        Raises:
            RequestError: the file is not a Parquet file of prompts, or ids are not unique.
        """
        try:
            file = pq.ParquetFile(path)
            present = file.schema_arrow.names
            missing = [column for column in COLUMNS if column not in present]
            if missing:
                raise RequestError(f"{path}: the prompts lack the column {missing[0]!r} (of {present}); add it")
            ids, lengths, tokens = _read_tokens(file, path.parent)
            media = _read_media(path) if MEDIA in present else None
        except (OSError, pa.ArrowException) as error:
            raise RequestError(f"{path}: the prompts cannot be read as Parquet ({error}); write them again") from None
        metadata = file.schema_arrow.metadata or {}
        prompts = cls(
            ids=ids,
            offsets=np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)]),
            tokens=tokens,
            end_tokens=tuple(json.loads(metadata.get(b"end_tokens", b"[]"))),
            path=path,
            media=media,
        )
        if len(prompts.index) != len(ids):
            raise RequestError(f"{path}: two of {len(ids)} prompts have the same id; make the ids unique")
        return prompts

    @classmethod
    def of(cls, table: pa.Table) -> Prompts:
        """Return prompts of a table with the columns id and input_ids, and perhaps media."""
        ids = table["input_ids"].to_pylist()
        lengths = [len(each) for each in ids]
        tokens = np.array([token for each in ids for token in each], np.int32)
        ends = np.cumsum(lengths, dtype=np.int64)
        media = table[MEDIA] if MEDIA in table.column_names else None
        return cls(table["id"].to_pylist(), np.concatenate([[0], ends]), io.BytesIO(tokens.tobytes()), media=media)

    def __len__(self) -> int:
        return len(self.ids)

    @cached_property
    def index(self) -> dict[str, int]:
        """Number of each prompt, by id."""
        return {id: number for number, id in enumerate(self.ids)}

    def table(self, numbers: np.ndarray) -> pa.Table:
        """Return some prompts as a table with the columns id and input_ids (lists of int32), and media if any prompt has some."""
        starts, lengths = self.offsets[numbers], self.offsets[numbers + 1] - self.offsets[numbers]
        tokens = [self._read(start, length) for start, length in zip(starts.tolist(), lengths.tolist(), strict=True)]
        ends = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
        joined = np.frombuffer(b"".join(tokens), np.int32)
        input_ids = pa.ListArray.from_arrays(pa.array(ends), pa.array(joined, pa.int32()))
        table = pa.table(
            {"id": pa.array([self.ids[number] for number in numbers], pa.string()), "input_ids": input_ids}
        )
        return table if self.media is None else table.append_column(MEDIA, self.media.take(pa.array(numbers)))

    def _read(self, start: int, length: int) -> bytes:
        self.tokens.seek(TOKEN_BYTES * start)
        return self.tokens.read(TOKEN_BYTES * length)

    def texts(self) -> Iterator[dict[str, Any]]:
        """Yield each prompt's columns but its tokens, in order."""
        assert self.path is not None
        columns = [column for column in COLUMNS if column != "input_ids"] + [MEDIA] * (self.media is not None)
        for batch in pq.ParquetFile(self.path).iter_batches(READ_ROWS, columns=columns):
            yield from batch.to_pylist()


@dataclass(frozen=True)
class ModelPrompts:
    """Prompts that one model completes."""

    model: str
    """Location of a model or an adapter."""
    prompts: Prompts
    left: np.ndarray
    """Numbers of the prompts that have no prediction yet, in order."""

    @classmethod
    def all(cls, model: str, prompts: Prompts) -> ModelPrompts:
        """All prompts."""
        return cls(model, prompts, np.arange(len(prompts)))

    def __len__(self) -> int:
        return len(self.left)

    @property
    def ids(self) -> list[str]:
        """Names of the prompts that are left."""
        return [self.prompts.ids[number] for number in self.left]

    def without(self, done: np.ndarray) -> ModelPrompts:
        """Leave out the prompts that are done.

        Args:
            done: [all prompts] bool.
        """
        return replace(self, left=self.left[~done[self.left]])

    def batches(self, size: int) -> Iterator[pa.Table]:
        """Yield groups of prompts of similar length, longest first.

        Similar lengths leave little padding. With the longest first, a lack of memory shows early, and the last batches, for
        which some engines wait for others, are short. A batch that is not full comes first, because the longest prompts differ
        most in length.
        """
        lengths = self.prompts.offsets[self.left + 1] - self.prompts.offsets[self.left]
        ordered = self.left[np.argsort(-lengths, kind="stable")]
        for end in range(len(ordered) % size or size, len(ordered) + 1, size):
            yield self.prompts.table(ordered[max(0, end - size) : end])


def media_of(prompts: pa.Table) -> list[tuple[TokenizedMedium, ...]]:
    """Return the images of each prompt of a table; empty if it has no such column."""
    if MEDIA not in prompts.column_names:
        return []
    return [tuple(TokenizedMedium(**each) for each in media or ()) for media in prompts[MEDIA].to_pylist()]


def _read_media(path: Path) -> pa.ChunkedArray | None:
    column = pq.read_table(path, columns=[MEDIA])[MEDIA]
    return column if pc.sum(pc.list_value_length(column)).as_py() else None  # pyright: ignore[reportAttributeAccessIssue]


def _read_tokens(file: pq.ParquetFile, beside: Path) -> tuple[list[str], np.ndarray, BinaryIO]:
    """Return ids, [prompts] lengths, and a file with the tokens of all prompts, one after another.

    Args:
        file: the prompts.
        beside: folder on whose disk the tokens are kept. Mapped into memory, they would count as this process's.
    """
    ids: list[str] = []
    lengths = [np.empty(0, np.int64)]
    copy = tempfile.TemporaryFile(dir=beside)  # noqa: SIM115  (closed with the last reference to it)
    for batch in file.iter_batches(READ_ROWS, columns=["id", "input_ids"]):
        ids += batch["id"].to_pylist()
        column = batch["input_ids"]
        lengths.append(np.asarray(pc.list_value_length(column)))  # pyright: ignore[reportAttributeAccessIssue]
        copy.write(column.flatten().to_numpy(zero_copy_only=False).astype(np.int32).tobytes())
    return ids, np.concatenate(lengths), cast(BinaryIO, copy)
