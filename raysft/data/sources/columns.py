"""The columns of a record → the format that it has, and the values of its fields."""

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
}
"""What a format needs, in the order in which formats are tried."""
ALTERNATIVE_FIELD = {"instruction": "input"}
"""A field that may stand in the place of one that a format needs."""
LIST_FIELDS = ("messages", "conversations", "history", "turns", "input_ids", "labels")
"""Fields of lists, which a text column holds as JSON."""
FieldReader = Callable[[str], Any]
"""field → its value in the record."""


def field_reader(record: Record, source: Source) -> FieldReader:
    """What gives the values of a record's fields."""

    def read(field: str) -> Any:
        column = source.column(field)
        value = None if column is None else record.get(column)
        return _from_json(value) if field in LIST_FIELDS and isinstance(value, str) else value

    return read


def filled_columns(record: Record) -> tuple[str, ...]:
    """The columns that hold something."""
    return tuple(column for column, value in record.items() if value is not None and value != "")


def detect_format(record: Record, source: Source, before: str) -> str:
    """The format of a record; one that has none is measured by that of the record before."""
    try:
        return _detect(record, source)
    except ValueError:
        if not before:
            raise
        return before


def _detect(record: Record, source: Source) -> str:
    """The format of a record, from its columns.

    Raises:
        ValueError: no format has such columns.
    """
    there, full = set(record) - {None}, set(filled_columns(record)) - {None}

    def has(field: str, columns: set[str]) -> bool:
        return source.column(field) in columns or (
            field in ALTERNATIVE_FIELD and source.column(ALTERNATIVE_FIELD[field]) in columns
        )

    # A format of which everything is there, else one of which the first is: then it is said what else it needs. Where all of
    # it is empty, it is the format of other records of a Parquet or CSV file.
    for needed in (None, 1):
        for columns in (full, there):
            for form, fields in REQUIRED_FIELDS.items():
                whole = all(has(field, there) for field in fields[:needed])
                if whole and any(has(field, columns) for field in fields):
                    return form
    raise ValueError(
        f"no known format has the columns {', '.join(map(str, record)) or '(none)'}; "
        "name data.train[].format and data.train[].columns"
    )


def check_columns(record: Record, form: str, source: Source) -> None:
    """See that everything is there that a format needs.

    Raises:
        ValueError: it is not.
    """
    for field in REQUIRED_FIELDS[form]:
        columns = [source.column(each) for each in (field, ALTERNATIVE_FIELD.get(field)) if each]
        if any(column is not None and record.get(column) is not None for column in columns):
            continue
        if columns[0] is None:
            state = f"no column is read as {field!r}"
        else:
            state = f"column {columns[0]!r} {'is null' if columns[0] in record else 'is not there'}"
        raise ValueError(
            f"{state} (columns here: {', '.join(map(str, record))}); format {form} needs it, "
            "another name can be given in data.train[].columns"
        )


def _from_json(text: str) -> Any:
    """The value that a text holds as JSON; the text itself where it is none."""
    try:
        return JSON.decode(text) if text.strip() else None
    except (ValueError, RecursionError):
        return text
