"""A converted config as YAML with comments."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Mapping
from typing import Any

import yaml

from raysft.config.llamafactory.conversion import DEFAULT, Conversion, schema
from raysft.config.yaml_text import Dumper

WIDTH = 120
DOES = {
    "run": "Run it with raysft run.",
    "evaluate": "Run it with raysft evaluate; nothing is trained.",
    "generate": "Run it with raysft generate; nothing is trained.",
}
"""Verb → what it does with a config that asks for it."""


def render(conversion: Conversion, name: str) -> str:
    """Write a converted config as YAML: beside a key how its meaning differs, at the top what needs nothing or was refused.

    Args:
        conversion: the config and its comments.
        name: the file that it was converted from.
    """
    lines = [
        f"# Converted from {name}, a LLaMA-Factory config. Its defaults are written out where they differ from raysft's."
    ]
    if conversion.command:
        lines = [f"# {name} is an export config. The command at the end does the export; so does raysft export {name}."]
    elif conversion.refusals:
        lines += ["#", "# These keys are not supported, so this config is incomplete:"]
        lines += [line for refusal in conversion.refusals for line in _item(refusal.message)]
    else:
        lines.append(f"# {DOES[conversion.verb]}")
    if conversion.harmless:
        lines += ["#", "# These keys need no counterpart in raysft:"]
        lines += [
            line for reason, keys in _by_reason(conversion.harmless) for line in _item(f"{', '.join(keys)}: {reason}")
        ]
    if conversion.command:
        return "\n".join([*lines, conversion.command]) + "\n"
    sections = {path.rpartition(".")[0] for path in schema()} - {""}
    lines += ["", *_mapping(conversion.config, "", sections, conversion.notes)]
    return "\n".join(lines) + "\n"


def _by_reason(harmless: Mapping[str, str]) -> Iterator[tuple[str, list[str]]]:
    """Yield each reason with the keys that it is given for, those at their defaults last."""
    for reason in sorted(dict.fromkeys(harmless.values()), key=lambda reason: reason == DEFAULT):
        keys = [key for key, found in harmless.items() if found == reason]
        yield ("have their defaults" if reason == DEFAULT and len(keys) > 1 else reason), keys


def _item(text: str) -> list[str]:
    return textwrap.wrap(text, WIDTH, initial_indent="#   ", subsequent_indent="#     ", break_on_hyphens=False)


def _mapping(values: Mapping[str, Any], prefix: str, sections: set[str], notes: Mapping[str, str]) -> Iterator[str]:
    indent = "  " * prefix.count(".")
    for key, value in values.items():
        path = prefix + key
        if path in sections:
            yield f"{indent}{key}:"
            yield from _mapping(value, f"{path}.", sections, notes)
            continue
        line = f"{indent}{key}: {_flow(value)}"
        note = notes.get(path)
        if note and len(line) + len(note) + 4 > WIDTH:
            yield from textwrap.wrap(note, WIDTH, initial_indent=f"{indent}# ", subsequent_indent=f"{indent}# ")
        elif note:
            line += f"  # {note}"
        yield line


def _flow(value: Any) -> str:
    text = yaml.dump(value, Dumper=Dumper, default_flow_style=True, allow_unicode=True, sort_keys=False, width=2**31)
    return text.removesuffix("...\n").rstrip("\n")
