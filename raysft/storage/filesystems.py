"""The filesystem behind a path or a URI."""

from __future__ import annotations

import re
from datetime import timedelta
from functools import lru_cache
from pathlib import Path
from typing import Any
from urllib.parse import quote, unquote

from raysft.storage import hub

CONNECT_SECONDS, REQUEST_SECONDS = 5.0, 20.0
"""How long one attempt of a request to S3 may wait without a byte; there are three."""
_QUOTABLE = "/:@!$&'()*+,;=~"


def quoted(path: str) -> str:
    """A path as a URI has it."""
    return quote(path, safe=_QUOTABLE)


def options_of(location: str) -> str:
    """The options of a URI (``?region=…``), as pyarrow takes them; a question mark without options is part of a glob."""
    found = re.search(r"\?\w+=[^?]*$", location)
    return found.group() if found else ""


def filesystem_of(location: str) -> tuple[Any, str]:
    """The pyarrow filesystem of a path or URI, and the path in it."""
    if "://" not in location:
        from pyarrow import fs

        return fs.LocalFileSystem(), str(Path(location).expanduser().absolute())
    if location.startswith("hf://"):
        hub.be_patient()
    options = options_of(location)
    scheme, _, rest = location.removesuffix(options).partition("://")
    host, _, path = rest.partition("/")
    # Only where it begins is parsed: a glob is no part of a URI, and people write spaces as they are.
    filesystem, root = _filesystem(f"{scheme}://{quote(host, safe=_QUOTABLE + '%')}{options}")
    return filesystem, f"{root.rstrip('/')}/{unquote(path)}" if path else root


@lru_cache(maxsize=16)
def _filesystem(root: str) -> tuple[Any, str]:
    from pyarrow import fs

    filesystem, path = fs.FileSystem.from_uri(root)
    if isinstance(filesystem, fs.GcsFileSystem):
        # By itself it asks for a quarter of an hour, and for that long again for its credentials.
        _, (options,) = filesystem.__reduce__()
        filesystem = fs.GcsFileSystem(**{**options, "retry_time_limit": timedelta(seconds=REQUEST_SECONDS)})
    if isinstance(filesystem, fs.S3FileSystem):
        # A URI has no option for these. Without them a server that takes a request and never answers holds it for minutes.
        _, (options,) = filesystem.__reduce__()
        bounded = {"connect_timeout": CONNECT_SECONDS, "request_timeout": REQUEST_SECONDS, "allow_delayed_open": True}
        filesystem = fs.S3FileSystem(**{**options, **bounded})
    return filesystem, path
