"""What ``model.rope_scaling`` may say."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from typing import Any, Literal, get_args

RopeType = Literal["linear", "dynamic", "yarn", "llama3"]
COMMON = ("rope_type", "factor", "original_max_position_embeddings")
"""Keys of every kind of scaling, under the names of transformers."""
OWN: Mapping[str, tuple[str, ...]] = {
    "linear": (),
    "dynamic": (),
    "yarn": ("attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim", "truncate"),
    "llama3": ("low_freq_factor", "high_freq_factor"),
}
"""Kind of scaling → keys that it has alone."""


def rope_settings(value: str | Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings as a mapping, with numbers as transformers wants them.

    >>> rope_settings("yarn"), rope_settings({"type": "linear", "factor": 4})
    ({'rope_type': 'yarn'}, {'factor': 4.0, 'rope_type': 'linear'})

    Raises:
        ValueError: they say nothing that transformers could do.
    """
    settings: dict[str, Any] = {"rope_type": value} if isinstance(value, str) else dict(value)
    if "type" in settings:  # its name before transformers 4.45, which many configs have
        named = settings.pop("type")
        if settings.setdefault("rope_type", named) != named:
            raise ValueError(f"rope_type={settings['rope_type']}, but type={named}; use one of them")
    if "rope_type" not in settings:
        raise ValueError(f"has no rope_type; set it to one of {', '.join(get_args(RopeType))}")
    kind = str(settings["rope_type"])
    if kind not in OWN:
        raise ValueError(f"rope_type={kind} is not a known type; use one of {', '.join(get_args(RopeType))}")
    known = (*COMMON, *OWN[kind])
    for name, setting in settings.items():
        if name not in known:
            near = difflib.get_close_matches(str(name), known, 1)
            raise ValueError(
                f"{name} is not a setting of {kind}; "
                + (f"did you mean {near[0]}?" if near else f"use {', '.join(known)}")
            )
        if name != "rope_type":
            settings[name] = _checked(name, setting)
    for below, above, defaults in (
        ("low_freq_factor", "high_freq_factor", (1.0, 4.0)),
        ("beta_slow", "beta_fast", (1.0, 32.0)),
    ):
        low, high = settings.get(below, defaults[0]), settings.get(above, defaults[1])
        if not low < high:
            raise ValueError(f"{above}={high:g} must be above {below}={low:g}; swap them")
    return settings


def _checked(name: str, value: Any) -> Any:
    if name == "truncate":
        if not isinstance(value, bool):
            raise ValueError(f"truncate={value} must be true or false")
        return value
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ValueError(f"{name}={value} must be a number")
    if name == "original_max_position_embeddings":
        if value < 2 or value != int(value):
            raise ValueError(f"{name}={value} must be a whole number above 1")
        return int(value)
    if name == "factor" and not 1.0 <= value < float("inf"):
        raise ValueError(f"{name}={value:g} must be a number of at least 1")
    # Some divide by them; an attention_factor of 0 would leave nothing of the attention.
    if not 0.0 < value < float("inf"):
        raise ValueError(f"{name}={value:g} must be a number above 0")
    return float(value)
