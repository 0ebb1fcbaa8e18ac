"""Results before and after training, side by side."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from raysft.metric_names import EVALUATION
from raysft.report.read_run import RunLog, finite
from raysft.report.text import visible

INTERVALS = "95% confidence intervals, bootstrapped over the examples"
"""The meaning of the brackets after a value."""

_EFFORT_UNITS = ("examples", "seconds", "tokens/second", "examples/second")
"""Units of metric rows that measure size or speed, not quality."""


@dataclass(frozen=True)
class Comparison:
    """One metric before and after training."""

    metric: str
    """Its name as people write it."""
    before: float | None
    after: float
    before_interval: tuple[float, float] | None = None
    """Ends of the 95% interval; None if the metric has none."""
    after_interval: tuple[float, float] | None = None
    source: str = ""
    """Name of the source that it was measured on; empty for all sources together."""
    unit: str = ""
    """``nats``, ``perplexity``, ``fraction`` (0 to 1, shown in percent), ``points`` (0 to 100), or empty if unknown."""
    higher_is_better: bool | None = None
    """None if unknown."""

    @property
    def label(self) -> str:
        """Name of the metric, and of the source if it is not over all of them."""
        return f"{self.metric}, {self.source}" if self.source else self.metric

    @property
    def change(self) -> str:
        """Absolute and relative change; empty if a value is missing or infinite.

        >>> Comparison("loss", 2.0, 1.5).change
        '-0.5000 (-25.0%)'
        """
        before, after = finite(self.before), finite(self.after)
        if before is None or after is None:
            return ""
        if self.unit == "fraction":
            absolute = f"{100 * (after - before):+.1f} points"
        elif self.unit == "perplexity" and max(before, after) >= 1e5:
            absolute = f"{after - before:+.2e}"
        else:
            absolute = f"{after - before:+.{self._decimals}f}"
        return f"{absolute} ({100 * (after - before) / before:+.1f}%)" if before else absolute

    @property
    def better(self) -> bool | None:
        """True if training improved the metric; None without a change, or if its direction is unknown."""
        if self.before is None or not self.change or self.after == self.before or self.higher_is_better is None:
            return None
        return (self.after > self.before) == self.higher_is_better

    @property
    def shown_before(self) -> str:
        """The value before training as text, with its interval."""
        return self._with_interval(self.before, self.before_interval)

    @property
    def shown_after(self) -> str:
        """The value after training as text, with its interval.

        >>> Comparison("BLEU", None, 41.2, None, (39.8, 42.6), unit="points").shown_after
        '41.20 (39.80–42.60)'
        """
        return self._with_interval(self.after, self.after_interval)

    def show(self, value: float | None) -> str:
        """A value of this metric as text.

        >>> Comparison("perplexity", None, 3.0, unit="perplexity").show(12.345)
        '12.35'
        """
        if value is None:
            return "–"
        if self.unit == "fraction":
            return f"{100 * value:.1f}%"
        if self.unit == "perplexity" and value >= 1e5:
            return f"{value:.2e}"
        return f"{value:.{self._decimals}f}"

    @property
    def _decimals(self) -> int:
        return 2 if self.unit in ("perplexity", "points") else 4

    def _with_interval(self, value: float | None, interval: tuple[float, float] | None) -> str:
        text = self.show(value)
        return f"{text} ({self.show(interval[0])}–{self.show(interval[1])})" if interval else text


def compare(log: RunLog) -> list[Comparison]:
    """All rows of the before/after table: evaluations, then metrics of generated text."""
    return [*compare_evaluations(log), *compare_predictions(log)]


def unfinished(log: RunLog) -> str:
    """A sentence if the values after training are those of an evaluation during training; empty otherwise."""
    if log.evaluated or not _last_evaluation(log):
        return ""
    step = _last_evaluation(log)["current_steps"]
    return f'Training has not written eval_results.json: "after" shows the evaluation at step {step:,}.'


def _last_evaluation(log: RunLog) -> dict[str, Any]:
    last = log.evaluations[-1] if log.evaluations else {}
    return last if last.get("current_steps") else {}


def compare_evaluations(log: RunLog) -> list[Comparison]:
    """Loss, perplexity and accuracy over all evaluation sets and, if there are several, for each of them."""
    after = log.evaluated or _last_evaluation(log)
    before = next((record for record in log.evaluations if record["current_steps"] == 0), {})
    metrics = (
        ("evaluation loss", "loss", "nats"),
        ("perplexity", "perplexity", "perplexity"),
        ("token accuracy", "accuracy", "fraction"),
    )
    rows = []
    for name in ("", *log.evaluation_sets):
        prefix = f"eval_{name}_" if name else "eval_"
        for metric, key, unit in metrics:
            value = _number(after.get(prefix + key))
            if value is not None:
                value_before = _number(before.get(prefix + key))
                rows.append(
                    Comparison(metric, value_before, value, source=name, unit=unit, higher_is_better=EVALUATION[key])
                )
    return rows


def compare_predictions(log: RunLog) -> list[Comparison]:
    """Metrics of generated text, those over all sources first."""
    before: dict[tuple[str, str], dict[str, Any]] = {}
    after: dict[tuple[str, str], dict[str, Any]] = {}
    for row in log.metrics:
        if row.get("unit") not in _EFFORT_UNITS and _number(row.get("value")) is not None:
            rows = before if row.get("model") == "base" else after
            rows[str(row.get("source") or ""), str(row.get("metric"))] = row
    return [_comparison(after[key], before.get(key, {})) for key in sorted(after, key=_order)]


def _order(key: tuple[str, str]) -> tuple[str, int, str]:
    """By source; ROUGE before BLEU, as papers list them, and other metrics after both."""
    source, metric = key
    return source, 0 if "rouge" in metric else 1 if "bleu" in metric else 2, metric


def _comparison(after: dict[str, Any], before: dict[str, Any]) -> Comparison:
    better = after.get("higher_is_better")
    return Comparison(
        metric=visible(metric_name(str(after["metric"]))),
        before=_number(before.get("value")),
        after=float(after["value"]),
        before_interval=_interval(before),
        after_interval=_interval(after),
        source=visible(str(after.get("source") or "")),
        unit=str(after.get("unit") or ""),
        higher_is_better=better if isinstance(better, bool) else None,
    )


def _interval(row: dict[str, Any]) -> tuple[float, float] | None:
    low, high = finite(row.get("low")), finite(row.get("high"))
    return None if low is None or high is None else (low, high)


def metric_name(metric: str) -> str:
    """Name of a metric as people write it. ``rouge1`` and the like stay as ``rouge_score`` writes them.

    >>> metric_name("rouge-l"), metric_name("bleu"), metric_name("exact_match")
    ('ROUGE-L', 'BLEU', 'exact match')
    """
    if re.fullmatch(r"(rouge|bleu)-\w+|bleu", metric):
        return metric.upper()
    return {"bleu_zh": "BLEU zh", "chrf": "chrF"}.get(metric, metric.replace("_", " "))


def _number(value: Any) -> float | None:
    """A number, also an infinite one: an overflowing perplexity is a result."""
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else None
