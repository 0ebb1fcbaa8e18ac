"""Facts of a run as pairs of label and text, for the terminal, the model card and the page."""

from __future__ import annotations

from typing import Any

from raysft.report.read_run import RunLog, finite

_PLAN = {
    "examples": ("examples", "count"),
    "rows": ("rows", "count"),
    "global_batch_size": ("rows per step", "count"),
    "epochs": ("epochs", "decimal"),
    "steps": ("steps", "count"),
    "tokens": ("tokens", "count"),
    "loss_tokens": ("loss tokens", "count"),
    "packing_efficiency": ("padding", "remainder"),
}
_TRAINING = {
    "total_steps": ("steps", "count"),
    "train_loss": ("mean training loss", "decimal"),
    "train_runtime": ("training time", "seconds"),
    "seconds_to_first_step": ("time to the first step", "seconds"),
    "seconds_to_launch": ("… launching the workers", "seconds"),
    "seconds_to_load_model": ("… loading the model", "seconds"),
    "seconds_to_wait_for_data": ("… waiting for data", "seconds"),
    "seconds_to_evaluate": ("… evaluating", "seconds"),
    "seconds_of_first_step": ("… computing the step", "seconds"),
    "train_tokens_per_second": ("tokens per second", "count"),
    "packing_efficiency": ("padding", "remainder"),
}
"""Key → label and kind of number. Other numbers are shown under their own names."""
_GENERATION = {
    ("trained", "examples"): ("predictions", "count"),
    ("trained", "runtime"): ("generation time", "seconds"),
    ("trained", "tokens_per_second"): ("generated tokens per second", "count"),
    ("base", "runtime"): ("generation time, base model", "seconds"),
    ("base", "tokens_per_second"): ("generated tokens per second, base model", "count"),
}

_EVALUATED = {
    "dtype": "data type",
    "quantization": "quantization",
    "workers": "workers",
    "micro_batch_size": "rows at a time",
    "attention": "attention",
    "zero_stage": "ZeRO stage",
}


def plan_facts(log: RunLog) -> list[tuple[str, str]]:
    """Numbers of ``plan.json``."""
    return _labelled(log.plan, _PLAN)


def evaluation_facts(log: RunLog) -> list[tuple[str, str]]:
    """How a model was evaluated that was not trained, its tokens, and the time that they took."""
    if not log.other_model:
        return []
    settings = [
        (label, str(log.resolved[key])) for key, label in _EVALUATED.items() if log.resolved.get(key) is not None
    ]
    return settings + _labelled(
        log.evaluated, {"eval_tokens": ("loss tokens", "count"), "eval_runtime": ("time", "seconds")}
    )


def training_facts(log: RunLog) -> list[tuple[str, str]]:
    """Numbers of ``train_results.json``, those with their own label first."""
    others = {key: (key.replace("_", " "), "decimal") for key in sorted(log.trained.keys() - _TRAINING.keys())}
    return _labelled(log.trained, _TRAINING | others)


def generation_facts(log: RunLog) -> list[tuple[str, str]]:
    """Number of predictions, and the time that it took to generate them."""
    found = {
        ("base" if row.get("model") == "base" else "trained", str(row.get("metric"))): row.get("value")
        for row in log.metrics
        if not row.get("source")
    }
    return _labelled(found, _GENERATION)


def duration(seconds: float) -> str:
    """Seconds in readable units.

    >>> duration(4.25), duration(200), duration(90000)
    ('4.2 s', '3 min 20 s', '25 h 0 min')
    """
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"


def _labelled(values: dict[Any, Any], labels: dict[Any, tuple[str, str]]) -> list[tuple[str, str]]:
    """The finite numbers under their labels, in the order of the labels."""
    numbers = ((label, kind, finite(values.get(key))) for key, (label, kind) in labels.items())
    return [(label, _text(value, kind)) for label, kind, value in numbers if value is not None]


def _text(value: float, kind: str) -> str:
    """A number of some kind as text.

    >>> _text(12345.6, "count"), _text(0.961, "remainder"), _text(0.00012345, "decimal")
    ('12,346', '3.9%', '0.0001234')
    """
    if kind == "seconds":
        return duration(value)
    if kind == "remainder":
        return f"{100 * (1 - value):.1f}%"
    if kind == "count" or value == int(value):
        return f"{value:,.0f}" if value >= 10 or value == int(value) else f"{value:.2g}"
    return f"{value:.4g}" if abs(value) < 1000 else f"{value:,.0f}"
