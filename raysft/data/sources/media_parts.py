"""Images of a record: parts of a turn, and marks in its text for those of a column. No file is opened here."""

from __future__ import annotations

import binascii
import re
from base64 import b64decode
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any
from urllib.parse import unquote_to_bytes

from raysft.config import Source
from raysft.config.section import PATH_BYTES
from raysft.data.sources.files import PICTURES
from raysft.data.sources.json_stream import JSON
from raysft.data.types import MEDIUM, Medium, Message, Record

MARK = "<image>"
"""Stands in a text for the next image of the record's column, as LLaMA-Factory writes it."""
OTHER_MARKS = re.compile(
    r'<image[ _]?\d+>|<\|image_\d+\|>|<img>[^<>\n]+</img>|<video>|<audio>|"type": ?"(?:image|image_url|input_image|video)"'
)
"""How other programs mark images, videos and audio, and parts in JSON; words here."""
TEXT_PARTS = ("text", "input_text", "output_text")
IMAGE_PARTS = ("image", "image_url", "input_image")
IMAGE_KEYS = ("image", "url", "path", "image_url", "base64", "source")
"""Keys of a part that hold its image; the first with a value counts. ``source`` is Anthropic's."""
ENCODED_KEYS = ("base64", "data")
"""Keys of a part or a struct whose value is base64, and no path."""
BARE_KEYS = ("type", "text", "index", "detail")
"""Keys of a part that takes its image from the record's column."""
UNTYPED = {"text": "text", "image": "image", "image_url": "image", "video": "video", "audio": "audio"}
"""Key of a part without a type, as Qwen's first examples have them → its type."""
TURN_KEYS = ("images", "image")
"""Keys of a turn that hold its own images, as in Ollama's format."""
SIZE_KEYS = ("min_pixels", "max_pixels", "resized_height", "resized_width")
"""Keys with which Qwen's parts ask for their own size."""
UNSUPPORTED = {"videos": "videos", "audios": "audio"}
"""Column of media that nothing here trains on → what it holds."""
UNSUPPORTED_OF_TURN = (*UNSUPPORTED, "video", "audio")
SINGULAR = "image"
"""Column that holds a record's only image where there is no column ``images``."""
ENCODED_IMAGE = re.compile(r"(iVBORw0KGgo|/9j/|R0lGOD|UklGR)[A-Za-z0-9+/\s]{60,}=*\s*")
"""A PNG, JPEG, GIF or WebP in base64, which has no dot, as the name of such a file would."""
BASE64 = re.compile(r"[A-Za-z0-9+/\s]+=*\s*")


@dataclass(frozen=True)
class Mark(Medium):
    """Stands for an image of the record's column, until it is placed."""

    index: int | None = None
    """Which one, if a part says so."""


NEXT = Mark("image", "")
"""A mark that takes the next image."""


def parse_parts(
    parts: Sequence[Record], where: str, require_text: Callable[[Any, str], str]
) -> tuple[str, list[Medium]]:
    """Read a content in parts, as OpenAI and chat templates have it.

    Args:
        parts: the parts.
        where: the content, for messages.
        require_text: returns a text if it is valid.

    Returns:
        The text, with ``MEDIUM`` where an image is, and the images.

    Raises:
        ValueError: a part is neither text nor an image, or both.
    """
    texts, media = list[str](), list[Medium]()
    for index, part in enumerate(parts):
        kind = part.get("type") or next((kind for key, kind in UNTYPED.items() if part.get(key) is not None), None)
        image = next((key for key in ("image", "image_url", "base64") if part.get(key)), None)
        if kind in (*TEXT_PARTS, *IMAGE_PARTS) and image and part.get("text"):
            raise ValueError(f"{where}[{index}] has both text and {image}; write them as two parts")
        if kind in TEXT_PARTS and image:
            raise ValueError(f"{where}[{index}] is of type {kind}, but has {image}; write type: image")
        if kind in TEXT_PARTS:
            texts.append(require_text(part.get("text"), where))
        elif kind in IMAGE_PARTS:
            texts.append(MEDIUM)
            media.append(_image_part(part, f"{where}[{index}]"))
        else:
            raise ValueError(
                f"{where} has a part of type {kind!r:.40}, but raysft only trains on text and images; remove the record"
            )
    return "".join(texts), media


def turn_images(message: Message, turn: Record, where: str) -> Message:
    """Give a turn the images that it has next to its content: where its placeholders are, or else before its text.

    Raises:
        ValueError: one is not an image, their number is not that of the marks, or the turn has videos or audio.
    """
    if not any(map(turn.get, (*TURN_KEYS, *UNSUPPORTED_OF_TURN))):
        return message
    if other := next((key for key in UNSUPPORTED_OF_TURN if turn.get(key)), None):
        raise ValueError(f"{where} has {other}, but raysft only trains on text and images; remove the record")
    images = next((found for key in TURN_KEYS if (found := _images(turn.get(key) or None, f"{where}.{key}"))), [])
    if not images:
        return message
    if has_mark(message) or _marks(message):
        (message,) = place_images((message,), images, f"the turn has {len(images)} images ({where})")
        return message
    return in_front(message, images)


def in_front(message: Message, images: Sequence[Medium]) -> Message:
    """Put images before the text of a turn."""
    content = MEDIUM * len(images) + message.content
    return replace(message, content=content, media=(*images, *message.media), original=None)


def column_images(read: Callable[[str], Any]) -> list[Medium]:
    """Read the images of a record's own column.

    Raises:
        ValueError: one is not an image, or the record has videos or audio.
    """
    for field, content in UNSUPPORTED.items():
        if not _is_empty(read(field)):
            raise ValueError(
                f"has {content} ({field}), but raysft only trains on text and images; remove the record, or ignore the column "
                f"with columns: {{{field}: null}}"
            )
    return _images(read("images"), "images")


def marked_image(messages: Sequence[Message], record: Record, source: Source) -> list[Medium]:
    """Read a column ``image`` (LLaVA's records, and some of TRL's) if the turns have marks and no other column is named.

    Raises:
        ValueError: it holds no image, or one that no mark asks for; or the marks are for a column ``video`` or ``audio``.
    """
    other = next((column for column in ("video", "audio") if record.get(column)), None)
    if other and has_stray_mark(messages):
        raise ValueError(
            f"has placeholders for its column {other!r}, but raysft only trains on text and images; remove it"
        )
    if any(_marks(message) or has_mark(message) for message in messages):
        return _images(_single(record, source), SINGULAR)
    if has_single_image(record, source) and not any(message.media for message in messages):
        raise ValueError(
            f"has an image in its column {SINGULAR!r}, but no placeholder for it; write {MARK} into the text where it belongs, "
            "or ignore the column with columns: {images: null}"
        )
    return []


def has_single_image(record: Record, source: Source) -> bool:
    """True if the column ``image`` may be read, and evidently holds an image: other data may have words in it."""
    return _is_evident(_single(record, source))


def _single(record: Record, source: Source) -> Any:
    named = source.column("images") == "images" and SINGULAR not in source.columns.values()
    return record.get(SINGULAR) if named else None


def _is_evident(value: Any) -> bool:
    if isinstance(value, dict):
        return value.get("bytes") is not None or any(map(_is_evident, value.values()))
    if isinstance(value, list):
        return any(map(_is_evident, value))
    if isinstance(value, str):
        return value.lower().endswith(PICTURES) or value.startswith("data:image/") or bool(ENCODED_IMAGE.match(value))
    return isinstance(value, bytes)


def has_mark(message: Message) -> bool:
    """True if a text has a mark that an image may belong to."""
    return message.role != "system" and MARK in message.content


def has_stray_mark(messages: Sequence[Message]) -> bool:
    """True if a conversation without images has marks for some, of any program."""
    return not any(message.media for message in messages) and any(
        has_mark(message) or (message.role != "system" and OTHER_MARKS.search(message.content)) for message in messages
    )


def place_images(messages: Sequence[Message], images: Sequence[Medium], owner: str = "") -> tuple[Message, ...]:
    """Give each mark of a conversation its image of the record's column, in the order of the turns, or that of its index.

    Marks are image parts that hold no image; without one, ``<image>`` in texts that are not of the system.

    Args:
        messages: the conversation.
        images: those of the column.
        owner: what has the images, for messages. Default: the column.

    Raises:
        ValueError: there are more marks than images, or fewer.
    """
    if images and not any(map(_marks, messages)):
        messages = [_marked(message) if has_mark(message) else message for message in messages]
    marks = [mark for message in messages for mark in _marks(message)]
    indices, order = [mark.index for mark in marks], range(len(images))
    # Several parts may show the same image; numbers that are not places in the column count something else.
    if set(indices) != set(order):
        indices = list(range(len(marks)))
    if set(indices) != set(order):
        remedy = f"write {MARK} into the text where each one belongs"
        if len(marks) > len(images):
            remedy = f"add the missing ones, or give all images as content parts, in which case {MARK} is treated as plain text"
        remedy += "" if images else ", or name their column with columns: {images: COLUMN}"
        ignoring = ", or ignore the column with columns: {images: null}" if not marks else ""
        raise ValueError(
            f"each image needs one placeholder, but the text has {len(marks)} and "
            f"{owner or f'the images column {len(images)}'}; {remedy}{ignoring}"
        )
    left = iter(indices)
    return tuple(
        replace(message, media=tuple(images[next(left)] if isinstance(each, Mark) else each for each in message.media))  # type: ignore[index]
        if message.media
        else message
        for message in messages
    )


def image_of(value: Any, where: str) -> Medium:
    """Return the image that a value names or holds: a path, a URI, a data URL, bytes, or a struct of them.

    Raises:
        ValueError: it is none of them.

    >>> image_of("data:image/png;base64,AAE=", "").content
    b'\\x00\\x01'
    >>> image_of({"bytes": None, "path": "a.png"}, "").location
    'a.png'
    """
    if isinstance(value, dict):
        if value.get("bytes") is not None:
            return _held(_bytes_of(value["bytes"], where), where)
        if encoded := next((value[key] for key in ENCODED_KEYS if value.get(key)), None):
            return _encoded(encoded, where)
        named = next((value[key] for key in IMAGE_KEYS if value.get(key) is not None), None)
        if named is None or isinstance(named, dict):
            raise ValueError(f"{where} must have bytes or a path, but is {value!r:.60}")
        return image_of(named, where)
    if isinstance(value, bytes):
        return _held(value, where)
    if not isinstance(value, str) or not value.strip():
        raise ValueError(f"{where} must be a path, a URI, a data URL or bytes, but is {value!r:.60}")
    if value[:5].lower() == "data:":
        return _held(_data_of(value, where), where)
    if "\0" in value:  # a binary column whose bytes were text, too
        return _held(value.encode(), where)
    if len(value.encode("utf-8", "surrogatepass")) > PATH_BYTES or ENCODED_IMAGE.fullmatch(value):
        return _held(_base64_of(value, where), where)
    return Medium("image", value)


def _images(value: Any, column: str) -> list[Medium]:
    """Images of a column: none, one, or a list, which may be JSON."""
    if isinstance(value, str) and value.lstrip()[:1] in ("[", "{"):
        value = _from_json(value)
    if _is_empty(value):
        return []
    items = value if isinstance(value, list) else [value]
    return [image_of(item, f"{column}[{index}]") for index, item in enumerate(items)]


def _image_part(part: Record, where: str) -> Medium:
    size = next((key for key in SIZE_KEYS if part.get(key) is not None), None)
    if size:
        raise ValueError(
            f"{where} sets {size}, which raysft does not read; remove it, and set data.image_max_pixels for all images"
        )
    given = [key for key in IMAGE_KEYS if part.get(key) is not None]
    if not given:
        if other := next((key for key, value in part.items() if key not in BARE_KEYS and value), None):
            raise ValueError(f"{where} is an image, but has {other!r} in place of one; name that key 'image'")
        index = part.get("index")
        return replace(NEXT, index=index) if type(index) is int else NEXT
    key = next((key for key in given if part[key]), given[0])
    return _encoded(part[key], where) if key in ENCODED_KEYS else image_of(part[key], where)


def _encoded(value: Any, where: str) -> Medium:
    """An image in base64, perhaps as a data URL."""
    if not isinstance(value, str) or value[:5].lower() == "data:":
        return image_of(value, where)
    return _held(_base64_of(value, where), where)


def _marks(message: Message) -> list[Mark]:
    return [medium for medium in message.media if isinstance(medium, Mark)]


def _marked(message: Message) -> Message:
    """A message with ``MEDIUM`` for each ``<image>`` in its text."""
    own, media, texts = iter(message.media), list[Medium](), list[str]()
    for piece in re.split(f"({MARK}|{MEDIUM})", message.content):
        if piece in (MARK, MEDIUM):
            media.append(NEXT if piece == MARK else next(own))
        texts.append(MEDIUM if piece == MARK else piece)
    # The turn as recorded has no marks.
    return replace(message, content="".join(texts), media=tuple(media), original=None)


def _held(content: bytes, where: str) -> Medium:
    if not content:
        raise ValueError(f"{where} is empty; give the bytes of an image")
    return Medium("image", "", content)


def _bytes_of(value: Any, where: str) -> bytes:
    """Bytes of a struct: as they are, as the text that a Parquet file was read as, or in base64 from JSON."""
    if isinstance(value, str):
        return _base64_of(value, where) if BASE64.fullmatch(value) else value.encode()
    if not isinstance(value, bytes):
        raise ValueError(f"{where}.bytes must be bytes or base64, but is {value!r:.40}")
    return value


def _data_of(url: str, where: str) -> bytes:
    header, comma, data = url.partition(",")
    if not comma:
        raise ValueError(f"{where} is not a valid data URL, because it has no comma: {url[:40]!r}")
    return _base64_of(data, where) if header.lower().endswith(";base64") else unquote_to_bytes(data)


def _base64_of(text: str, where: str) -> bytes:
    try:
        return b64decode("".join(text.split()), validate=True)
    except (binascii.Error, ValueError):
        raise ValueError(f"{where} is neither a path nor base64: {text[:40]!r}…") from None


def _is_empty(value: Any) -> bool:
    return (
        value is None or value == "" or value == [] or (isinstance(value, list) and all(item is None for item in value))
    )


def _from_json(text: str) -> Any:
    """Decode a text as JSON; a path may begin with a bracket, too."""
    try:
        value = JSON.decode(text)
    except (ValueError, RecursionError):
        return text
    return value if isinstance(value, list | dict) else text
