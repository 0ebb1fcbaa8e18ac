"""Images of prompts as small pictures on a page: inside the page, since it fetches nothing."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from raysft.errors import StorageFailed
from raysft.media.files import read
from raysft.media.images import open_image
from raysft.report.text import masked, visible
from raysft.storage.retry import retry_for

SIDE = 128
"""Longest side of a picture in pixels."""
SMALL = 96
"""An image with sides that are several times shorter is enlarged to about this, with visible pixels."""
MOST = 6
"""Pictures of a prompt that are shown."""
READERS = 4


@dataclass(frozen=True)
class Picture:
    """One image of a prompt."""

    name: str
    """Name of its file."""
    location: str
    """Its path or URI, without secrets."""
    source: str = ""
    """The picture as a data URL; empty if the file cannot be read."""
    width: int = 0
    """Of the picture on the page, in pixels."""
    enlarged: bool = False


def locations(row: dict[str, Any]) -> list[str]:
    """Paths and URIs of the images of a prediction's prompt."""
    return [str(medium["location"]) for medium in row.get("media") or ()]


def draw(rows: Iterable[dict[str, Any]]) -> dict[str, Picture]:
    """Return the pictures that predictions show, by location. Each file is read once."""
    wanted = dict.fromkeys(location for row in rows for location in locations(row)[:MOST])
    silent: set[str] = set()
    with ThreadPoolExecutor(READERS) as readers:
        return dict(zip(wanted, readers.map(lambda location: picture(location, silent), wanted), strict=True))


def pictures(row: dict[str, Any], drawn: dict[str, Picture]) -> tuple[Sequence[Picture], int]:
    """Return the pictures of a prediction's prompt, and how many more images it has."""
    named = locations(row)
    return [drawn[location] for location in named[:MOST]], max(0, len(named) - MOST)


def picture(location: str, silent: set[str]) -> Picture:
    """Read an image and make it small.

    Args:
        location: its path or URI.
        silent: storages that did not answer; they are not waited for and not asked again.
    """
    shown = visible(masked(location))
    name = shown.rstrip("/").rpartition("/")[2] or shown
    storage = "/".join(location.split("/")[:3])
    if "://" in location and storage in silent:
        return Picture(name, shown)
    try:
        with retry_for(0):
            image = open_image(read(location))
    except (ValueError, OSError):  # Unreadable, or the location is none
        return Picture(name, shown)
    except StorageFailed:
        silent.add(storage)
        return Picture(name, shown)
    image.thumbnail((SIDE, SIDE))
    factor = max(1, SMALL // max(image.size))
    return Picture(name, shown, _data_url(image), factor * image.size[0], factor > 1)


def _data_url(image: Any) -> str:
    """Encode an image as PNG or JPEG, whichever is smaller: drawings and photographs."""
    encoded = []
    for kind, options in (("png", {"optimize": True}), ("jpeg", {"quality": 80})):
        stream = io.BytesIO()
        image.save(stream, kind, **options)
        encoded.append((len(stream.getvalue()), kind, stream.getvalue()))
    _, kind, content = min(encoded)
    return f"data:image/{kind};base64,{base64.b64encode(content).decode()}"
