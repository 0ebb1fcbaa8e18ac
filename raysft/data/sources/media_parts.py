"""Images of a record: parts of a turn, and marks in its text for those of a column. No file is opened here."""

from __future__ import annotations

import binascii
import re
from base64 import b64decode
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any
from urllib.parse import unquote_to_bytes

from raysft.config import Source
from raysft.config.section import PATH_BYTES
from raysft.data.sources.json_stream import JSON
from raysft.data.types import MEDIUM, Medium, Message, Record

MARK = "<image>"
"""Stands in a text for the next image of the record's column, as LLaMA-Factory writes it."""
TEXT_PARTS = ("text", "input_text", "output_text")
IMAGE_PARTS = ("image", "image_url", "input_image")
IMAGE_KEYS = ("image", "url", "path", "image_url", "base64")
"""Keys of a part that hold its image; the first with a value counts."""
SIZE_KEYS = ("min_pixels", "max_pixels", "resized_height", "resized_width")
"""Keys with which Qwen's parts ask for a size of their own."""
UNSUPPORTED = {"videos": "videos", "audios": "audio"}
"""Column of media that nothing here trains on → what it holds."""
SINGULAR = "image"
"""Column that holds a record's only image where there is no column ``images``."""
NEXT_OF_COLUMN = Medium("image", "")
"""A mark whose image is the next of the record's column."""
ENCODED_IMAGE = re.compile(r"(iVBORw0KGgo|/9j/|R0lGOD|UklGR)[A-Za-z0-9+/\s]{60,}=*\s*")
"""A PNG, JPEG, GIF or WebP in base64, which has no dot, as the name of such a file would."""
BASE64 = re.compile(r"[A-Za-z0-9+/\s]+=*\s*")


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
        ValueError: a part is neither text nor an image.
    """
    texts, media = list[str](), list[Medium]()
    for part in parts:
        kind = part.get("type")
        if kind in TEXT_PARTS:
            texts.append(require_text(part.get("text"), where))
        elif kind in IMAGE_PARTS:
            texts.append(MEDIUM)
            media.append(_image_part(part, f"{where}[{len(texts) - 1}]"))
        else:
            raise ValueError(
                f"{where} has a part of type {kind!r:.40}, but raysft trains on text and images alone; leave the record out"
            )
    return "".join(texts), media


def column_images(read: Callable[[str], Any]) -> list[Medium]:
    """Read the images of a record's own column.

    Raises:
        ValueError: one is no image, or the record has videos or audio.
    """
    for field, content in UNSUPPORTED.items():
        if not _is_empty(read(field)):
            raise ValueError(
                f"has {content} ({field}), but raysft trains on text and images alone; leave the record out, or ignore the column "
                f"with columns: {{{field}: null}}"
            )
    return _images(read("images"), "images")


def marked_image(messages: Sequence[Message], record: Record, source: Source) -> list[Medium]:
    """Read a column ``image`` (LLaVA's records, and some of TRL's) if the turns have marks and no other column is named.

    Raises:
        ValueError: it holds no image.
    """
    named = source.column("images") == "images" and SINGULAR not in source.columns.values()
    marked = any(NEXT_OF_COLUMN in message.media or has_mark(message) for message in messages)
    return _images(record.get(SINGULAR), SINGULAR) if named and marked else []


def has_mark(message: Message) -> bool:
    """True if a text has a mark that an image may belong to."""
    return message.role != "system" and MARK in message.content


def place_images(messages: Sequence[Message], images: Sequence[Medium]) -> tuple[Message, ...]:
    """Give each mark of a conversation its image of the record's column, in the order of the turns.

    Marks are image parts that hold no image; without one, ``<image>`` in texts that are not of the system.

    Raises:
        ValueError: there are more marks than images, or fewer.
    """
    if images and not any(NEXT_OF_COLUMN in message.media for message in messages):
        messages = [_marked(message) if has_mark(message) else message for message in messages]
    marks = sum(message.media.count(NEXT_OF_COLUMN) for message in messages)
    if marks != len(images):
        remedy = f"write {MARK} into the text where each one belongs" if marks < len(images) else "add those that lack"
        remedy += "" if images else ", or name their column with columns: {images: COLUMN}"
        ignoring = ", or ignore the column with columns: {images: null}" if not marks else ""
        raise ValueError(
            f"each image needs one mark, but the text has {marks} and the images column {len(images)}; {remedy}{ignoring}"
        )
    left = iter(images)
    return tuple(
        replace(message, media=tuple(next(left) if medium == NEXT_OF_COLUMN else medium for medium in message.media))
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
            f"{where} sets {size}, which raysft does not read; set data.image_max_pixels for all images instead"
        )
    key = next((key for key in IMAGE_KEYS if part.get(key) is not None), None)
    if key is None:
        return NEXT_OF_COLUMN
    if key == "base64" and isinstance(part[key], str):
        return _held(_base64_of(part[key], where), where)
    return image_of(part[key], where)


def _marked(message: Message) -> Message:
    """A message with ``MEDIUM`` for each ``<image>`` in its text."""
    own, media, texts = iter(message.media), list[Medium](), list[str]()
    for piece in re.split(f"({MARK}|{MEDIUM})", message.content):
        if piece in (MARK, MEDIUM):
            media.append(NEXT_OF_COLUMN if piece == MARK else next(own))
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
        raise ValueError(f"{where} is no data URL, as it has no comma: {url[:40]!r}")
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
