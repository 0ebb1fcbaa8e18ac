"""Open images and bring them to the size that the processor is given."""

from __future__ import annotations

import math
import warnings
from contextlib import suppress
from functools import cache
from io import BytesIO
from typing import Any

from raysft.errors import one_line
from raysft.media.files import Unreadable

FOREIGN = (
    (b"%!PS", "PostScript"),
    (b"\xc5\xd0\xd3\xc6", "PostScript"),
    (b"<svg", "SVG"),
    (b"<?xml", "XML"),
    (b"<!doctype", "a page of the web"),
    (b"<html", "a page of the web"),
    (b"%pdf", "PDF"),
)
"""How files begin that are no images of pixels → what they are. PIL would start another program for PostScript."""
PHOTOS_OF_PHONES = (b"ftypheic", b"ftypheix", b"ftypmif1", b"ftyphevc")
BITS_PER_SAMPLE = 258
"""Tag of a TIFF file."""


def open_image(content: bytes) -> Any:
    """Open an encoded image as a PIL image in RGB, turned as its file says: of an animation the first frame.

    Ordinary images are what transformers makes of them. Grey ones of 16 bits are brought to 8, not cut off.

    Raises:
        Unreadable: it is broken, too large, or no image.
    """
    from PIL import Image, ImageOps

    _refuse_foreign(content)
    _quiet()
    try:
        image = Image.open(BytesIO(content))
        if min(image.size) < 1:
            raise Unreadable("has no pixels")
        image.load()
    except Unreadable:
        raise
    except Image.UnidentifiedImageError:
        raise Unreadable(f"is no image that PIL knows, or is broken (it begins with {content[:12]!r})") from None
    except Image.DecompressionBombError:
        raise Unreadable(f"has more than {2 * (Image.MAX_IMAGE_PIXELS or 0):,} pixels; scale it down") from None
    except Exception as error:  # decoders raise whatever a broken file leads them to
        raise Unreadable(f"is broken ({one_line(error)})") from None
    with suppress(Exception):  # its EXIF data may be broken, not its pixels
        ImageOps.exif_transpose(image, in_place=True)
    try:
        return _eight_bits(image).convert("RGB")
    except Unreadable:
        raise
    except Exception as error:
        raise Unreadable(f"cannot be converted to RGB ({one_line(error)})") from None


def has_more_frames(content: bytes) -> bool:
    """True for an image that opens, and has more than the frame that is taken. Previews and layers are none."""
    from PIL import Image

    with Image.open(BytesIO(content)) as image:
        return image.format not in ("MPO", "PSD") and bool(getattr(image, "is_animated", False))


def size_within(width: int, height: int, max_pixels: int | None, min_pixels: int | None) -> tuple[int, int]:
    """Size of an image within limits of its pixels, with about its ratio, as LLaMA-Factory scales it.

    >>> size_within(4000, 3000, 589_824, 1024), size_within(1, 1, None, 1024), size_within(640, 480, None, None)
    ((886, 665), (32, 32), (640, 480))
    """
    if max_pixels and width * height > max_pixels:
        width, height = _scaled(width, height, max_pixels)
    if min_pixels and width * height < min_pixels:
        width, height = _scaled(width, height, min_pixels)
    return width, height


def resized(image: Any, width: int, height: int) -> Any:
    """Bring an image to a size in pixels; the same image if it has that size."""
    return image if image.size == (width, height) else image.resize((width, height))


def _scaled(width: int, height: int, pixels: int) -> tuple[int, int]:
    factor = math.sqrt(pixels / (width * height))
    return max(1, int(width * factor)), max(1, int(height * factor))


def _eight_bits(image: Any) -> Any:
    """An image with 8 bits a channel; ``convert`` would make white of nearly all that a grey one of 16 bits has."""
    import numpy as np
    from PIL import Image

    bits = 8
    if image.mode.startswith("I;16"):
        tags = getattr(image, "tag_v2", {})
        bits = int(tags.get(BITS_PER_SAMPLE, (16,))[0])
    elif image.mode == "I" and image.format == "PPM":
        bits = 16
    elif image.mode in ("I", "F"):
        kind = "whole numbers of 32 bits" if image.mode == "I" else "fractions"
        raise Unreadable(f"has {kind} as pixels, which have no fixed white; save it with 8 or 16 bits")
    if bits <= 8:
        return image
    values = np.asarray(image).astype(np.uint32) >> (bits - 8)
    return Image.fromarray(np.minimum(values, 255).astype(np.uint8))


def _refuse_foreign(content: bytes) -> None:
    if not content:
        raise Unreadable("is empty")
    start = content[:1024].removeprefix(b"\xef\xbb\xbf").lstrip().lower()
    for beginning, kind in FOREIGN:
        if start.startswith(beginning.lower()):
            raise Unreadable(f"is {kind}, and no image of pixels; save it as PNG or JPEG")
    if content[4:12] in PHOTOS_OF_PHONES:
        raise Unreadable("is HEIC, which PIL does not read; save it as PNG or JPEG")


@cache
def _quiet() -> None:
    """Keep PIL from warning on the terminal of every worker about images that are large, or have broken EXIF data."""
    warnings.filterwarnings("ignore", module=r"PIL\.")
