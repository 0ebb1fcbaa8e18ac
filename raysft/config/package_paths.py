"""Paths of files inside installed Python packages: ``package:NAME/PATH``."""

from __future__ import annotations

import importlib.util
from pathlib import Path

from raysft.errors import RequestError


def locate(path: str, key: str) -> str:
    """Resolve ``package:NAME/PATH`` without importing the package; return any other path unchanged.

    Args:
        path: ``package:NAME/PATH``, or any other path.
        key: the config key that holds the path, for the error message.

    Raises:
        RequestError: the package is not installed.
    """
    if not path.startswith("package:"):
        return path
    package, _, inner = path.removeprefix("package:").partition("/")
    spec = importlib.util.find_spec(package) if package.isidentifier() else None
    if spec is None or not spec.origin:
        raise RequestError(f"{key}: {path}: the Python package {package!r} is not installed; install it with pip")
    return str(Path(spec.origin).parent / inner)
