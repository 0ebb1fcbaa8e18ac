"""Files inside installed Python packages: ``package:NAME/PATH``."""

from __future__ import annotations

import importlib.util
from pathlib import Path

from raysft.errors import RequestError


def locate(path: str, key: str) -> str:
    """Where a path of the config is: inside a package, found without importing it, or as it stands.

    Args:
        path: ``package:NAME/PATH``, or any other path.
        key: what the path belongs to, for the message.

    Raises:
        RequestError: the package is not installed.
    """
    if not path.startswith("package:"):
        return path
    package, _, inner = path.removeprefix("package:").partition("/")
    spec = importlib.util.find_spec(package) if package.isidentifier() else None
    if spec is None or not spec.origin:
        raise RequestError(f"{key}: {path}: Python package {package!r} is not installed; pip install it")
    return str(Path(spec.origin).parent / inner)
