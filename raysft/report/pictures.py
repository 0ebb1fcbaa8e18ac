"""Images of prompts as thumbnails on a page: embedded in the page, since it fetches nothing."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from raysft.errors import StorageFailed
from raysft.media.files import read
from raysft.media.images import open_image
from raysft.media.thumbnails import Thumbnail, thumbnail
from raysft.report.text import masked, visible
from raysft.storage.retry import retry_for

MOST = 6
"""Number of images of a prompt that are shown."""
READERS = 4


@dataclass(frozen=True)
class Picture:
    """One image of a prompt."""

    name: str
    """Name of its file."""
    location: str
    """Its path or URI, without secrets."""
    small: Thumbnail | None = None
    """None if the file cannot be read."""


def locations(row: dict[str, Any]) -> list[str]:
    """Paths and URIs of the images of a prediction's prompt."""
    return [str(medium["location"]) for medium in row.get("media") or ()]


def draw(rows: Iterable[dict[str, Any]]) -> dict[str, Picture]:
    """Return the thumbnails that predictions show, by location. Each file is read once."""
    wanted = dict.fromkeys(location for row in rows for location in locations(row)[:MOST])
    silent: set[str] = set()
    with ThreadPoolExecutor(READERS) as readers:
        return dict(zip(wanted, readers.map(lambda location: picture(location, silent), wanted), strict=True))


def pictures(row: dict[str, Any], drawn: dict[str, Picture]) -> tuple[Sequence[Picture], int]:
    """Return the thumbnails of a prediction's prompt, and how many more images it has."""
    named = locations(row)
    return [drawn[location] for location in named[:MOST]], max(0, len(named) - MOST)


def picture(location: str, silent: set[str]) -> Picture:
    """Read an image and make it small.

    Args:
        location: its path or URI.
        silent: storages that did not respond; they are not waited for and not asked again.
    """
    shown = visible(masked(location))
    name = shown.rstrip("/").rpartition("/")[2] or shown
    storage = "/".join(location.split("/")[:3])
    if "://" in location and storage in silent:
        return Picture(name, shown)
    try:
        with retry_for(0):
            image = open_image(read(location))
    except (ValueError, OSError):  # Unreadable, or not a location
        return Picture(name, shown)
    except StorageFailed:
        silent.add(storage)
        return Picture(name, shown)
    return Picture(name, shown, thumbnail(image))
