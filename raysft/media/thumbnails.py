"""Thumbnails for pages that are one file and fetch nothing."""

from __future__ import annotations

import base64
import io
from dataclasses import dataclass
from typing import Any

SIDE = 128
"""Longest side of a thumbnail in pixels."""
SMALL = 96
"""An image with sides that are several times shorter is enlarged to about this, with visible pixels."""


@dataclass(frozen=True)
class Thumbnail:
    """A thumbnail of an image."""

    source: str
    """The thumbnail as a data URL."""
    width: int
    """Of the thumbnail on the page, in pixels."""
    enlarged: bool


def thumbnail(image: Any) -> Thumbnail:
    """Make a thumbnail of a PIL image in RGB, which it may change."""
    image.thumbnail((SIDE, SIDE))
    factor = max(1, SMALL // max(image.size))
    return Thumbnail(_data_url(image), factor * image.size[0], factor > 1)


def _data_url(image: Any) -> str:
    """Encode an image as PNG or JPEG, whichever is smaller: drawings and photographs."""
    encoded = []
    for kind, options in (("png", {"optimize": True}), ("jpeg", {"quality": 80})):
        stream = io.BytesIO()
        image.save(stream, kind, **options)
        encoded.append((len(stream.getvalue()), kind, stream.getvalue()))
    _, kind, content = min(encoded)
    return f"data:image/{kind};base64,{base64.b64encode(content).decode()}"
