"""Before and after: the same measures of the model as it came and as it was trained."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any, Literal

from raysft.report.logs import RunLog, finite

Kind = Literal["loss", "perplexity", "share", "score", "other"]

_DECIMALS: dict[Kind, int] = {"loss": 4, "perplexity": 2, "score": 2, "other": 4}

_NO_QUALITY = re.compile(r"(?:.*_)?(?:count|examples|prompts|runtime|samples|second|seconds|steps|time|tokens)")
"""Names of results that say how much or how long and not how well."""


@dataclass(frozen=True)
class Comparison:
    """One measure before and after training."""

    label: str
    kind: Kind
    before: float | None
    after: float
    source: str = ""
    """The source that it was measured on; empty over all of them."""
    before_interval: tuple[float, float] | None = None
    """From where to where the value before may lie, where that is known."""
    after_interval: tuple[float, float] | None = None

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
    return [*_evaluations(log), *_predictions(log)]


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
                rows.append(Comparison(full_label, kind, _number(before.get(prefix + key)), value, name))
    return rows


def _predictions(log: RunLog) -> list[Comparison]:
    """Metrics of generated text: ``predict_X`` after, ``base_predict_X`` before."""
    found = []
    for key, value in log.predicted.items():
        metric = key.removeprefix("predict_")
        number = _number(value)
        if metric == key or number is None or _NO_QUALITY.fullmatch(metric) or _is_bound(key, log):
            continue
        source = _source_of(metric, log)
        metric = metric.removeprefix(f"{source}_") if source else metric
        label = _metric_label(metric)
        kind: Kind = "score" if label.startswith(("ROUGE", "BLEU")) else "other"
        full_label = f"{label}, {source}" if source else label
        before = _number(log.predicted.get(f"base_{key}"))
        intervals = [_interval(f"base_{key}", log), _interval(key, log)]
        row = Comparison(full_label, kind, before, number, source, *intervals)
        # First over all sources; ROUGE before BLEU, as everywhere in the literature, and other metrics after them.
        found.append(((source, 0 if "rouge" in metric else 1 if "bleu" in metric else 2, metric), row))
    return [row for _, row in sorted(found, key=lambda item: item[0])]


def _is_bound(key: str, log: RunLog) -> bool:
    """Whether a result is no measure but the end of another one's interval."""
    return re.sub(r"_(?:low|high)$", "", key) in log.predicted.keys() - {key}


def _interval(key: str, log: RunLog) -> tuple[float, float] | None:
    low, high = (finite(log.predicted.get(f"{key}_{end}")) for end in ("low", "high"))
    return None if low is None or high is None else (low, high)


def _source_of(metric: str, log: RunLog) -> str:
    """The source whose name a result begins with; empty if it is over all of them."""
    names = {str(source.get("name")) for part in ("eval", "train") for source in log.sources(part)}
    # The sources of a registry stand in the plan alone.
    planned = (log.plan.get(part) for part in ("sources", "evaluation"))
    names |= {name for part in planned if isinstance(part, dict) for name in part}
    return max((name for name in names if metric.startswith(f"{name}_")), key=len, default="")


def _metric_label(metric: str) -> str:
    """A metric's name as people write it.

    >>> _metric_label("rouge-l"), _metric_label("exact_match")
    ('ROUGE-L', 'exact match')
    """
    return metric.upper() if re.fullmatch(r"(rouge|bleu)-\w+", metric) else metric.replace("_", " ")


def _number(value: Any) -> float | None:
    """A number, infinite ones included: that a perplexity overflowed is a result."""
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else None
