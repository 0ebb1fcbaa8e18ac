"""The encoded files of images, wherever they are."""

from __future__ import annotations

from contextlib import suppress
from hashlib import blake2b

from raysft.storage.path import StoragePath

DIGEST_BYTES = 16
"""Bytes of a hash."""
MAX_BYTES = 1 << 30
"""Most bytes of a local file."""
REMEDY = "restore it, or set another data.cache and run.name to tokenize the data again"
"""What to do about a file that has changed or gone."""


class Unreadable(ValueError):
    """A file of an image cannot be used; says which and why."""


def digest(content: bytes) -> str:
    """Hash an encoded file, as hexadecimal digits."""
    return blake2b(content, digest_size=DIGEST_BYTES).hexdigest()


Status = list[int] | None
"""Size and time of a file; None if it is not there."""
Identity = list[int | str] | None
"""What tells whether a file holds the same; None if it is not there."""


def status(location: str) -> Status:
    """Return what tells whether a file is still the same, without reading it.

    Raises:
        StorageFailed: its storage does not respond.
    """
    try:
        entry = StoragePath(location).entry()
    except (OSError, ValueError):
        return None
    return [entry.size, entry.modified]


def identity(location: str) -> Identity:
    """Return the size of a file with the hash of its content, if it is local, so that a copy is the same; else with its time.

    Of what is not a file, such as a folder, nothing is told.

    Raises:
        StorageFailed: its storage does not respond.
    """
    found, local = status(location), StoragePath(location).local
    if found is None:
        return None
    if local and not local.is_file():
        return []
    if local and found[0] <= MAX_BYTES:
        with suppress(OSError):
            # Files of /proc, which may have no end, have no size.
            return [found[0], digest(local.read_bytes() if found[0] else b"")]
    return [*found]


def read(location: str, expected: str = "") -> bytes:
    """Read a file.

    Args:
        location: path or URI.
        expected: the hash that it had when it was tokenized.

    Raises:
        Unreadable: it cannot be read, or has another hash.
    """
    path = StoragePath(location)
    try:
        content = path.read_bytes()
    except OSError as error:
        raise Unreadable(f"{path}: cannot be read ({error.strerror or error}); {REMEDY}") from None
    if expected and digest(content) != expected:
        raise Unreadable(f"{path}: has changed since it was tokenized; {REMEDY}")
    return content
