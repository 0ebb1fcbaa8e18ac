"""The encoded files of images, wherever they are."""

from __future__ import annotations

from hashlib import blake2b

from raysft.storage.path import StoragePath

DIGEST_BYTES = 16
"""Bytes of a hash."""
REMEDY = "restore it, or set another data.cache and run.name to tokenize the data anew"
"""What to do about a file that has changed or gone."""


class Unreadable(ValueError):
    """A file of an image cannot be used; says which and why."""


def digest(content: bytes) -> str:
    """Hash an encoded file, as hexadecimal digits."""
    return blake2b(content, digest_size=DIGEST_BYTES).hexdigest()


Status = list[int] | None
"""Size and time of a file; None if it is not there."""


def status(location: str) -> Status:
    """Return what tells whether a file is still the same, without reading it.

    Raises:
        StorageFailed: its storage does not answer.
    """
    try:
        entry = StoragePath(location).entry()
    except (OSError, ValueError):
        return None
    return [entry.size, entry.modified]


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
