"""One record of any format → one example, or the reason why it cannot be used."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from decimal import Decimal
from typing import Any

from raysft.config import Source
from raysft.data.sources.columns import (
    REQUIRED_FIELDS,
    FieldReader,
    check_columns,
    detect_format,
    field_reader,
    filled_columns,
)
from raysft.data.sources.messages import parse_turns, require_list, require_text
from raysft.data.sources.readers import RawRecord, Unreadable, parse_record
from raysft.data.sources.tool_calls import nested_strings, parse_tools, tool_schemas
from raysft.data.types import IGNORE_INDEX, Example, Message, Record, Rejected

MIN_WEIGHT = 1e-6
"""Losses of examples further apart than this and its inverse cannot be added up in float32."""


def to_examples(records: Iterable[tuple[str, RawRecord]], source: Source) -> Iterator[tuple[Example | Rejected, str]]:
    """Records of a source as examples, each with the format that it has; what cannot be used says why.

    Args:
        records: (``file:position``, record).
        source: where they are from.
    """
    form, known = "", dict[tuple[str, ...], str]()
    for where, raw in records:
        record = parse_record(raw)
        if isinstance(record, Unreadable):
            yield Rejected(source.name, where, record.reason), form
            continue
        try:
            columns = filled_columns(record)
            form = source.format or known.get(columns) or detect_format(record, source, form)
            known[columns] = form
            yield to_example(record, form, source, where), form
        except ValueError as error:
            yield Rejected(source.name, where, str(error)), form


def to_example(record: Record, form: str, source: Source, where: str) -> Example:
    """One record as an example.

    Raises:
        ValueError: with the reason, where it cannot be used.
    """
    check_columns(record, form, source)
    read = field_reader(record, source)
    weight = _weight(read("weight"))
    if form == "text":
        return Example(source.name, where, text=_full_text(read("text"), "text"), weight=weight)
    if form == "tokenized":
        ids, labels = _token_ids(read)
        return Example(source.name, where, ids=ids, labels=labels, weight=weight)
    if form == "prompt_completion" and isinstance(read("completion"), str):
        prompt = require_text(read("prompt"), "prompt")
        text = prompt + _full_text(read("completion"), "completion")
        return Example(source.name, where, text=text, prompt_length=len(prompt), weight=weight)
    messages = tuple(_messages(form, read, source.tags))
    _check_turns(messages)
    tools = parse_tools(read("tools"))
    if form != "openai":
        tools = tool_schemas(tools)
    for text in nested_strings(tools):
        require_text(text, "tools")
    return Example(source.name, where, messages=messages, tools=tools, weight=weight)


def _messages(form: str, read: FieldReader, tags: Mapping[Any, str]) -> Iterator[Message]:
    system = read("system")
    if form not in ("sharegpt", "openai", "prompt_completion") and system:
        yield Message("system", require_text(system, "system"))
    if form == "alpaca":
        yield from _alpaca(read)
    elif form == "turns":
        for index, turn in enumerate(require_list(read("turns"), "turns")):
            yield Message("assistant" if index % 2 else "user", require_text(turn, f"turns[{index}]"))
    elif form == "prompt_completion":
        for message in parse_turns(read("prompt"), "prompt", tags):
            yield replace(message, trainable=False)
        yield from parse_turns(read("completion"), "completion", tags)
    else:
        column = REQUIRED_FIELDS[form][0]
        turns = list(parse_turns(read(column), column, tags))
        if system and turns[0].role != "system":  # what the conversation itself says goes before what its record says
            yield Message("system", require_text(system, "system"))
        yield from turns


def _alpaca(read: FieldReader) -> Iterator[Message]:
    history = read("history")
    for index, pair in enumerate(require_list(history, "history") if history else []):
        if not isinstance(pair, list) or len(pair) != 2:
            raise ValueError(f"history[{index}] holds {pair!r:.40}, a pair of question and answer belongs there")
        for role, text in zip(("user", "assistant"), pair, strict=True):
            yield Message(role, require_text("" if text is None else text, f"history[{index}]"))  # type: ignore[arg-type]
    parts = [require_text(read(field) or "", field) for field in ("instruction", "input")]
    yield Message("user", "\n".join(part for part in parts if part))
    yield Message("assistant", require_text(read("output"), "output"))


def _check_turns(messages: tuple[Message, ...]) -> None:
    """A conversation has a question before its first answer, and answers that are not empty, one at a time."""
    roles = [message.role for message in messages]
    if "assistant" not in roles:
        raise ValueError("no assistant turn, so there is nothing to learn")
    if "user" not in roles[: roles.index("assistant")]:
        raise ValueError("the assistant speaks before any user turn")
    for index, message in enumerate(messages):
        if message.role != "assistant":
            continue
        if not message.content.strip() and not message.tool_calls:
            raise ValueError(f"turn {index} of the assistant is empty")
        if roles[index - 1] == "system":
            raise ValueError(
                f"turn {index} of the assistant follows a system turn; a user or tool turn belongs between"
            )


def _token_ids(read: FieldReader) -> tuple[tuple[int, ...], tuple[int, ...]]:
    ids = read("input_ids")
    labels = read("labels")
    labels = ids if labels is None else labels
    for field, values in (("input_ids", ids), ("labels", labels)):
        if not isinstance(values, list) or not values:
            raise ValueError(f"{field} holds {values!r:.40}, a list of token ids belongs there")
        least = 0 if field == "input_ids" else IGNORE_INDEX
        wrong = [
            value
            for value in values
            if type(value) is not int or not least <= value < 2**31 or IGNORE_INDEX < value < 0
        ]
        if wrong:
            raise ValueError(f"{field} holds {wrong[0]!r:.40}, a token id belongs there")
    if len(labels) != len(ids):
        raise ValueError(f"labels has {len(labels)} values and input_ids {len(ids)}; each token has one label")
    return tuple(ids), tuple(labels)


def _weight(value: Any) -> float:
    if value is None or value == "":  # an empty cell of a CSV file
        return 1.0
    if isinstance(value, bool) or not isinstance(value, int | float | str | Decimal):
        raise ValueError(f"weight holds {value!r:.40}, a number belongs there")
    try:
        weight = float(value)
    except (ValueError, OverflowError):
        raise ValueError(f"weight holds {value!r:.40}, a number belongs there") from None
    if not MIN_WEIGHT <= weight <= 1 / MIN_WEIGHT:
        raise ValueError(f"weight is {value!r:.40}; it must lie between {MIN_WEIGHT:g} and {1 / MIN_WEIGHT:g}")
    return weight


def _full_text(value: Any, field: str) -> str:
    text = require_text(value, field)
    if not text.strip():
        raise ValueError(f"the {field} is empty")
    return text
