"""YAML that reads back as what was written."""

from __future__ import annotations

from typing import Any

import yaml


class Dumper(yaml.SafeDumper):
    """Writes U+0085 as an escape: PyYAML writes it as it is, and reads it as the end of a line."""


def _text(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style='"' if "\x85" in text else None)


Dumper.add_representer(str, _text)


def dump(value: Any) -> str:
    """Write a value as YAML in the order of its keys.

    >>> dump({"b": 1, "a": "x\\x85"})
    'b: 1\\na: "x\\\\N"\\n'
    """
    return yaml.dump(value, Dumper=Dumper, sort_keys=False, allow_unicode=True, width=120)
