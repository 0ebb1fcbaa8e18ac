"""Nested mappings → a config, or one line that says where it is wrong and what to write instead."""

from __future__ import annotations

import difflib
import json
from collections.abc import Callable, Iterator, Sequence
from typing import Any, get_args

from pydantic import ValidationError

from raysft.config.config import Config
from raysft.config.conflicts import refuse
from raysft.config.data import Column, Source, Tag
from raysft.config.secrets import refuse_secrets
from raysft.config.section import Section
from raysft.errors import RequestError

UNKNOWN = ("extra_forbidden", "invalid_key")
WORDING = {
    "model_type": "a section with keys of its own belongs here",
    "string_pattern_mismatch": "use letters, digits, '.', '_' and '-', with a letter or digit first",
    "string_too_short": "should not be empty",
    "too_short": "should not be empty",
}
"""What pydantic says in words of its own, said in ours."""
RENAMED = {
    "train.rows_per_step": "train.global_batch_size",
    "train.rows_per_device": "train.micro_batch_size",
    "data.overlong": "data.on_overflow",
}
"""Keys of earlier versions, and what they are called now."""


def documented_fields(section: type[Section] = Config, prefix: str = "") -> Iterator[tuple[str, str, str]]:
    """Every key path of the config with its default and its docstring, in the order of the schema."""
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
    refuse_secrets(raw, where)  # first: other refusals repeat the value
    try:
        config = Config.model_validate(raw)
    except ValidationError as error:
        problems: dict[tuple[str, ...], list[Any]] = {}
        for problem in sorted(error.errors(), key=lambda problem: problem["type"] not in UNKNOWN):
            problems.setdefault(_place(problem, raw), []).append(problem)
        # Where a list of names holds a wrong one, the other member of a union complains about the list as a whole.
        exact = [
            place for place in problems if not any(place == other[: len(place)] for other in problems.keys() - {place})
        ]
        more = f" (and {len(exact) - 1} more)" if len(exact) > 1 else ""
        raise RequestError(f"{where(exact[0])}: {_describe(exact[0], problems[exact[0]])}{more}") from None
    refuse(config)
    return config


def _place(problem: Any, raw: Any) -> tuple[str, ...]:
    """The key that a problem is about. Pydantic adds names of types to it, which are no keys of the file."""
    place = []
    at = raw
    for part in problem["loc"]:
        if part in at if isinstance(at, dict) else isinstance(at, list) and isinstance(part, int) and part < len(at):
            at = at[part]
        elif problem["type"] != "missing":
            continue
        place.append(str(part))
    return tuple(place)


def _describe(place: tuple[str, ...], problems: Sequence[Any]) -> str:
    """What is wrong with one key, and what to write instead; members of a union each have a problem with it."""
    # A member of a union whose type fits says more than the others do.
    problem, *others = [each for each in problems if not each["type"].endswith(("_type", "_error"))] or problems
    key = ".".join(place)
    if problem["type"] in UNKNOWN or problem["loc"][-1:] == ("[key]",):
        return f"unknown key {key}; {_suggest(place)}"
    if problem["type"] == "missing":
        return f"{key} is required and is not there; add it"
    value = "" if isinstance(problem["input"], dict | Section) else f"={problem['input']!r:.80}"
    message = WORDING.get(problem["type"]) or problem["msg"].removeprefix("Value error, ")
    for other in others:
        message += f" or {other['msg'].removeprefix('Input should be ')}"
    return f"{key or 'config'}{value}: {message[0].lower()}{message[1:]}"


def _suggest(place: tuple[str, ...]) -> str:
    """The known key that an unknown one probably stands for: one of this section, or one of the same name elsewhere."""
    if now := RENAMED.get(".".join(place)):
        return f"it is called {now} now"
    *section, name = place
    known = _known_keys(section)
    elsewhere: dict[str, list[str]] = {}
    for path, _, _ in documented_fields():
        parts = path.split(".")
        for end in range(1, len(parts) + 1):
            elsewhere.setdefault(parts[end - 1], []).append(".".join(parts[:end]))
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.75)
    if not near and name in elsewhere:
        return f"did you mean {' or '.join(dict.fromkeys(elsewhere[name]))}?"
    near = near or difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    if near:
        return f"did you mean {'.'.join((*section, near[0]))}?"
    far = difflib.get_close_matches(name, elsewhere, n=1, cutoff=0.75)
    return f"did you mean {elsewhere[far[0]][0]}?" if far else f"known here: {', '.join(known)}"


def _known_keys(location: Sequence[str]) -> list[str]:
    """The fields of the section at a location, for suggestions."""
    section: Any = Config
    for part in location:
        if part.isdigit():
            section = Source
        elif section is Source and part in ("columns", "tags"):
            return list(get_args(Column if part == "columns" else Tag))
        else:
            section = section.model_fields[part].annotation if hasattr(section, "model_fields") else None
    return list(section.model_fields) if hasattr(section, "model_fields") else []
