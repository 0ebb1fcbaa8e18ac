"""Open images and bring them to the size that the processor is given."""

from __future__ import annotations

import math
import warnings
from contextlib import suppress
from dataclasses import dataclass
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
    (b"<!doctype", "a web page"),
    (b"<html", "a web page"),
    (b"%pdf", "PDF"),
)
"""How files begin that are no images of pixels → what they are. PIL would start another program for PostScript."""
PHOTOS = ("JPEG", "MPO")
"""Formats that are decoded with fewer pixels in less time."""
ORIENTATION, SIDEWAYS = 0x0112, (5, 6, 7, 8)
"""Tag of EXIF data, and its values for cameras that were held upright."""
PHOTOS_OF_PHONES = (b"ftypheic", b"ftypheix", b"ftypmif1", b"ftyphevc")
POINTER = b"version https://git-lfs"
"""How a file begins that stands for a large one in a repository."""
BITS_PER_SAMPLE = 258
"""Tag of a TIFF file."""


@dataclass(frozen=True)
class Look:
    """What is known of an image that opens."""

    width: int
    """Pixels, as ``open_image`` gives it."""
    height: int
    more_frames: bool
    """True if it has more than the frame that is taken. Previews and layers are none."""


def open_image(content: bytes) -> Any:
    """Open an encoded image as a PIL image in RGB, turned as its file says: of an animation the first frame.

    Ordinary images are what transformers makes of them. Grey ones of 16 bits are brought to 8, not cut off.

    Raises:
        Unreadable: it is broken, too large, or no image.
    """
    from PIL import ImageOps

    image, _ = _loaded(content)
    with suppress(Exception):  # its EXIF data may be broken, not its pixels
        ImageOps.exif_transpose(image, in_place=True)
    try:
        return _eight_bits(image).convert("RGB")
    except Unreadable:
        raise
    except Exception as error:
        raise Unreadable(f"cannot be converted to RGB ({one_line(error)})") from None


def look_at(content: bytes) -> Look:
    """Find out whether an encoded image opens, and its size.

    Photos are read to their end with an eighth of their pixels, which takes a fifth of the time.

    Raises:
        Unreadable: as ``open_image`` does.
    """
    image, (width, height) = _loaded(content, reduced=True)
    more = image.format not in ("MPO", "PSD") and bool(getattr(image, "is_animated", False))
    if image.format not in PHOTOS:
        width, height = open_image(content).size
        return Look(width, height, more)
    turned = False
    with suppress(Exception):
        turned = image.getexif().get(ORIENTATION) in SIDEWAYS
    return Look(height, width, more) if turned else Look(width, height, more)


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


def _loaded(content: bytes, reduced: bool = False) -> tuple[Any, tuple[int, int]]:
    """Decode an image, with ``reduced`` only a photo and with fewer pixels; returns it and its size."""
    from PIL import Image

    _refuse_foreign(content)
    _quiet()
    try:
        image = Image.open(BytesIO(content))
        if min(image.size) < 1:
            raise Unreadable("has no pixels")
        size = image.size
        if reduced and image.format in PHOTOS:
            image.draft(None, (image.width // 8, image.height // 8))
        if not reduced or image.format in PHOTOS:
            image.load()
        return image, size
    except Unreadable:
        raise
    except Image.UnidentifiedImageError:
        raise Unreadable(
            f"is not an image that PIL can read, or is corrupt (it begins with {content[:12]!r})"
        ) from None
    except Image.DecompressionBombError:
        raise Unreadable(f"has more than {2 * (Image.MAX_IMAGE_PIXELS or 0):,} pixels; scale it down") from None
    except Exception as error:  # decoders may raise anything on a broken file
        raise Unreadable(f"is corrupt ({one_line(error)})") from None


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
        kind = "32-bit integers" if image.mode == "I" else "fractions"
        raise Unreadable(f"has {kind} as pixels, which have no defined white level; save it with 8 or 16 bits")
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
            raise Unreadable(f"is {kind}, not a raster image; save it as PNG or JPEG")
    if start.startswith(POINTER):
        raise Unreadable("is a Git LFS pointer, not the image; fetch the images with git lfs pull")
    if content[4:12] in PHOTOS_OF_PHONES:
        raise Unreadable("is HEIC, which PIL does not read; save it as PNG or JPEG")


@cache
def _quiet() -> None:
    """Keep PIL from warning on the terminal of every worker about images that are large, or have broken EXIF data."""
    warnings.filterwarnings("ignore", module=r"PIL\.")
