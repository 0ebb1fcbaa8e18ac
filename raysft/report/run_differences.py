"""What differs in the configs of several runs."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from raysft.report.runs import Run
from raysft.report.text import masked, shortened, visible

MAX_KEYS = 60
"""Number of keys that are shown."""
IGNORED = ("run.name", "run.storage")
"""Keys that differ in all runs."""
VALUE_LENGTH = 120
MISSING = "–"


def differences(runs: Sequence[Run]) -> list[tuple[str, list[str]]]:
    """Keys whose value is not the same in all runs, in the order of the config.

    Returns:
        (dotted key, value in each run as JSON). A key that a config does not have is shown as a dash. Runs without a
        readable config have dashes only, and count for nothing.
    """
    configs = [_flat(run.log.config) for run in runs]
    known = [config for config in configs if config]
    found = []
    for key in dict.fromkeys(key for config in configs for key in config):
        if key not in IGNORED and len({config.get(key, MISSING) for config in known}) > 1:
            found.append((visible(key), [visible(config.get(key, MISSING)) for config in configs]))
    return found


def _flat(value: Any, prefix: str = "") -> dict[str, str]:
    """Dotted key → value as JSON. A source in a list is named by its name, so that a new source moves no other.

    >>> _flat({"data": {"train": [{"name": "chats", "weight": 1}]}, "stage": "sft"})
    {'data.train.chats.name': '"chats"', 'data.train.chats.weight': '1', 'stage': '"sft"'}
    """
    if isinstance(value, Mapping) and value:
        parts = [(str(key), inner) for key, inner in value.items()]
    elif isinstance(value, list) and value and all(isinstance(item, Mapping) for item in value):
        parts = [(str(item.get("name", number)), item) for number, item in enumerate(value)]
    else:
        # bool and 1 are equal in Python, but not as JSON.
        text = json.dumps(value, ensure_ascii=False, default=str)
        return {prefix: shortened(masked(text), VALUE_LENGTH)}
    flat: dict[str, str] = {}
    for key, inner in parts:
        flat |= _flat(inner, f"{prefix}.{key}" if prefix else key)
    return flat
