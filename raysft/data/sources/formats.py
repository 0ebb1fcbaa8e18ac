"""Convert records of any format to examples, or to the reason why they cannot be used."""

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
from raysft.data.sources.media_parts import (
    column_images,
    has_mark,
    has_single_image,
    in_front,
    marked_image,
    place_images,
)
from raysft.data.sources.messages import parse_turns, require_list, require_text
from raysft.data.sources.readers import RawRecord, Unreadable, parse_record
from raysft.data.sources.tool_calls import nested_strings, parse_tools, tool_schemas
from raysft.data.types import IGNORE_INDEX, MEDIUM, STAND_IN, Example, Message, Record, Rejected

MIN_WEIGHT = 1e-6
"""Smallest weight, and inverse of the largest: losses further apart cannot be summed in float32."""


def to_examples(
    records: Iterable[tuple[str, RawRecord]], source: Source, columns_seen: set[str] | None = None
) -> Iterator[tuple[Example | Rejected, str]]:
    """Convert records to examples, each with the format of its record.

    Args:
        records: (location as ``file:position``, record).
        source: the source of the records.
        columns_seen: takes the names of all columns that occur.
    """
    form, format_of_columns = "", dict[tuple[str, ...], str]()
    for location, raw in records:
        record = parse_record(raw)
        if isinstance(record, Unreadable):
            yield Rejected(source.name, location, record.reason), form
            continue
        if columns_seen is not None:
            columns_seen.update(record)
        try:
            columns = filled_columns(record)
            form = source.format or format_of_columns.get(columns) or detect_format(record, source, form)
            format_of_columns[columns] = form
            yield to_example(record, form, source, location), form
        except ValueError as error:
            yield Rejected(source.name, location, str(error)), form


def to_example(record: Record, form: str, source: Source, location: str) -> Example:
    """Convert a record to an example.

    Raises:
        ValueError: the record cannot be used.
    """
    unanswered = check_columns(record, form, source)
    read = field_reader(record, source)
    weight = _weight(read("weight"))
    images = column_images(read)
    if _is_text(form, read, unanswered) and (images or has_single_image(record, source)):
        raise ValueError(
            f"has images, but only conversations can contain images, and this is format {form}; write messages, or ignore the "
            "column with columns: {images: null}"
        )
    if form == "text":
        return Example(source.name, location, text=_full_text(read("text"), "text"), weight=weight)
    if form == "tokenized":
        ids, labels = _token_ids(read)
        return Example(source.name, location, ids=ids, labels=labels, weight=weight)
    if _is_text(form, read, unanswered):
        prompt = require_text(read("prompt"), "prompt")
        if not unanswered and not require_text(read("completion"), "completion").strip():
            unanswered = "the completion is empty"
        text = prompt + (STAND_IN if unanswered else read("completion"))
        return Example(
            source.name, location, text=text, prompt_length=len(prompt), weight=weight, unanswered=unanswered
        )
    messages = tuple(_messages(form, read, source.tags, bool(unanswered)))
    if form == "texts" and images and not any(map(has_mark, messages)):
        asked = next(index for index, message in enumerate(messages) if message.role == "user")
        messages = (*messages[:asked], in_front(messages[asked], images), *messages[asked + 1 :])
        images = []
    images = images or marked_image(messages, record, source)
    if images or any(message.media for message in messages):
        messages = place_images(messages, images)
    unanswered = unanswered or _lacks_answer(messages, form)
    if unanswered:
        says_nothing = _is_empty(messages[-1]) or _is_image(messages[-1])
        messages = (*(messages[:-1] if says_nothing else messages), Message("assistant", STAND_IN))
    _check_turns(messages)
    messages = tuple(replace(message, trainable=False) if _is_image(message) else message for message in messages)
    tools = parse_tools(read("tools"))
    if form != "openai":
        tools = tool_schemas(tools)
    for text in nested_strings(tools):
        require_text(text, "tools")
    return Example(source.name, location, messages=messages, tools=tools, weight=weight, unanswered=unanswered)


def _is_text(form: str, read: FieldReader, unanswered: str) -> bool:
    """True if a record is not a conversation: raw text, token IDs, or a prompt and its completion as texts."""
    if form == "prompt_completion":
        return isinstance(read("prompt" if unanswered else "completion"), str)
    return form in ("text", "tokenized")


def _messages(form: str, read: FieldReader, tags: Mapping[Any, str], unanswered: bool) -> Iterator[Message]:
    system = read("system")
    if form not in ("sharegpt", "openai", "prompt_completion") and system:
        yield Message("system", require_text(system, "system"))
    if form == "alpaca":
        yield from _alpaca(read)
    elif form == "turns":
        for index, turn in enumerate(require_list(read("turns"), "turns")):
            yield Message("assistant" if index % 2 else "user", require_text(turn, f"turns[{index}]"))
    elif form == "texts":
        yield from _pairs(require_list(read("texts"), "texts", "pairs"))
    elif form == "prompt_completion":
        for message in parse_turns(read("prompt"), "prompt", tags):
            yield replace(message, trainable=False)
        if not unanswered:
            yield from parse_turns(read("completion"), "completion", tags)
    else:
        column = REQUIRED_FIELDS[form][0]
        turns = list(parse_turns(read(column), column, tags))
        if system and turns[0].role != "system":  # a system turn in the conversation takes precedence
            yield Message("system", require_text(system, "system"))
        yield from turns


def _alpaca(read: FieldReader) -> Iterator[Message]:
    history = read("history")
    for index, pair in enumerate(require_list(history, "history") if history else []):
        if not isinstance(pair, list) or len(pair) != 2:
            raise ValueError(f"history[{index}] must be a pair of question and answer, but is {pair!r:.40}")
        for role, text in zip(("user", "assistant"), pair, strict=True):
            yield Message(role, require_text("" if text is None else text, f"history[{index}]"))  # type: ignore[arg-type]
    parts = [require_text(read(field) or "", field) for field in ("instruction", "input")]
    yield Message("user", "\n".join(part for part in parts if part))
    if (output := read("output")) not in (None, ""):
        yield Message("assistant", require_text(output, "output"))


def _pairs(pairs: list[Any]) -> Iterator[Message]:
    """Questions and answers about the record's images, which come before all of them, as in The Cauldron."""
    for index, pair in enumerate(pairs):
        if not isinstance(pair, dict) or not {"user", "assistant"} <= pair.keys():
            raise ValueError(f"texts[{index}] must have 'user' and 'assistant', but is {pair!r:.60}")
        for role in ("user", "assistant"):
            yield Message(role, require_text(pair[role], f"texts[{index}].{role}"))  # type: ignore[arg-type]


def _lacks_answer(messages: tuple[Message, ...], form: str) -> str:
    """Why a conversation has no answer that a model could be trained on; empty if it has one."""
    if _is_image(messages[-1]):
        return f"turn {len(messages) - 1} of the assistant is an image without text, but raysft trains on text"
    if form == "alpaca":
        return "the output is empty" if messages[-1].role != "assistant" or _is_empty(messages[-1]) else ""
    if _is_empty(messages[-1]):
        return f"turn {len(messages) - 1} of the assistant is empty"
    roles = [message.role for message in messages]
    if "user" in roles and "assistant" not in roles and roles[-1] != "system":
        return "the conversation has no assistant turn to train on"
    return ""


def _is_empty(message: Message) -> bool:
    """Return True for an answer that says nothing and calls nothing."""
    return message.role == "assistant" and not message.content.strip() and not message.tool_calls


def _is_image(message: Message) -> bool:
    """Return True for an answer that shows images, and says and calls nothing: it is there to be seen by later turns."""
    if message.role != "assistant" or not message.media or message.tool_calls:
        return False
    return not message.content.replace(MEDIUM, "").strip()


def _check_turns(messages: tuple[Message, ...]) -> None:
    """Check that a user turn precedes the first answer, and that each answer has content and follows a user or tool turn."""
    roles = [message.role for message in messages]
    if "assistant" not in roles:
        raise ValueError("the conversation has no assistant turn to train on")
    if "user" not in roles[: roles.index("assistant")]:
        raise ValueError("an assistant turn comes before the first user turn")
    for index, message in enumerate(messages):
        if message.role != "assistant":
            continue
        if _is_empty(message):
            raise ValueError(f"turn {index} of the assistant is empty")
        if roles[index - 1] == "system":
            raise ValueError(
                f"turn {index} of the assistant must follow a user or tool turn, but follows a system turn"
            )


def _token_ids(read: FieldReader) -> tuple[tuple[int, ...], tuple[int, ...]]:
    ids = read("input_ids")
    labels = read("labels")
    labels = ids if labels is None else labels
    for field, values in (("input_ids", ids), ("labels", labels)):
        if not isinstance(values, list) or not values:
            raise ValueError(f"{field} must be a list of token IDs, but is {values!r:.40}")
        minimum = 0 if field == "input_ids" else IGNORE_INDEX
        invalid = [
            value
            for value in values
            if type(value) is not int or not minimum <= value < 2**31 or IGNORE_INDEX < value < 0
        ]
        if invalid:
            raise ValueError(f"{field} must contain token IDs only, but has {invalid[0]!r:.40}")
    if len(labels) != len(ids):
        raise ValueError(
            f"each token needs one label, but labels has {len(labels)} values and input_ids has {len(ids)}"
        )
    return tuple(ids), tuple(labels)


def _weight(value: Any) -> float:
    if value is None or value == "":  # an empty cell of a CSV file
        return 1.0
    if isinstance(value, bool) or not isinstance(value, int | float | str | Decimal):
        raise ValueError(f"weight must be a number, but is {value!r:.40}")
    try:
        weight = float(value)
    except (ValueError, OverflowError):
        raise ValueError(f"weight must be a number, but is {value!r:.40}") from None
    if not MIN_WEIGHT <= weight <= 1 / MIN_WEIGHT:
        raise ValueError(f"weight must be between {MIN_WEIGHT:g} and {1 / MIN_WEIGHT:g}, but is {value!r:.40}")
    return weight


def _full_text(value: Any, field: str) -> str:
    text = require_text(value, field)
    if not text.strip():
        raise ValueError(f"the {field} is empty")
    return text
