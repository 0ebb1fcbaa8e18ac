"""Metric rows, as ``metrics.jsonl`` holds them, and LLaMA-Factory's flat keys, which are derived from them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

from raysft.storage.json_files import write_jsonl
from raysft.storage.run_directory import RunDirectory

ModelRole = Literal["base", "trained", "other"]
"""The model before training, the trained one, or the one that ``generate.model`` names."""


@dataclass(frozen=True)
class MetricRow:
    """One value of one metric: a line of ``metrics.jsonl``."""

    metric: str
    source: str | None
    """Name of the source whose predictions were scored; None: all sources together."""
    model: ModelRole
    value: float
    low: float | None = None
    """Lower end of the 95% interval; None if the metric has no interval."""
    high: float | None = None
    unit: str | None = None
    """``points`` (0 to 100), ``fraction`` (0 to 1), ``examples``, ``seconds``, ``tokens/second`` or ``examples/second``; None:
    unknown."""
    higher_is_better: bool | None = None
    """None if unknown, or if neither is better."""
    signature: str | None = None
    """Version and settings of the metric, as sacreBLEU writes them."""


def flat_key(metric: str, source: str | None) -> str:
    """Key of a metric in ``predict_results.json``, without the prefix ``base_``.

    >>> flat_key("rouge-l", None), flat_key("rouge-l", "chats")
    ('predict_rouge-l', 'predict_chats_rouge-l')
    """
    return f"predict_{source}_{metric}" if source else f"predict_{metric}"


def flat_results(rows: Iterable[MetricRow]) -> dict[str, Any]:
    """The content of ``predict_results.json``, with LLaMA-Factory's keys.

    Keys are ``predict_{metric}`` and ``predict_{source}_{metric}``, followed by ``_low`` and ``_high`` for the ends of an
    interval, and ``predict_{metric}_signature``. Keys of the base model begin with ``base_``.
    """
    results: dict[str, Any] = {}
    for row in rows:
        key = ("base_" if row.model == "base" else "") + flat_key(row.metric, row.source)
        results[key] = row.value
        if row.low is not None and row.high is not None:
            results |= {f"{key}_low": row.low, f"{key}_high": row.high}
        if row.signature and row.source is None:
            results[f"{key}_signature"] = row.signature
    return results


def write_metrics(run: RunDirectory, rows: Sequence[MetricRow]) -> None:
    """Write ``metrics.jsonl``, and ``predict_results.json`` and ``all_results.json`` derived from it."""
    write_jsonl(run.metrics, [asdict(row) for row in rows])
    run.write_results("predict", flat_results(rows))
