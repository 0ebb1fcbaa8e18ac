"""Before and after: the same measures of the model as it came and as it was trained."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any, Literal

from raysft.report.read_run import RunLog, finite

Kind = Literal["loss", "perplexity", "share", "score", "other"]

_DECIMALS: dict[Kind, int] = {"loss": 4, "perplexity": 2, "score": 2, "other": 4}

INTERVALS = "95% intervals, by bootstrap over the examples"
"""What stands in brackets behind a value."""

_NO_QUALITY = re.compile(r"(?:.*_)?(?:count|examples|prompts|runtime|samples|second|seconds|steps|time|tokens)")
"""Names of results that say how much or how long and not how well."""


@dataclass(frozen=True)
class Comparison:
    """One measure before and after training."""

    label: str
    kind: Kind
    before: float | None
    after: float
    before_interval: tuple[float, float] | None = None
    """Ends of its 95% interval, where it has one."""
    after_interval: tuple[float, float] | None = None
    source: str = ""
    """The source that it was measured on; empty over all of them."""

    @property
    def measure(self) -> str:
        """The label without the source."""
        return self.label.removesuffix(f", {self.source}") if self.source else self.label

    @property
    def change(self) -> str:
        """Absolute change, and relative to the value before; empty where either is missing or infinite.

        >>> Comparison("loss", "loss", 2.0, 1.5).change
        '-0.5000 (-25.0%)'
        """
        before, after = finite(self.before), finite(self.after)
        if before is None or after is None:
            return ""
        if self.kind == "share":
            absolute = f"{100 * (after - before):+.1f} points"
        elif self.kind == "perplexity" and max(before, after) >= 1e5:
            absolute = f"{after - before:+.2e}"
        else:
            absolute = f"{after - before:+.{_DECIMALS[self.kind]}f}"
        return f"{absolute} ({100 * (after - before) / before:+.1f}%)" if before else absolute

    @property
    def better(self) -> bool | None:
        """Whether it changed for the better; None without change, or if nothing says which way is better."""
        if self.before is None or not self.change or self.after == self.before or self.kind == "other":
            return None
        return (self.after < self.before) == (self.kind in ("loss", "perplexity"))

    @property
    def shown_before(self) -> str:
        """The value before as text, with its interval."""
        return self._with_interval(self.before, self.before_interval)

    @property
    def shown_after(self) -> str:
        """The value after as text, with its interval.

        >>> Comparison("BLEU", "score", None, 41.2, None, (39.8, 42.6)).shown_after
        '41.20 (39.80–42.60)'
        """
        return self._with_interval(self.after, self.after_interval)

    def _with_interval(self, value: float | None, interval: tuple[float, float] | None) -> str:
        return (
            f"{self.show(value)} ({self.show(interval[0])}–{self.show(interval[1])})" if interval else self.show(value)
        )

    def show(self, value: float | None) -> str:
        """A value of this measure as text.

        >>> Comparison("token accuracy", "share", None, 0.5).show(0.5)
        '50.0%'
        """
        if value is None:
            return "–"
        if finite(value) is None:
            return str(value)
        if self.kind == "share":
            return f"{100 * value:.1f}%"
        if self.kind == "perplexity" and value >= 1e5:
            return f"{value:.2e}"
        return f"{value:.{_DECIMALS[self.kind]}f}"


def compare(log: RunLog) -> list[Comparison]:
    """The rows of the before/after table; only measures that the trained model has."""
    return [*_evaluations(log), *compare_predictions(log)]


def unfinished(log: RunLog) -> str:
    """Says so if "after" is not the end of the training but its last evaluation; empty otherwise."""
    if log.evaluated or not _last_evaluation(log):
        return ""
    return (
        f"The run has no eval_results.json: after is the evaluation at step {_last_evaluation(log)['current_steps']}."
    )


def _last_evaluation(log: RunLog) -> dict[str, Any]:
    last = log.evaluations[-1] if log.evaluations else {}
    return last if last.get("current_steps") else {}


def _evaluations(log: RunLog) -> list[Comparison]:
    """Loss, perplexity and accuracy over all evaluation sets and, if there are several, for each."""
    after = log.evaluated or _last_evaluation(log)
    before = next((record for record in log.evaluations if record["current_steps"] == 0), {})
    measures: tuple[tuple[str, str, Kind], ...] = (
        ("held-out loss", "loss", "loss"),
        ("perplexity", "perplexity", "perplexity"),
        ("token accuracy", "accuracy", "share"),
    )
    rows = []
    for name in ("", *log.evaluation_sets):
        prefix = f"eval_{name}_" if name else "eval_"
        for label, key, kind in measures:
            value = _number(after.get(prefix + key))
            if value is not None:
                full_label = f"{label}, {name}" if name else label
                rows.append(Comparison(full_label, kind, _number(before.get(prefix + key)), value, source=name))
    return rows


def compare_predictions(log: RunLog) -> list[Comparison]:
    """Metrics of generated text: ``predict_X`` after, ``base_predict_X`` before."""
    found = []
    for key, value in log.predicted.items():
        metric = key.removeprefix("predict_")
        number = _number(value)
        if metric == key or number is None or _NO_QUALITY.fullmatch(metric) or _is_end(key, log):
            continue
        source = _source_of(metric, log)
        metric = metric.removeprefix(f"{source}_") if source else metric
        label = _metric_label(metric)
        full_label = f"{label}, {source}" if source else label
        base, ends = f"base_{key}", (_interval(f"base_{key}", log), _interval(key, log))
        row = Comparison(full_label, _kind(metric), _number(log.predicted.get(base)), number, *ends, source=source)
        # First over all sources; ROUGE before BLEU, as everywhere in the literature, and other metrics after them.
        found.append(((source, 0 if "rouge" in metric else 1 if "bleu" in metric else 2, metric), row))
    return [row for _, row in sorted(found, key=lambda item: item[0])]


def _interval(key: str, log: RunLog) -> tuple[float, float] | None:
    """Ends of the 95% interval of a result, if it has one."""
    low, high = (finite(log.predicted.get(f"{key}_{end}")) for end in ("low", "high"))
    return None if low is None or high is None else (low, high)


def _is_end(key: str, log: RunLog) -> bool:
    """Whether a result is an end of the interval of another."""
    of = re.sub("_(low|high)$", "", key)
    return of != key and of in log.predicted and _interval(of, log) is not None


def _source_of(metric: str, log: RunLog) -> str:
    """The source whose name a result begins with; empty if it is over all of them."""
    names = {str(source.get("name")) for part in ("eval", "train") for source in log.sources(part)}
    # The sources of a registry stand in the plan alone.
    planned = (log.plan.get(part) for part in ("sources", "evaluation", "generation"))
    names |= {name for part in planned if isinstance(part, dict) for name in part}
    return max((name for name in names if metric.startswith(f"{name}_")), key=len, default="")


def _metric_label(metric: str) -> str:
    """A metric's name as people write it; ``rouge1`` and its like are what ``rouge_score`` calls its own.

    >>> _metric_label("rouge-l"), _metric_label("bleu"), _metric_label("exact_match")
    ('ROUGE-L', 'BLEU', 'exact match')
    """
    if re.fullmatch(r"(rouge|bleu)-\w+|bleu", metric):
        return metric.upper()
    return {"bleu_zh": "BLEU zh", "chrf": "chrF"}.get(metric, metric.replace("_", " "))


def _kind(metric: str) -> Kind:
    if metric == "exact_match":
        return "share"
    return "score" if re.fullmatch(r"(rouge|bleu)-\w+|rouge(\d|L|Lsum)|bleu|bleu_zh|chrf", metric) else "other"


def _number(value: Any) -> float | None:
    """A number, infinite ones included: that a perplexity overflowed is a result."""
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else None
