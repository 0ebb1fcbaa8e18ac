"""Detect the format of a record from its columns, and read its fields."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from raysft.config import Source
from raysft.data.sources.json_stream import JSON
from raysft.data.types import Record

REQUIRED_FIELDS = {
    "openai": ("messages",),
    "sharegpt": ("conversations",),
    "tokenized": ("input_ids",),
    "prompt_completion": ("prompt", "completion"),
    "alpaca": ("instruction", "output"),
    "turns": ("turns",),
    "text": ("text",),
    "texts": ("texts",),
}
"""Format → the fields that it requires. Formats are tried in this order."""
ALTERNATIVE_FIELD = {"instruction": "input"}
"""Required field → a field that may replace it."""
ANSWER_FIELDS = {"alpaca": "output", "prompt_completion": "completion"}
"""Format → the field with the answer; a record without it is a prompt to generate from."""
LIST_FIELDS = ("messages", "conversations", "history", "turns", "texts", "input_ids", "labels")
"""Fields whose values are lists; in a text column they are JSON."""
FieldReader = Callable[[str], Any]
"""Function from a field to its value in a record."""


def field_reader(record: Record, source: Source) -> FieldReader:
    """Return a function that reads fields of a record."""

    def read(field: str) -> Any:
        column = source.column(field)
        value = None if column is None else record.get(column)
        return _from_json(value) if field in LIST_FIELDS and isinstance(value, str) else value

    return read


def filled_columns(record: Record) -> tuple[str, ...]:
    """Columns with a value that is neither null nor empty."""
    return tuple(column for column, value in record.items() if value is not None and value != "")


def detect_format(record: Record, source: Source, previous: str) -> str:
    """Format of a record; if its columns fit no format, the format of the previous record, to report what it lacks.

    Raises:
        ValueError: the columns fit no format, and there is no previous record.
    """
    try:
        return _detect(record, source)
    except ValueError:
        if not previous:
            raise
        return previous


def _detect(record: Record, source: Source) -> str:
    columns, filled = set(record) - {None}, set(filled_columns(record)) - {None}

    def has(field: str, among: set[str]) -> bool:
        names = (field, ALTERNATIVE_FIELD.get(field))
        return any(name is not None and source.column(name) in among for name in names)

    # Prefer a format whose required columns all exist; else take one whose first column exists, and report what is missing.
    # At least one required column must have a value, unless all are empty: other records of a CSV or Parquet file may
    # have another format, and leave the columns of this one empty.
    for required in (None, 1):
        for nonempty in (filled, columns):
            for form, fields in REQUIRED_FIELDS.items():
                complete = all(has(field, columns) for field in fields[:required])
                if complete and any(has(field, nonempty) for field in fields):
                    return form
    raise ValueError(
        f"no known format has the columns {', '.join(map(str, record)) or '(none)'}; "
        "set data.train[].format and data.train[].columns"
    )


def check_columns(record: Record, form: str, source: Source) -> str:
    """Check that a record has all columns that its format requires.

    Returns:
        Why it has no answer, if only that is missing; else an empty text.

    Raises:
        ValueError: another one is missing, null or not read.
    """
    unanswered = ""
    for field in REQUIRED_FIELDS[form]:
        names = [source.column(name) for name in (field, ALTERNATIVE_FIELD.get(field)) if name]
        columns = [column for column in names if column is not None]
        if any(record.get(column) is not None for column in columns):
            continue
        if not columns and field in ALTERNATIVE_FIELD:
            continue  # an instruction of which nothing is read is empty
        if columns:
            problem = f"column {columns[0]!r} is {'null' if columns[0] in record else 'missing'}"
        else:
            problem = f"data.train[].columns excludes {field!r}"
        reason = (
            f"format {form} requires {field!r}, but {problem} (columns: {', '.join(map(str, record))}); "
            "fill the column, or map another one in data.train[].columns"
        )
        if field != ANSWER_FIELDS.get(form):
            raise ValueError(reason)
        unanswered = reason
    return unanswered


def _from_json(text: str) -> Any:
    """Decode a text as JSON; return the text itself if it is not JSON."""
    try:
        return JSON.decode(text) if text.strip() else None
    except (ValueError, RecursionError):
        return text
