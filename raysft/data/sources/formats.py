"""One record of any format → one example, or the reason why it cannot be used."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from decimal import Decimal
from typing import Any

from raysft.config import Source
from raysft.data.sources.columns import FIELDS, Read, check_columns, filled, find_format, reader
from raysft.data.sources.messages import list_in, text_in, turns_in
from raysft.data.sources.readers import Raw, Unreadable, parsed
from raysft.data.sources.tool_calls import strings, tool_schemas, tools_in
from raysft.data.types import IGNORE_INDEX, Example, Message, Record, Rejected

LEAST_WEIGHT = 1e-6
"""Losses of examples further apart than this and its inverse cannot be added up in float32."""


def examples(records: Iterable[tuple[str, Raw]], source: Source) -> Iterator[tuple[Example | Rejected, str]]:
    """Records of a source as examples, each with the format that it has; what cannot be used says why.

    Args:
        records: (``file:position``, record).
        source: where they are from.
    """
    form, known = "", dict[tuple[str, ...], str]()
    for where, raw in records:
        record = parsed(raw)
        if isinstance(record, Unreadable):
            yield Rejected(source.name, where, record.reason), form
            continue
        try:
            columns = filled(record)
            form = source.format or known.get(columns) or find_format(record, source, form)
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
    read = reader(record, source)
    weight = _weight(read("weight"))
    if form == "text":
        return Example(source.name, where, text=_full_text(read("text"), "text"), weight=weight)
    if form == "tokenized":
        ids, labels = _token_ids(read)
        return Example(source.name, where, ids=ids, labels=labels, weight=weight)
    if form == "prompt_completion" and isinstance(read("completion"), str):
        prompt = text_in(read("prompt"), "prompt")
        text = prompt + _full_text(read("completion"), "completion")
        return Example(source.name, where, text=text, prompt=len(prompt), weight=weight)
    messages = tuple(_messages(form, read, source.tags))
    _check(messages)
    tools = tools_in(read("tools"))
    if form != "openai":
        tools = tool_schemas(tools)
    for text in strings(tools):
        text_in(text, "tools")
    return Example(source.name, where, messages=messages, tools=tools, weight=weight)


def _messages(form: str, read: Read, tags: Mapping[Any, str]) -> Iterator[Message]:
    system = read("system")
    if form not in ("sharegpt", "openai", "prompt_completion") and system:
        yield Message("system", text_in(system, "system"))
    if form == "alpaca":
        yield from _alpaca(read)
    elif form == "turns":
        for index, turn in enumerate(list_in(read("turns"), "turns")):
            yield Message("assistant" if index % 2 else "user", text_in(turn, f"turns[{index}]"))
    elif form == "prompt_completion":
        for message in turns_in(read("prompt"), "prompt", tags):
            yield replace(message, train=False)
        yield from turns_in(read("completion"), "completion", tags)
    else:
        column = FIELDS[form][0]
        turns = list(turns_in(read(column), column, tags))
        if system and turns[0].role != "system":  # what the conversation itself says goes before what its record says
            yield Message("system", text_in(system, "system"))
        yield from turns


def _alpaca(read: Read) -> Iterator[Message]:
    history = read("history")
    for index, pair in enumerate(list_in(history, "history") if history else []):
        if not isinstance(pair, list) or len(pair) != 2:
            raise ValueError(f"history[{index}] holds {pair!r:.40}, a pair of question and answer belongs there")
        for role, text in zip(("user", "assistant"), pair, strict=True):
            yield Message(role, text_in("" if text is None else text, f"history[{index}]"))  # type: ignore[arg-type]
    parts = [text_in(read(field) or "", field) for field in ("instruction", "input")]
    yield Message("user", "\n".join(part for part in parts if part))
    yield Message("assistant", text_in(read("output"), "output"))


def _check(messages: tuple[Message, ...]) -> None:
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


def _token_ids(read: Read) -> tuple[tuple[int, ...], tuple[int, ...]]:
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
    if not LEAST_WEIGHT <= weight <= 1 / LEAST_WEIGHT:
        raise ValueError(f"weight is {value!r:.40}; it must lie between {LEAST_WEIGHT:g} and {1 / LEAST_WEIGHT:g}")
    return weight


def _full_text(value: Any, field: str) -> str:
    text = text_in(value, field)
    if not text.strip():
        raise ValueError(f"the {field} is empty")
    return text
