"""Where this machine keeps its copies of remote files."""

from __future__ import annotations

import os
from pathlib import Path

from raysft.errors import RequestError


def cache_home() -> Path:
    """Folder for all copies on this machine.

    Raises:
        RequestError: the user has no home folder, as containers that run under any number do.
    """
    try:
        return Path.home() / ".cache" / "raysft"
    except RuntimeError:
        raise RequestError(
            f"user {os.getuid()} has no home directory, and HOME is not set; set it on every node"
        ) from None
