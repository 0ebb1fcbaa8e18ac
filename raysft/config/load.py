"""A YAML file and ``key.path=value`` overrides → a config; lines of the file are kept for messages."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from raysft.config.config import Config
from raysft.config.validate import validate
from raysft.errors import RequestError, one_line


def parse(raw: Mapping[str, Any]) -> Config:
    """A config from nested mappings.

    Raises:
        RequestError: a key or value is not what the schema says.
    """
    return validate(dict(raw), lambda path: "config")


def load(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """Read a YAML file and apply ``key.path=value`` overrides.

    Raises:
        RequestError: the file is missing or no YAML, or a key or value is not what the schema says.
    """
    path = Path(path)
    raw, lines = _parse_yaml(_read(path), path)
    from_command_line = [_override(raw, override) for override in overrides]

    def where(location: tuple[str, ...]) -> str:
        if any(location[: len(key)] == key for key in from_command_line):
            return "command line"
        if location not in lines and any(key[: len(location)] == location for key in from_command_line):
            return "command line"  # a section that an override made
        for end in range(len(location), 0, -1):
            if location[:end] in lines:
                return f"{path}:{lines[location[:end]]}"
        return str(path)

    run = raw.setdefault("run", {})
    if run is None:
        run = raw["run"] = {}
    if isinstance(run, dict):
        run.setdefault("name", re.sub(r"[^A-Za-z0-9._-]+", "-", path.stem).lstrip("._-") or "run")
    return validate(raw, where)


def _read(path: Path) -> str:
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        raise RequestError(f"{path}: there is no such config file; give the path of a YAML file") from None
    except OSError as error:
        raise RequestError(f"{path}: the config file cannot be read ({error.strerror})") from None
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise RequestError(
            f"{path}:{line}: is not UTF-8 text (byte {content[error.start]:#x}); mend this line"
        ) from None


def _override(raw: dict[str, Any], override: str) -> tuple[str, ...]:
    """Set what one ``key.path=value`` says; gives the key's parts."""
    key, equals, value = override.partition("=")
    parts = tuple(key.split("."))
    if not equals or not all(parts):
        raise RequestError(f"{override!r} is no override; write key.path=value, for example train.epochs=2")
    try:
        parsed = yaml.safe_load(value)
    except (yaml.YAMLError, ValueError, RecursionError):
        raise RequestError(f"{override!r}: the value is no YAML scalar, list or mapping") from None
    _assign(raw, key, parsed, where=f"{override!r}")
    return parts


class _LineLoader(yaml.SafeLoader):
    """Safe YAML; a key that stands twice is an error, not the silent loss of the first."""


def _parse_yaml(text: str, path: Path) -> tuple[dict[str, Any], dict[tuple[str, ...], int]]:
    """The file's mapping, and the line on which each key path stands (from 1)."""
    try:
        root = yaml.compose(text, Loader=_LineLoader)
        raw = yaml.load(text, Loader=_LineLoader)
    except (ValueError, RecursionError) as error:  # 2024-99-99 is taken for a date; an anchor may hold itself
        raise RequestError(f"{path}: no usable YAML ({one_line(error)}); mend the file") from None
    except yaml.YAMLError as error:
        mark, position = getattr(error, "problem_mark", None), getattr(error, "position", 0)
        line = min(mark.line, text.rstrip().count("\n")) if mark else text.count("\n", 0, position)
        reason = getattr(error, "problem", None) or one_line(error)
        raise RequestError(f"{path}:{line + 1}: no valid YAML ({reason}); mend this line") from None
    if raw is None:
        raise RequestError(f"{path}: the config is empty; it needs at least model.path and data.train")
    if not isinstance(raw, dict):
        raise RequestError(f"{path}: a config is a mapping of sections (model, data, …), this is {raw!r:.60}")
    lines: dict[tuple[str, ...], int] = {}

    def walk(node: yaml.Node, at: tuple[str, ...]) -> None:
        if isinstance(node, yaml.MappingNode):
            for key, value in node.value:
                inner = (*at, str(key.value))
                if inner in lines:
                    raise RequestError(
                        f"{path}:{key.start_mark.line + 1}: {'.'.join(inner)} stands twice (first on line {lines[inner]}); "
                        "keep one"
                    )
                lines[inner] = key.start_mark.line + 1
                walk(value, inner)
        elif isinstance(node, yaml.SequenceNode):
            for index, value in enumerate(node.value):
                lines[(*at, str(index))] = value.start_mark.line + 1
                walk(value, (*at, str(index)))

    try:
        if root is not None:
            walk(root, ())
    except RecursionError:
        raise RequestError(f"{path}: no usable YAML (an anchor holds itself); mend the file") from None
    return raw, lines


def _assign(raw: dict[str, Any], key: str, value: Any, where: str) -> None:
    """Set a dotted key inside nested mappings and lists, making mappings on the way."""
    at: Any = raw
    parts = key.split(".")
    for position, part in enumerate(parts):
        last = position == len(parts) - 1
        if isinstance(at, list):
            if not part.isdigit() or int(part) >= len(at):
                raise RequestError(
                    f"{where}: {'.'.join(parts[:position])} is a list of {len(at)}; {part!r} is none of them"
                )
            if last:
                at[int(part)] = value
            else:
                at = at[int(part)]
        elif isinstance(at, dict):
            if last:
                at[part] = value
            else:
                if at.get(part) is None:
                    at[part] = {}
                at = at[part]
        else:
            raise RequestError(f"{where}: {'.'.join(parts[:position])} holds {at!r} and has no keys inside")


def with_overrides(config: Config, overrides: Mapping[str, Any]) -> Config:
    """A copy of a config with dotted keys set to new values, validated."""
    raw = config.model_dump(mode="json")
    for key, value in overrides.items():
        _assign(raw, key, value, where="an override")
    return validate(raw, lambda path: "override")
