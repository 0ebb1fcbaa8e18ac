"""Tell a file of LLaMA-Factory from one of raysft, and refuse what cannot be converted."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from raysft.config.config import Config
from raysft.config.llamafactory.conversion import Conversion, schema
from raysft.config.llamafactory.table import TABLE
from raysft.errors import RequestError

SHARED = ("stage",)
"""Keys of both."""


def is_llamafactory(raw: Mapping[Any, Any], where: Callable[[str], str]) -> bool:
    """True for flat keys of LLaMA-Factory, False for sections of raysft or keys that neither has.

    Args:
        raw: the file.
        where: file and line of a key, for error messages.

    Raises:
        RequestError: the file has keys of both.
    """
    flat = [key for key in raw if key in TABLE and key not in SHARED]
    sections = [key for key in raw if key in Config.model_fields and key not in SHARED]
    if flat and sections:
        path = TABLE[flat[0]].path
        instead = f"write {path}" if path in schema() else f"remove {flat[0]}"
        raise RequestError(
            f"{where(flat[0])}: {flat[0]} is a LLaMA-Factory key, but {sections[0]} is a raysft section; {instead}, or keep "
            "only LLaMA-Factory keys"
        )
    return bool(flat)


def refuse(conversion: Conversion, where: Callable[[str], str], listed: str = "which raysft convert lists") -> None:
    """Refuse a file with keys that cannot be taken.

    Args:
        conversion: of the file.
        where: file and line of a key, for error messages.
        listed: where all refusals can be seen.

    Raises:
        RequestError: names the first of them, and how many more there are.
    """
    if conversion.refusals:
        first, *others = conversion.refusals
        more = f" (and {len(others)} more, {listed})" if others else ""
        raise RequestError(f"{where(first.key)}: {first.message}{more}")
