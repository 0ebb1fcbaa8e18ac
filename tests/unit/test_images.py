"""Every kind of image that a data set may hold: as transformers opens it, or refused with a reason."""

from __future__ import annotations

import io
import math
import random
import re
import struct
import warnings
import zlib
from collections import Counter
from contextlib import suppress

import numpy as np
import pytest
from PIL import Image, ImageCms

from raysft.media.files import Unreadable
from raysft.media.images import look_at, open_image, resized, size_within

PIXELS = np.random.default_rng(0).integers(0, 256, (12, 20, 3), dtype=np.uint8)
ORIENTATION = 0x0112


def colour() -> Image.Image:
    return Image.fromarray(PIXELS)


def encoded(image: Image.Image, form: str, **options) -> bytes:
    stream = io.BytesIO()
    image.save(stream, form, **options)
    return stream.getvalue()


def turned(orientation: int, form: str = "JPEG", image: Image.Image | None = None) -> bytes:
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    return encoded(image or colour(), form, exif=exif)


def png(width: int, height: int, data: bytes, *chunks: tuple[bytes, bytes]) -> bytes:
    """A PNG of 8-bit grey by hand."""
    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    body = [(b"IHDR", header), *chunks, (b"IDAT", data), (b"IEND", b"")]
    parts = [
        struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))
        for name, content in body
    ]
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def animation(form: str) -> bytes:
    frames = [Image.new("RGB", (20, 12), shade) for shade in ("red", "green", "blue")]
    return encoded(frames[0], form, save_all=True, append_images=frames[1:])


def with_palette() -> Image.Image:
    image = colour().quantize(16)
    image.info["transparency"] = 3
    return image


ORDINARY = {
    "png": encoded(colour(), "PNG"),
    "jpeg": encoded(colour(), "JPEG"),
    "jpeg-progressive": encoded(colour(), "JPEG", progressive=True),
    "webp": encoded(colour(), "WEBP"),
    "bmp": encoded(colour(), "BMP"),
    "tiff": encoded(colour(), "TIFF"),
    "ppm": encoded(colour(), "PPM"),
    "gif": encoded(colour(), "GIF"),
    "grey": encoded(colour().convert("L"), "PNG"),
    "grey-alpha": encoded(colour().convert("LA"), "PNG"),
    "one-bit": encoded(colour().convert("1"), "PNG"),
    "rgba": encoded(Image.fromarray(np.dstack([PIXELS, PIXELS[:, :, 0]])), "PNG"),
    "palette": encoded(colour().quantize(16), "PNG"),
    "palette-transparent": encoded(with_palette(), "PNG", transparency=3),
    "cmyk": encoded(colour().convert("CMYK"), "JPEG"),
    "cmyk-tiff": encoded(colour().convert("CMYK"), "TIFF"),
    "lab": encoded(Image.new("LAB", (8, 8), (120, 130, 140)), "TIFF"),
    "profile": encoded(colour(), "PNG", icc_profile=ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()),
    "one-pixel": encoded(Image.new("RGB", (1, 1), (1, 2, 3)), "PNG"),
    "a-line": encoded(Image.new("RGB", (300, 1), (1, 2, 3)), "PNG"),
    **{f"turned-{number}": turned(number) for number in range(1, 9)},
    "turned-png": turned(6, "PNG"),
    "turned-webp": turned(8, "WEBP"),
    "animated-gif": animation("GIF"),
    "animated-webp": animation("WEBP"),
    "animated-png": animation("PNG"),
    "two-pages": animation("TIFF"),
    "phone": animation("MPO"),
}


@pytest.mark.parametrize("kind", ORDINARY)
def test_an_ordinary_image_is_what_transformers_makes_of_it(kind, tmp_path):
    from transformers.image_utils import load_image

    (tmp_path / "image").write_bytes(ORDINARY[kind])
    expected, opened = load_image(str(tmp_path / "image")), open_image(ORDINARY[kind])
    assert opened.mode == "RGB"
    assert opened.size == expected.size
    assert opened.tobytes() == expected.tobytes()


@pytest.mark.parametrize("kind", ORDINARY)
def test_a_look_at_an_image_knows_its_size(kind):
    look = look_at(ORDINARY[kind])
    assert (look.width, look.height) == open_image(ORDINARY[kind]).size


def test_a_look_at_a_photo_is_as_strict_as_opening_it():
    source, refused = random.Random(3), Counter[tuple[bool, bool]]()
    photo = turned(6, image=Image.fromarray(np.tile(PIXELS, (10, 10, 1))))
    for _ in range(400):
        damaged = bytearray(photo[: source.choice([len(photo), len(photo), source.randrange(len(photo))])])
        for _ in range(source.randint(0, 4)):
            damaged[source.randrange(len(damaged))] = source.randrange(256)
        outcomes = []
        for function in (look_at, open_image):
            try:
                function(bytes(damaged))
                outcomes.append(True)
            except Unreadable:
                outcomes.append(False)
        refused[outcomes[0], outcomes[1]] += 1
    assert refused.keys() == {(True, True), (False, False)}, refused


def test_a_photo_stands_as_its_camera_was_held():
    assert open_image(turned(6, "PNG")).size == (12, 20)
    assert np.array_equal(np.asarray(open_image(turned(6, "PNG"))), np.rot90(PIXELS, -1))


def test_animations_are_counted_and_photos_with_a_preview_are_not():
    counted = {kind for kind, content in ORDINARY.items() if look_at(content).more_frames}
    assert counted == {"animated-gif", "animated-webp", "animated-png", "two-pages"}


GREY = np.array([[0, 255, 256, 4_000], [30_000, 40_000, 65_000, 65_535]], np.uint16)


@pytest.mark.parametrize(
    "content",
    [
        encoded(Image.fromarray(GREY), "PNG"),
        encoded(Image.fromarray(GREY), "TIFF"),
        encoded(Image.fromarray(GREY.astype(">u2")), "TIFF"),
        b"P5 4 2 65535\n" + GREY.astype(">u2").tobytes(),
    ],
    ids=["png", "tiff", "big-endian", "pgm"],
)
def test_grey_of_16_bits_keeps_its_shades(content):
    """Converted as it is, all above 255 would be white."""
    shades = np.asarray(open_image(content))
    assert np.array_equal(shades[:, :, 0], GREY // 256)
    assert np.array_equal(shades[:, :, 0], shades[:, :, 2])


def test_grey_of_16_bits_is_turned_too():
    assert open_image(turned(6, "PNG", Image.fromarray(GREY))).size == (2, 4)


BAD_EXIF = {
    "cut": b"Exif\0\0MM\0*\0\0\0\x08\0\x05\x01\x12",
    "words": b"Exif\0\0garbage",
    "empty": b"Exif\0\0",
    "far": b"Exif\0\0II*\0\xff\xff\xff\xff",
    "a word as orientation": b"Exif\0\0MM\0*\0\0\0\x08\0\x01\x01\x12\0\x02\0\0\0\x04abcd\0\0\0\0",
    "orientation 99": b"Exif\0\0MM\0*\0\0\0\x08\0\x01\x01\x12\0\x03\0\0\0\x01\0\x63\0\0\0\0\0\0",
}


@pytest.mark.parametrize("kind", BAD_EXIF)
def test_broken_exif_data_do_not_spoil_an_image_or_the_terminal(kind):
    content = encoded(colour(), "JPEG", exif=BAD_EXIF[kind])
    plain = np.asarray(open_image(encoded(colour(), "JPEG")))
    with warnings.catch_warnings(record=True) as seen:
        from raysft.media import images

        images._quiet.cache_clear()
        assert np.array_equal(np.asarray(open_image(content)), plain)
    images._quiet.cache_clear()
    assert not seen


WHOLE = encoded(Image.fromarray(np.tile(PIXELS, (20, 20, 1))), "PNG")
REFUSED = {
    "empty": (b"", "is empty"),
    "text": (b"hello there", "is not an image that PIL can read"),
    "svg": (b'<?xml version="1.0"?><svg/>', "XML"),
    "svg-alone": (b"\n <SVG xmlns='http://www.w3.org/2000/svg'/>", "SVG"),
    "page": (b"<!DOCTYPE html><html>404</html>", "a web page"),
    "postscript": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\n", "PostScript"),
    "pdf": (b"%PDF-1.7", "PDF"),
    "pointer": (b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n", "git lfs pull"),
    "heic": (b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + bytes(64), "HEIC"),
    "cut png": (WHOLE[: len(WHOLE) // 2], "is corrupt"),
    "cut jpeg": (encoded(Image.fromarray(np.tile(PIXELS, (20, 20, 1))), "JPEG")[:3000], "is corrupt"),
    "cut gif": (animation("GIF")[:40], "is corrupt"),
    "cut header": (WHOLE[:20], "is corrupt"),
    "wrong checksum": (WHOLE[:30] + b"\0" + WHOLE[31:], "is corrupt"),
    "no pixels": (png(0, 4, zlib.compress(b"")), "is corrupt"),
    "no pixels, gif": (b"GIF89a\0\0\0\0\0\0\0;", "is corrupt"),
    "bomb": (png(60_000, 60_000, zlib.compress(b"\0" * 1000)), "more than 178,956,970 pixels"),
    "bomb of text": (
        png(2, 2, zlib.compress(b"\0" * 6), (b"zTXt", b"a\0\0" + zlib.compress(b"a" * (100 << 20)))),
        "is corrupt",
    ),
    "32 bits": (encoded(Image.fromarray(GREY.astype(np.int32)), "TIFF"), "32-bit integers"),
    "fractions": (encoded(Image.fromarray(GREY.astype(np.float32)), "TIFF"), "fractions"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_what_is_no_image_is_refused_with_a_reason(kind):
    content, words = REFUSED[kind]
    with pytest.raises(Unreadable) as refused:
        open_image(content)
    with pytest.raises(Unreadable, match=re.escape(str(refused.value))):
        look_at(content)
    assert words in str(refused.value)
    assert "\n" not in str(refused.value)
    assert "BytesIO" not in str(refused.value)


@pytest.mark.filterwarnings("ignore")
def test_files_with_random_damage_open_or_are_refused():
    source = random.Random(0)
    for content in (
        ORDINARY["png"],
        ORDINARY["jpeg"],
        ORDINARY["webp"],
        ORDINARY["animated-gif"],
        ORDINARY["tiff"],
        ORDINARY["turned-6"],
    ):
        for _ in range(40):
            damaged = bytearray(content)
            for _ in range(source.randint(1, 8)):
                damaged[source.randrange(len(damaged))] = source.randrange(256)
            with suppress(Unreadable):
                assert open_image(bytes(damaged)).mode == "RGB"


def llamafactory_size(width: int, height: int, most: int, least: int) -> tuple[int, int]:
    """As its ``_preprocess_image`` computes it."""
    for wrong, limit in ((lambda pixels: pixels > most, most), (lambda pixels: pixels < least, least)):
        if wrong(width * height):
            factor = math.sqrt(limit / (width * height))
            width, height = int(width * factor), int(height * factor)
    return width, height


def test_sizes_are_those_of_llamafactory():
    source = random.Random(0)
    for _ in range(20_000):
        width, height = (int(math.exp(source.uniform(0, 9))) for _ in range(2))
        most = source.choice([589_824, 65_536, 12_345])
        assert size_within(width, height, most, 1024) == llamafactory_size(width, height, most, 1024)
    assert size_within(100_000, 1, 1000, None) == (10_000, 1)  # where LLaMA-Factory has an image without pixels


def test_an_image_of_the_right_size_is_not_resized():
    image = colour()
    assert resized(image, 20, 12) is image
    assert resized(image, 10, 6).size == (10, 6)
