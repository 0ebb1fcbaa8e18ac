"""Load a config from a YAML file and ``key.path=value`` overrides, with line numbers in error messages."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import yaml

from raysft.config.config import Config
from raysft.config.llamafactory import TABLE, Conversion, convert, is_llamafactory, refuse, render
from raysft.config.validate import validate
from raysft.errors import RequestError, one_line


def parse(raw: Mapping[str, Any]) -> Config:
    """Build a config from nested mappings.

    Raises:
        RequestError: a key is unknown, or a value is invalid.
    """
    return validate(dict(raw), lambda path: "config")


def load(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """Read a YAML file and apply ``key.path=value`` overrides.

    Raises:
        RequestError: the file is missing or not YAML, a key is unknown, or a value is invalid.
    """
    path = Path(path)
    raw, lines = _parse_yaml(_read(path), path)
    if is_llamafactory(raw, lambda key: _place(path, lines, key)):
        conversion, overrides = _convert(raw, overrides)
        refuse(conversion, lambda key: _place(path, lines, key))
        raw = conversion.config
        lines = {tuple(to.split(".")): lines[(key,)] for to, key in conversion.origins.items() if (key,) in lines}
    from_command_line = [_override(raw, override) for override in overrides]

    def where(location: tuple[str, ...]) -> str:
        if any(location[: len(key)] == key for key in from_command_line):
            return "command line"
        if location not in lines and any(key[: len(location)] == location for key in from_command_line):
            return "command line"  # a section that only an override mentions
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


def convert_file(path: str | Path, overrides: Sequence[str] = ()) -> tuple[str, RequestError | None]:
    """Convert a file of LLaMA-Factory into the YAML of raysft.

    Returns:
        The YAML with comments, and why raysft would refuse it.

    Raises:
        RequestError: the file cannot be read, or is not one of LLaMA-Factory.
    """
    path = Path(path)
    raw, lines = _parse_yaml(_read(path), path)
    if not is_llamafactory(raw, lambda key: _place(path, lines, key)):
        raise RequestError(f"{path}: contains no LLaMA-Factory keys; use a file written for llamafactory-cli train")
    conversion, overrides = _convert(raw, overrides)
    if conversion.command:
        return render(conversion, path.name), None
    for override in overrides:
        _override(conversion.config, override)
    try:
        refuse(conversion, lambda key: _place(path, lines, key), "all listed in the output")
        validate(conversion.config, lambda location: str(path))
    except RequestError as error:
        return render(conversion, path.name), error
    return render(conversion, path.name), None


def export_arguments(path: str | Path) -> list[str]:
    """Return the arguments of ``raysft export`` for what a file for ``llamafactory-cli export`` asks.

    Raises:
        RequestError: the file cannot be read, or asks for something else.
    """
    path = Path(path)
    raw, lines = _parse_yaml(_read(path), path)
    if not is_llamafactory(raw, lambda key: _place(path, lines, key)) or not raw.get("export_dir"):
        raise RequestError(
            f"{path}: is not a config for llamafactory-cli export, because it has no export_dir; give such a config, a run "
            "directory or a model"
        )
    conversion = convert(raw)
    if not conversion.command:
        others = [refusal for refusal in conversion.refusals if refusal.key != "export_dir"]
        refuse(replace(conversion, refusals=others), lambda key: _place(path, lines, key))
        raise RequestError(f"{path}: is a training config; give the run directory that the training writes")
    return list(conversion.arguments)


def _convert(raw: dict[str, Any], overrides: Sequence[str]) -> tuple[Conversion, list[str]]:
    """Convert a file of LLaMA-Factory with the overrides that name its own keys; return the others."""
    own = [override for override in overrides if override.partition("=")[0] in TABLE]
    for override in own:
        _override(raw, override)
    return convert(raw), [override for override in overrides if override not in own]


def _place(path: Path, lines: Mapping[tuple[str, ...], int], key: str) -> str:
    return f"{path}:{lines[(key,)]}" if (key,) in lines else str(path)


def _read(path: Path) -> str:
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        raise RequestError(f"{path}: config file not found; use the path of a YAML file") from None
    except OSError as error:
        raise RequestError(
            f"{path}: cannot read the config file ({error.strerror}); use the path of a YAML file"
        ) from None
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise RequestError(
            f"{path}:{line}: not UTF-8 text (byte {content[error.start]:#x}); save the file as UTF-8"
        ) from None


def _override(raw: dict[str, Any], override: str) -> tuple[str, ...]:
    """Apply one ``key.path=value`` override; return the parts of its key."""
    key, equals, value = override.partition("=")
    parts = tuple(key.split("."))
    if not equals or not all(parts):
        raise RequestError(f"{override!r} is not an override; use key.path=value, for example train.epochs=2")
    try:
        parsed = yaml.safe_load(value)
    except (yaml.YAMLError, ValueError, RecursionError):
        raise RequestError(f"{override!r}: the value is not valid YAML; check its quotes and brackets") from None
    _assign(raw, key, parsed, where=f"{override!r}")
    return parts


def _parse_yaml(text: str, path: Path) -> tuple[dict[str, Any], dict[tuple[str, ...], int]]:
    """Parse the file into nested mappings, and find the line of each key path (from 1)."""
    try:
        root = yaml.compose(text, Loader=yaml.SafeLoader)
        raw = yaml.load(text, Loader=yaml.SafeLoader)
    except (ValueError, RecursionError) as error:  # 2024-99-99 is read as a date; an anchor may contain itself
        raise RequestError(f"{path}: invalid YAML ({one_line(error)}); correct the file") from None
    except yaml.YAMLError as error:
        mark, position = getattr(error, "problem_mark", None), getattr(error, "position", 0)
        line = min(mark.line, text.rstrip().count("\n")) if mark else text.count("\n", 0, position)
        reason = getattr(error, "problem", None) or one_line(error)
        raise RequestError(f"{path}:{line + 1}: invalid YAML ({reason}); correct this line") from None
    if raw is None:
        raise RequestError(f"{path}: the config is empty; set at least model.path and data.train")
    if not isinstance(raw, dict):
        raise RequestError(
            f"{path}: a config must be a mapping of sections (model, data, …), but this is {raw!r:.60}; "
            "use configs/quickstart.yaml as an example"
        )
    lines: dict[tuple[str, ...], int] = {}

    def walk(node: yaml.Node, at: tuple[str, ...]) -> None:
        if isinstance(node, yaml.MappingNode):
            for key, value in node.value:
                inner = (*at, str(key.value))
                if inner in lines:
                    raise RequestError(
                        f"{path}:{key.start_mark.line + 1}: duplicate key {'.'.join(inner)} (first on line {lines[inner]}); "
                        "remove one of them"
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
        raise RequestError(f"{path}: invalid YAML (an anchor contains itself); correct the file") from None
    return raw, lines


def _assign(raw: dict[str, Any], key: str, value: Any, where: str) -> None:
    """Set a dotted key inside nested mappings and lists; create missing mappings on the way."""
    node: Any = raw
    *parents, last = key.split(".")
    for position, part in enumerate((*parents, last)):
        named = f"{where}: {'.'.join(parents[:position])}"
        index: Any = part
        if isinstance(node, list):
            if not part.isdigit() or int(part) >= len(node):
                raise RequestError(
                    f"{named} is a list of length {len(node)}, but {part!r} is not an index of it; override an existing item "
                    "or the whole list"
                )
            index = int(part)
        elif not isinstance(node, dict):
            raise RequestError(
                f"{named} is {node!r}, which has no keys; override {'.'.join(parents[:position])} itself"
            )
        elif position < len(parents) and node.get(part) is None:
            node[part] = {}
        if position < len(parents):
            node = node[index]
        else:
            node[index] = value


def with_overrides(config: Config, overrides: Mapping[str, Any]) -> Config:
    """Copy a config with dotted keys set to new values, and validate it."""
    raw = config.model_dump(mode="json")
    for key, value in overrides.items():
        _assign(raw, key, value, where="an override")
    return validate(raw, lambda path: "override")
