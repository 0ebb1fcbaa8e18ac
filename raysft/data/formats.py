"""One record of any format → one example, or the reason why it cannot be used."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from raysft.config import Source
from raysft.records import Example, Message, Record

FORMAT_OF_COLUMN = {
    "messages": "openai",
    "conversations": "sharegpt",
    "instruction": "alpaca",
    "turns": "turns",
    "text": "text",
}
FIELDS = {
    "openai": ("messages",),
    "sharegpt": ("conversations",),
    "alpaca": ("instruction", "output"),
    "turns": ("turns",),
    "text": ("text",),
}
SHAREGPT_ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}
OPENAI_ROLES = {"system": "system", "user": "user", "assistant": "assistant", "tool": "tool"}


def detect_format(record: Record, source: Source) -> str:
    """The format of a record, from its columns."""
    renamed = {field for field, column in source.columns.items() if column in record}
    for column, form in FORMAT_OF_COLUMN.items():
        if column in record or column in renamed:
            return form
    raise ValueError(
        f"no known format has the columns {', '.join(map(str, record)) or '(none)'}; "
        "name data.train[].format and data.train[].columns"
    )


def to_example(record: Record, form: str, source: Source, where: str) -> Example:
    """One record as an example.

    Raises:
        ValueError: with the reason, where it cannot be used.
    """
    fields = {
        field: record.get(source.columns.get(field, field)) for field in (*FIELDS[form], "input", "system", "history")
    }
    for field in FIELDS[form]:
        if fields[field] is None:
            column = source.columns.get(field, field)
            state = "is null" if column in record else "is not there"
            raise ValueError(
                f"column {column!r} {state} (columns here: {', '.join(map(str, record))}); format {form} needs it, "
                "another name can be given in data.train[].columns"
            )
    if form == "text":
        text = _text(fields["text"], "text")
        if not text.strip():
            raise ValueError("the text is empty")
        return Example(source=source.name, record=where, text=text)
    messages = tuple(_messages(form, fields))
    _check(messages)
    return Example(source=source.name, record=where, messages=messages)


def _messages(form: str, fields: dict[str, Any]) -> Iterator[Message]:
    if form != "openai" and fields["system"]:
        yield Message("system", _text(fields["system"], "system"))
    if form == "alpaca":
        for index, pair in enumerate(_sequence(fields["history"], "history") if fields["history"] else []):
            if not isinstance(pair, list) or len(pair) != 2:
                raise ValueError(f"history[{index}] holds {pair!r:.40}, a pair of question and answer belongs there")
            yield Message("user", _text(pair[0], "history"))
            yield Message("assistant", _text(pair[1], "history"))
        instruction, extra = _text(fields["instruction"], "instruction"), _text(fields["input"] or "", "input")
        yield Message("user", f"{instruction}\n{extra}" if extra else instruction)
        yield Message("assistant", _text(fields["output"], "output"))
    elif form == "turns":
        for index, turn in enumerate(_sequence(fields["turns"], "turns")):
            yield Message("assistant" if index % 2 else "user", _text(turn, f"turns[{index}]"))
    else:
        column, role_key, text_key, roles = {
            "sharegpt": ("conversations", "from", "value", SHAREGPT_ROLES),
            "openai": ("messages", "role", "content", OPENAI_ROLES),
        }[form]
        for index, turn in enumerate(_sequence(fields[column], column)):
            if not isinstance(turn, dict) or role_key not in turn or turn.get(text_key) is None:
                raise ValueError(f"{column}[{index}] needs {role_key!r} and {text_key!r}, it is {turn!r:.60}")
            if turn[role_key] not in list(roles):
                raise ValueError(f"{column}[{index}] has the role {turn[role_key]!r}; known: {', '.join(roles)}")
            yield Message(roles[turn[role_key]], _text(turn[text_key], f"{column}[{index}].{text_key}"))  # type: ignore[arg-type]


def _check(messages: tuple[Message, ...]) -> None:
    """A conversation has a question before its first answer, and an answer that is not empty."""
    roles = [message.role for message in messages]
    if "assistant" not in roles:
        raise ValueError("no assistant turn, so there is nothing to learn")
    if "user" not in roles[: roles.index("assistant")]:
        raise ValueError("the assistant speaks before any user turn")
    for index, message in enumerate(messages):
        if message.role == "assistant" and not message.content.strip():
            raise ValueError(f"turn {index} of the assistant is empty")


def _text(value: Any, field: str) -> str:
    if not isinstance(value, str):
        raise ValueError(f"{field} holds {value!r:.40}, a text belongs there")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"{field} holds half a character ({value[error.start]!r}), which no tokenizer takes") from None
    return value


def _sequence(value: Any, field: str) -> list[Any]:
    if not isinstance(value, list) or not value:
        raise ValueError(f"{field} holds {value!r:.40}, a list of turns belongs there")
    return value
