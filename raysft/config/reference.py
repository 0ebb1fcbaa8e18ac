"""The reference of config keys, which ``raysft config`` and ``raysft VERB --help`` print."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence

from raysft.config.config import Config
from raysft.config.resume_effects import Effect, effect_of
from raysft.config.validate import documented_fields, suggest
from raysft.errors import RequestError

WIDTH = 110
MARKS = {Effect.NOW: "(next step)", Effect.EPOCH: "(next epoch)", Effect.NEVER: "(fixed)", Effect.ALWAYS: ""}
LEGEND = "\n".join(
    [
        "Each entry shows a key, its default in brackets, and whether it can change when a run resumes:",
        *(f"  {mark or 'no mark':<14}{effect.value}" for effect, mark in MARKS.items()),
    ]
)
SECTIONS: tuple[str, ...] = tuple(Config.model_fields)
"""Top-level keys of the config; all except ``stage`` are sections."""


def reference(prefix: str = "", sections: Sequence[str] = SECTIONS) -> str:
    """Describe all config keys, or some of them, grouped by section.

    Args:
        prefix: a section or key, such as ``train`` or ``model.lora``; empty for all.
        sections: the top-level sections to include.

    Raises:
        RequestError: no key has this prefix; the message suggests one that exists.
    """
    parts = _parts(prefix)
    if parts[:3] == ["data", "eval", "[]"]:
        parts[1] = "train"  # evaluation sources have the same keys
    lines: list[str] = []
    section = ""
    for key, default, docstring in documented_fields():
        top = key.partition(".")[0]
        if top not in sections or _parts(key)[: len(parts)] != parts:
            continue
        if top != section:
            section = top
            lines += ["", f"{section}: {_title(section)}"] if section != key else [""]
        lines.append(f"  {key}  [{default}]  {MARKS[effect_of(key)]}".rstrip())
        lines += _wrap(docstring.replace("``", "`"))
    if not lines:
        raise RequestError(f"unknown key {prefix}; {suggest(tuple(prefix.split('.')))}")
    return "\n".join([LEGEND, *lines])


def _parts(key: str) -> list[str]:
    """Split a key at its dots; every index of a list becomes ``[]``.

    >>> _parts("data.train.0.path"), _parts("data.train[].path")
    (['data', 'train', '[]', 'path'], ['data', 'train', '[]', 'path'])
    """
    return ["[]" if part.isdigit() else part for part in key.replace("[]", ".[]").split(".") if part]


def _wrap(text: str) -> list[str]:
    return textwrap.wrap(text, WIDTH, initial_indent=" " * 6, subsequent_indent=" " * 6, break_on_hyphens=False)


def _title(section: str) -> str:
    annotation = Config.model_fields[section].annotation
    return " ".join((annotation.__doc__ or "").split()).rstrip(".")
