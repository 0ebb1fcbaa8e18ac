"""Open images and bring them to the size that the processor is given."""

from __future__ import annotations

from io import BytesIO
from typing import Any

from raysft.media.files import Unreadable


def open_image(content: bytes) -> Any:
    """Open an encoded image as a PIL image in RGB, turned as its file says.

    Raises:
        Unreadable: it is broken, too large, or no image.
    """
    from PIL import Image, ImageOps

    try:
        image = Image.open(BytesIO(content))
        return ImageOps.exif_transpose(image).convert("RGB")
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise Unreadable(str(error)) from None


def resized(image: Any, width: int, height: int) -> Any:
    """Bring an image to a size in pixels; the same image if it has that size."""
    return image if image.size == (width, height) else image.resize((width, height))
