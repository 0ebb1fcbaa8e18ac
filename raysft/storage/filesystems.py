"""The filesystem behind a path or a URI."""

from __future__ import annotations

import re
from datetime import timedelta
from functools import lru_cache
from pathlib import Path
from typing import Any
from urllib.parse import quote, unquote

from raysft.storage import hub, modelscope

CONNECT_SECONDS, REQUEST_SECONDS = 5.0, 20.0
"""Longest wait for a byte in one attempt of an S3 request; the client makes three attempts."""
_QUOTABLE = "/:@!$&'()*+,;=~"


def quoted(path: str) -> str:
    """Return a path as it is written in a URI."""
    return quote(path, safe=_QUOTABLE)


def options_of(location: str) -> str:
    """Return the options of a URI for pyarrow (``?region=…``); a question mark without options is part of a glob."""
    found = re.search(r"\?\w+=[^?]*$", location)
    return found.group() if found else ""


def filesystem_of(location: str) -> tuple[Any, str]:
    """Return the pyarrow filesystem of a path or URI, and the path in it."""
    if "://" not in location:
        from pyarrow import fs

        return fs.LocalFileSystem(), str(Path(location).expanduser().absolute())
    if location.startswith("hf://"):
        hub.bound_requests()
    if location.startswith(modelscope.SCHEME):
        return modelscope.filesystem_of(location)
    options = options_of(location)
    scheme, _, rest = location.removesuffix(options).partition("://")
    host, _, path = rest.partition("/")
    # Parse only the beginning: the path may hold globs and spaces, which URIs do not allow.
    filesystem, root = _filesystem(f"{scheme}://{quote(host, safe=_QUOTABLE + '%')}{options}")
    return filesystem, f"{root.rstrip('/')}/{unquote(path)}" if path else root


@lru_cache(maxsize=16)
def _filesystem(root: str) -> tuple[Any, str]:
    from pyarrow import fs

    filesystem, path = fs.FileSystem.from_uri(root)
    if isinstance(filesystem, fs.GcsFileSystem):
        # By default the client retries for 15 minutes, and as long again for credentials.
        _, (options,) = filesystem.__reduce__()
        filesystem = fs.GcsFileSystem(**{**options, "retry_time_limit": timedelta(seconds=REQUEST_SECONDS)})
    if isinstance(filesystem, fs.S3FileSystem):
        # A URI has no options for these. By default a request waits minutes for a server that accepts it but never answers.
        _, (options,) = filesystem.__reduce__()
        bounded = {"connect_timeout": CONNECT_SECONDS, "request_timeout": REQUEST_SECONDS, "allow_delayed_open": True}
        filesystem = fs.S3FileSystem(**{**options, **bounded})
    return filesystem, path
