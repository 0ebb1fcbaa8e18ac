"""The types of what the report reads from the files of a run: JSON and YAML may be valid and still hold something else. Pure."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

LARGEST = 2**63
"""Integers from here on fit neither into a step nor into an axis."""


@dataclass(frozen=True)
class Kind:
    """A type of values. A value that is null counts as missing, and is of every kind."""

    name: str
    holds: Callable[[Any], bool]


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _are_texts(value: Any) -> bool:
    return isinstance(value, str) or (isinstance(value, list) and all(isinstance(one, str) for one in value))


NUMBER = Kind("a number", _is_number)
INTEGER = Kind("an integer", lambda value: isinstance(value, int) and _is_number(value))
TEXT = Kind("text", lambda value: isinstance(value, str))
LABEL = Kind("text or a number", lambda value: isinstance(value, str) or _is_number(value))
TEXTS = Kind("text or a list of texts", _are_texts)


def _is_media(value: Any) -> bool:
    return isinstance(value, list) and all(
        isinstance(medium, Mapping) and isinstance(medium.get("location"), str) for medium in value
    )


MAPPING = Kind("a mapping", lambda value: isinstance(value, Mapping))
MEDIA = Kind("a list of images, each with its location", _is_media)

_STEP_NUMBERS = """
    loss lr grad_norm epoch percentage throughput total_tokens loss_tokens packing_efficiency rows step_seconds
    data_wait_seconds memory_gib memory_total_gib loss_token_throughput mfu router_aux_loss
"""
_EVALUATION = {"eval_*": NUMBER}
_PREDICTION = {
    "id": LABEL,
    "prompt": TEXT,
    "predict": TEXT,
    "label": TEXT,
    "source": TEXT,
    "stop": TEXT,
    "tokens": INTEGER,
    "media": MEDIA,
}
_SOURCE = {"name": LABEL, "path": TEXTS, "max_examples": INTEGER, "num_samples": INTEGER}
TYPES: dict[str, dict[str, Kind]] = {
    "trainer_log.jsonl": {
        "current_steps": INTEGER,
        "total_steps": INTEGER,
        **dict.fromkeys(_STEP_NUMBERS.split(), NUMBER),
        "source_losses": MAPPING,
        "source_losses.*": NUMBER,
        **_EVALUATION,
        "predict_*": NUMBER,
    },
    "diagnosis.jsonl": {"step": INTEGER, "finding": TEXT},
    "eval_results.json": _EVALUATION,
    "metrics.jsonl": {
        **dict.fromkeys(("metric", "source", "model", "unit", "signature"), TEXT),
        **dict.fromkeys(("value", "low", "high"), NUMBER),
        "step": INTEGER,
    },
    "generated_predictions.jsonl": _PREDICTION,
    "generated_predictions_base.jsonl": _PREDICTION,
    "trials.jsonl": {
        **dict.fromkeys(("trial", "configuration", "state", "reason"), TEXT),
        **dict.fromkeys(("number", "seed", "step"), INTEGER),
        **dict.fromkeys(("values", "metrics", "parent"), MAPPING),
        **dict.fromkeys(("started", "ended"), NUMBER),
    },
    "config.yaml": {
        **{f"data.{part}.*.{key}": kind for part in ("train", "eval") for key, kind in _SOURCE.items()},
        "data.holdout": NUMBER,
        "data.max_examples": INTEGER,
        "model.path": TEXT,
        **dict.fromkeys(
            ("model.trust_remote_code", "model.lora.target", "model.oft.target", "model.freeze.modules"), TEXTS
        ),
        "run.name": LABEL,
        "run.seed": INTEGER,
        "train.warmup_ratio": NUMBER,
    },
}
"""Kind of each value that the report relies on, by file and dotted key; ``*`` stands for every part that begins like it."""


def fault(file: str, content: Mapping[str, Any]) -> str:
    """Say which value of a file, or of one of its lines, has another type than it should have; empty if none has.

    >>> fault("trainer_log.jsonl", {"current_steps": 3, "loss": "low"})
    "loss must be a number, but is 'low'"
    >>> fault("config.yaml", {"data": {"train": [{"name": ["a"]}]}})
    "data.train.0.name must be text or a number, but is ['a']"
    >>> fault("eval_results.json", {"eval_loss": None, "note": 10**30})
    'note must be below 2^63, but is 1000000000000000000000000000000'
    """
    for key, kind in TYPES.get(file, {}).items():
        for name, value in _values(content, key.split(".")):
            if value is not None and not kind.holds(value):
                return f"{name} must be {kind.name}, but is {_shown(value)}"
    return next((f"{name} must be below 2^63, but is {_shown(value)}" for name, value in _too_large(content)), "")


def _values(content: Any, parts: list[str], before: str = "") -> Iterator[tuple[str, Any]]:
    """Yield (dotted key, value) of what a key with ``*`` means; nothing if there is no such value."""
    first, *rest = parts
    inside: Any = dict(enumerate(content)) if isinstance(content, list) else content
    if not isinstance(inside, Mapping):
        return
    if first.endswith("*"):
        found = [key for key in inside if str(key).startswith(first[:-1])]
    else:
        found = [first] if first in inside else []
    for key in found:
        if rest:
            yield from _values(inside[key], rest, f"{before}{key}.")
        else:
            yield f"{before}{key}", inside[key]


def _too_large(content: Any, name: str = "") -> Iterator[tuple[str, int]]:
    if isinstance(content, int):
        if abs(content) >= LARGEST:
            yield name, content
    elif isinstance(content, Mapping | list):
        for key, value in content.items() if isinstance(content, Mapping) else enumerate(content):
            yield from _too_large(value, f"{name}.{key}".lstrip("."))


def _shown(value: Any) -> str:
    try:
        text = repr(value)
    except ValueError:  # Python writes no integer of more than 4,300 digits
        text = "one with thousands of digits"
    return text if len(text) <= 60 else f"{text[:59]}…"
