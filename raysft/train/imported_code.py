"""Which code this process has imported: packages and raysft itself, as they were on disk when this module was imported.

It is read this early, before any library in the server that forks workers: what somebody edits or installs later is on disk,
but does not run. This module imports no libraries, so that it can come first.
"""

from __future__ import annotations

import hashlib
import os
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple


class Code(NamedTuple):
    """Names and versions of packages, and a hash of raysft's files."""

    packages: list[str]
    raysft: str


def packages(folders: Iterable[str]) -> list[str]:
    """Return names and versions of all packages in these folders; reading their metadata would take 0.1 s.

    Raises:
        OSError: a folder cannot be read.
    """
    found = {name for folder in set(folders) if os.path.isdir(folder) for name in os.listdir(folder)}
    return sorted(name for name in found if name.endswith(".dist-info"))


def source_hash() -> str:
    """Hash the code of raysft, whose version number stays the same during development.

    Raises:
        OSError: a file cannot be read.
    """
    root, digest = Path(__file__).parent.parent, hashlib.sha256()
    for path in sorted(root.rglob("*.py")):
        digest.update(str(path.relative_to(root)).encode() + b"\0" + hashlib.sha256(path.read_bytes()).digest())
    return digest.hexdigest()


def _read(folders: Iterable[str]) -> Code | None:
    """Read what is on disk; None if that fails, which must not end the import."""
    try:
        return Code(packages(folders), source_hash())
    except OSError:
        return None


_FOLDERS = tuple(map(os.path.abspath, sys.path))  # a fork changes its working directory
_AT_IMPORT = _read(_FOLDERS)


def imported_code() -> Code | None:
    """Return the code that this process runs; None if that is unknown because the code on disk has changed.

    Raises:
        OSError: a folder of ``sys.path`` cannot be read.
    """
    if _AT_IMPORT is None or _read(_FOLDERS) != _AT_IMPORT:
        return None
    return Code(packages(sys.path), _AT_IMPORT.raysft)  # a worker's path also has folders of its job
