"""What a run planned and how it went, as label and text, for the terminal and the model card."""

from __future__ import annotations

from typing import Any

from raysft.report.read_run import RunLog, finite

_PLAN = {
    "examples": ("examples", "count"),
    "rows": ("rows", "count"),
    "global_batch_size": ("rows per step", "count"),
    "epochs": ("epochs", "count"),
    "steps": ("steps", "count"),
    "tokens": ("tokens", "count"),
    "loss_tokens": ("trained tokens", "count"),
    "packing_efficiency": ("padding", "rest"),
}
_TRAINED = {
    "total_steps": ("steps", "count"),
    "train_loss": ("mean training loss", "decimal"),
    "train_runtime": ("training time", "seconds"),
    "seconds_to_first_step": ("time to the first step", "seconds"),
    "seconds_to_launch": ("of it before training was launched", "seconds"),
    "seconds_to_load_model": ("of it loading the model", "seconds"),
    "seconds_to_wait_for_data": ("of it waiting for data", "seconds"),
    "seconds_to_evaluate": ("of it evaluating", "seconds"),
    "seconds_of_first_step": ("of it computing", "seconds"),
    "train_tokens_per_second": ("tokens per second", "count"),
    "packing_efficiency": ("padding", "rest"),
}
"""Key → label and kind of number; other numbers are shown under their own names."""
_GENERATED = {
    "predict_examples": ("predictions", "count"),
    "predict_runtime": ("generation time", "seconds"),
    "predict_tokens_per_second": ("generated tokens per second", "count"),
    "base_predict_runtime": ("generation time of the model before", "seconds"),
    "base_predict_tokens_per_second": ("generated tokens per second of the model before", "count"),
}


def planned(log: RunLog) -> list[tuple[str, str]]:
    """The numbers of ``plan.json``, those that are there."""
    return _known(log.plan, _PLAN)


def went(log: RunLog) -> list[tuple[str, str]]:
    """The numbers of ``train_results.json``, the well-known ones first."""
    keys = [*(key for key in _TRAINED if key in log.trained), *sorted(log.trained.keys() - _TRAINED.keys())]
    lines = []
    for key in keys:
        label, kind = _TRAINED.get(key, (key.replace("_", " "), "decimal"))
        value = finite(log.trained[key])
        if value is not None:
            lines.append((label, _text(value, kind)))
    return lines


def generated(log: RunLog) -> list[tuple[str, str]]:
    """How many predictions ``predict_results.json`` is of, and how fast they were made."""
    return _known(log.predicted, _GENERATED)


def duration(seconds: float) -> str:
    """Seconds as people say them.

    >>> duration(4.25), duration(200), duration(90000)
    ('4.2 s', '3 min 20 s', '25 h 0 min')
    """
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"


def _known(found: dict[str, Any], labels: dict[str, tuple[str, str]]) -> list[tuple[str, str]]:
    known = ((label, kind, finite(found.get(key))) for key, (label, kind) in labels.items())
    return [(label, _text(value, kind)) for label, kind, value in known if value is not None]


def _text(value: float, kind: str) -> str:
    """A number of some kind as text.

    >>> _text(12345.6, "count"), _text(0.961, "rest"), _text(0.00012345, "decimal")
    ('12,346', '3.9%', '0.0001234')
    """
    if kind == "seconds":
        return duration(value)
    if kind == "rest":
        return f"{100 * (1 - value):.1f}%"
    if kind == "count" or value == int(value):
        return f"{value:,.0f}" if value >= 10 or value == int(value) else f"{value:.2g}"
    return f"{value:.4g}" if abs(value) < 1000 else f"{value:,.0f}"
