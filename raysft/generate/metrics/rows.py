"""Metric rows, as ``metrics.jsonl`` holds them, and LLaMA-Factory's flat keys, which are derived from them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

from raysft.storage.json_files import read_jsonl, write_json, write_jsonl
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
    step: int | None = None
    """Optimizer steps of the model if it predicted during its training; None for a model that is not trained further."""


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
    """Write ``metrics.jsonl``, and ``predict_results.json`` and ``all_results.json`` derived from it; rows of steps stay."""
    write_jsonl(run.metrics, [*_rows_of_steps(run), *map(_line, rows)])
    run.write_results("predict", flat_results(rows))


def write_step_metrics(run: RunDirectory, step: int, rows: Sequence[MetricRow]) -> dict[str, float]:
    """Write the scores of a step's predictions next to them, and with the step into ``metrics.jsonl``; rows of later steps go.

    Returns:
        The numbers of the step's ``predict_results.json``.
    """
    results = flat_results(rows)
    earlier = [row for row in _rows_of_steps(run) if row["step"] < step]
    write_jsonl(run.metrics, [*earlier, *(_line(replace(row, step=step)) for row in rows)])
    write_json(run.generation(step).results("predict"), results)
    return {key: value for key, value in results.items() if isinstance(value, int | float)}


def _rows_of_steps(run: RunDirectory) -> list[dict[str, Any]]:
    """The lines of ``metrics.jsonl`` about predictions during the training."""
    return [row for row in read_jsonl(run.metrics) if row.get("step") is not None]


def _line(row: MetricRow) -> dict[str, Any]:
    return {key: value for key, value in asdict(row).items() if key != "step" or value is not None}
