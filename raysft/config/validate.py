"""Validate nested mappings against the config schema; describe the first error in one line, with a remedy."""

from __future__ import annotations

import difflib
import json
from collections.abc import Callable, Iterator, Sequence
from typing import Any, get_args

from pydantic import ValidationError

from raysft.config.config import Config
from raysft.config.conflicts import refuse_conflicts
from raysft.config.data import Column, Source, Tag
from raysft.config.secrets import refuse_secrets
from raysft.config.section import Section
from raysft.errors import RequestError, as_yaml

UNKNOWN_KEY = ("extra_forbidden", "invalid_key")
WORDING = {
    "model_type": "must be a section with its own keys",
    "string_pattern_mismatch": "must start with a letter or digit and contain only letters, digits, '.', '_' and '-'",
    "string_too_short": "must not be empty",
    "too_short": "must not be empty",
    "bool_parsing": "must be true or false",
    "bool_type": "must be true or false",
    "dict_type": "must be a mapping of keys to values",
}
"""Pydantic error types whose message we replace."""
RENAMED = {
    "train.rows_per_step": "train.global_batch_size",
    "train.rows_per_device": "train.micro_batch_size",
    "data.overlong": "data.on_overflow",
}
"""Keys of earlier versions → their names now."""


def documented_fields(section: type[Section] = Config, prefix: str = "") -> Iterator[tuple[str, str, str]]:
    """Yield (key path, default, docstring) of every config key, in the order of the schema."""
    for name, field in section.model_fields.items():
        nested = field.annotation
        if isinstance(nested, type) and issubclass(nested, Section):
            yield from documented_fields(nested, f"{prefix}{name}.")
            continue
        default = "required" if field.is_required() else json.dumps(field.get_default())
        yield f"{prefix}{name}", default, " ".join((field.description or "").split())
        if prefix + name == "data.train":
            yield from documented_fields(Source, "data.train[].")


def validate(raw: dict[str, Any], where: Callable[[tuple[str, ...]], str]) -> Config:
    """Build a config from nested mappings.

    Args:
        raw: the mappings, as YAML gives them.
        where: file and line of a key path, for error messages.

    Raises:
        RequestError: names the first unknown key, wrong value, secret or conflict.
    """
    refuse_secrets(raw, where)  # first, because other messages repeat the value
    try:
        config = Config.model_validate(raw)
    except ValidationError as error:
        problems: dict[tuple[str, ...], list[Any]] = {}
        for problem in sorted(error.errors(), key=lambda problem: problem["type"] not in UNKNOWN_KEY):
            problems.setdefault(_key_path(problem, raw), []).append(problem)
        # For a wrong item of a list, the other members of a union report the whole list too; the item is more exact.
        exact = [path for path in problems if not any(path == other[: len(path)] for other in problems.keys() - {path})]
        more = f" (and {len(exact) - 1} more)" if len(exact) > 1 else ""
        raise RequestError(f"{where(exact[0])}: {_describe(exact[0], problems[exact[0]])}{more}") from None
    refuse_conflicts(config)
    return config


def _key_path(problem: Any, raw: Any) -> tuple[str, ...]:
    """Key path that a problem is about, without the type names that pydantic inserts for members of a union."""
    path = []
    value = raw
    for part in problem["loc"]:
        known = part in value if isinstance(value, dict) else isinstance(value, list) and part in range(len(value))
        if known:
            value = value[part]
        elif problem["type"] != "missing":
            continue
        path.append(str(part))
    return tuple(path)


def _describe(path: tuple[str, ...], problems: Sequence[Any]) -> str:
    """Describe the problems with one key (one for each member of a union) and the remedy."""
    # The member of a union whose type matches has the most specific message.
    problem, *others = [one for one in problems if not one["type"].endswith(("_type", "_error"))] or problems
    key = ".".join(path)
    if problem["type"] in UNKNOWN_KEY or problem["loc"][-1:] == ("[key]",):
        return f"unknown key {key if key.strip() else repr(key)}; {suggest(path)}"
    if problem["type"] == "missing":
        return f"{key} is required, but missing; add it"
    value = "" if isinstance(problem["input"], dict | Section) else f"={as_yaml(problem['input']):.80}"
    message = WORDING.get(problem["type"]) or problem["msg"].removeprefix("Value error, ")
    message = message.replace("Input should", "must")
    for other in others:
        message += f" or {other['msg'].removeprefix('Input should be ')}"
    return f"{key or 'config'}{value}: {message[0].lower()}{message[1:]}"


def suggest(path: tuple[str, ...]) -> str:
    """Suggest a known key for an unknown one: a similar key of its section, or one with the same name in another section."""
    if renamed := RENAMED.get(".".join(path)):
        return f"it is now called {renamed}"
    *section, name = path
    known = _known_keys(section)
    elsewhere: dict[str, list[str]] = {}
    for key, _, _ in documented_fields():
        parts = key.split(".")
        for end in range(1, len(parts) + 1):
            elsewhere.setdefault(parts[end - 1], []).append(".".join(parts[:end]))
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.75)
    if not close and name in elsewhere:
        return f"did you mean {' or '.join(dict.fromkeys(elsewhere[name]))}?"
    close = close or difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    if close:
        return f"did you mean {'.'.join((*section, close[0]))}?"
    close = difflib.get_close_matches(name, elsewhere, n=1, cutoff=0.75)
    return (
        f"did you mean {elsewhere[close[0]][0]}?" if close else f"known keys: {', '.join(known or Config.model_fields)}"
    )


def _known_keys(location: Sequence[str]) -> list[str]:
    """Keys of the section at a location."""
    section: Any = Config
    for part in location:
        if part.isdigit():
            section = Source
        elif section is Source and part in ("columns", "tags"):
            return list(get_args(Column if part == "columns" else Tag))
        else:
            fields = getattr(section, "model_fields", {})
            section = fields[part].annotation if part in fields else None
    return list(section.model_fields) if hasattr(section, "model_fields") else []
