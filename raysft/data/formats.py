"""One record of any format → one example, or the reason why it cannot be used."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from decimal import Decimal
from typing import Any

from raysft.config import Source
from raysft.data.calls import strings, tool_call, tool_schemas
from raysft.data.columns import FIELDS, Read, check_columns, filled, find_format, reader
from raysft.data.read import Raw, Unreadable, parsed
from raysft.records import IGNORED, Example, Message, Record, Rejected

ROLES = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "function_call": "function",
    "tool": "tool",
    "observation": "tool",
    "function": "tool",
}
"""Names of roles in the field's data; a ``function`` is an assistant's call whose content is JSON."""
TAGGED = {"user": "user", "assistant": "assistant", "observation": "tool", "function": "function", "system": "system"}
LEAST_WEIGHT = 1e-6
"""Losses of examples further apart than this and its inverse cannot be added up in float32."""
SEEN_BY_TEMPLATES = ("name", "tool_call_id", "reasoning_content")


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
        prompt = _text(read("prompt"), "prompt")
        text = prompt + _full_text(read("completion"), "completion")
        return Example(source.name, where, text=text, prompt=len(prompt), weight=weight)
    messages = tuple(_messages(form, read, source.tags))
    _check(messages)
    tools = tool_schemas(read("tools"))
    for text in strings(tools):
        _text(text, "tools")
    return Example(source.name, where, messages=messages, tools=tools, weight=weight)


def _messages(form: str, read: Read, tags: Mapping[Any, str]) -> Iterator[Message]:
    system = read("system")
    if form not in ("sharegpt", "openai", "prompt_completion") and system:
        yield Message("system", _text(system, "system"))
    if form == "alpaca":
        yield from _alpaca(read)
    elif form == "turns":
        for index, turn in enumerate(_sequence(read("turns"), "turns")):
            yield Message("assistant" if index % 2 else "user", _text(turn, f"turns[{index}]"))
    elif form == "prompt_completion":
        for message in _turns(read("prompt"), "prompt", tags):
            yield Message(message.role, message.content, message.tool_calls, train=False, extra=message.extra)
        yield from _turns(read("completion"), "completion", tags)
    else:
        column = FIELDS[form][0]
        turns = list(_turns(read(column), column, tags))
        if system and turns[0].role != "system":  # what the conversation itself says goes before what its record says
            yield Message("system", _text(system, "system"))
        yield from turns


def _alpaca(read: Read) -> Iterator[Message]:
    history = read("history")
    for index, pair in enumerate(_sequence(history, "history") if history else []):
        if not isinstance(pair, list) or len(pair) != 2:
            raise ValueError(f"history[{index}] holds {pair!r:.40}, a pair of question and answer belongs there")
        for role, text in zip(("user", "assistant"), pair, strict=True):
            yield Message(role, _text("" if text is None else text, f"history[{index}]"))  # type: ignore[arg-type]
    parts = [_text(read(field) or "", field) for field in ("instruction", "input")]
    yield Message("user", "\n".join(part for part in parts if part))
    yield Message("assistant", _text(read("output"), "output"))


def _turns(value: Any, column: str, tags: Mapping[Any, str]) -> Iterator[Message]:
    """Turns of role and content, by the keys ``from`` and ``value`` or ``role`` and ``content``."""
    roles = {**ROLES, **{tags[tag]: role for tag, role in TAGGED.items() if tag in tags}} if tags else ROLES
    for index, turn in enumerate(_sequence(value, column)):
        where = f"{column}[{index}]"
        if not isinstance(turn, dict):
            raise ValueError(f"{where} holds {turn!r:.60}, a turn of role and content belongs there")
        role_key = tags.get("role") or ("from" if "from" in turn else "role")
        text_key = tags.get("content") or ("value" if "value" in turn else "content")
        called = turn.get("function_call")
        if isinstance(called, dict) and not any(called.values()):
            called = None  # as JSON that was written from a Parquet file has it in turns without a call
        calls = turn.get("tool_calls") or ([called] if called else [])
        if role_key not in turn or (turn.get(text_key) is None and not calls):
            raise ValueError(f"{where} needs {role_key!r} and {text_key!r}, it is {turn!r:.60}")
        role = turn[role_key]
        known = roles.get(role) if isinstance(role, str) else None
        if known is None:
            raise ValueError(f"{where} has the role {role!r:.40}; known: {', '.join(roles)}")
        content = _content(turn.get(text_key), f"{where}.{text_key}")
        if known == "function":
            known, calls, content = "assistant", _calls_in(content, where), ""
        extra = {key: turn[key] for key in SEEN_BY_TEMPLATES if turn.get(key) is not None}
        made = (
            tuple(tool_call(call, where) for call in _sequence(calls, f"{where}.tool_calls", "calls")) if calls else ()
        )
        for text in strings((made, extra)):
            _text(text, where)
        yield Message(
            role=known,  # type: ignore[arg-type]
            content=content,
            tool_calls=made,
            train=_trained(turn, where),
            extra=extra,
        )


def _content(value: Any, where: str) -> str:
    """A turn's text; OpenAI also writes it as a list of parts."""
    if value is None:
        return ""
    if isinstance(value, list) and value and all(isinstance(part, dict) for part in value):
        other = [part.get("type") for part in value if part.get("type") != "text"]
        if other:
            raise ValueError(f"{where} holds a part of type {other[0]!r}; only text can be trained on")
        return "".join(_text(part.get("text"), where) for part in value)
    return _text(value, where)


def _calls_in(content: str, where: str) -> list[Any]:
    """The calls that a function turn holds as JSON: one, or a list."""
    try:
        calls = json.loads(content)
    except (ValueError, RecursionError):
        raise ValueError(f"{where} is a function call and holds no JSON: {content[:40]!r}") from None
    return calls if isinstance(calls, list) else [calls]


def _trained(turn: Record, where: str) -> bool:
    """Whether a turn may be trained on: ``train: false``, or ``weight: 0`` as OpenAI has it, says no."""
    for key in ("train", "weight"):
        value = turn.get(key)
        if value is not None and value not in (0, 1):
            raise ValueError(f"{where}.{key} is {value!r:.40}; true or false belongs there")
    return turn.get("train") not in (False, 0) and turn.get("weight") not in (False, 0)


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
        least = 0 if field == "input_ids" else IGNORED
        wrong = [
            value for value in values if type(value) is not int or not least <= value < 2**31 or IGNORED < value < 0
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
    text = _text(value, field)
    if not text.strip():
        raise ValueError(f"the {field} is empty")
    return text


def _text(value: Any, field: str) -> str:
    if not isinstance(value, str):
        raise ValueError(f"{field} holds {value!r:.40}, a text belongs there")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"{field} holds half a character ({value[error.start]!r}), which no tokenizer takes") from None
    return value


def _sequence(value: Any, field: str, what: str = "turns") -> list[Any]:
    if not isinstance(value, list) or not value:
        raise ValueError(f"{field} holds {value!r:.40}, a list of {what} belongs there")
    return value
