"""The data of a run for the page: sizes of the sources, and rejected records with their reasons."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any

from raysft.report.read_run import RunLog, finite, read_lines
from raysft.report.text import masked, visible

MAX_REASONS = 20
"""Number of reasons that are shown, the most frequent ones."""
MAX_RECORDS = 5
"""Number of records that are named for each reason."""
MAX_KINDS = 2000
"""Number of reasons that are counted apart. Data can be wrong in as many ways as it has records."""

_COUNTS = {
    "media": "images",
    "rejected": "rejected",
    "dropped": "dropped",
    "dropped_tokens": "dropped tokens",
    "truncated": "truncated",
    "truncated_tokens": "truncated tokens",
    "truncated_media": "truncated images",
    "animated": "animations, of which the first frame is used",
    "stray_marks": "with image placeholders as plain text",
    "unanswered": "without an answer",
    "split": "split",
    "split_pieces": "segments of split examples",
    "control_tokens": "with control tokens in the text",
    "tools_as_text": "with tools written as text",
    "turns_left_out": "with turns that the chat template omits",
    "quoted_arguments": "with tool-call arguments as a quoted string",
    "repeated": "duplicates in the source",
    "repeated_elsewhere": "duplicates of an earlier source",
    "evaluated": "also evaluated on",
    "trained_on": "also trained on",
    "left_out": "dropped as duplicates",
}
"""Key in the plan → label. A count is shown if it is not 0."""


@dataclass(frozen=True)
class Source:
    """One source of the run."""

    name: str
    use: str
    path: str
    facts: dict[str, str]
    """Label → text."""


@dataclass
class Reason:
    """Records that were rejected or dropped for one reason."""

    source: str
    text: str
    """The reason in the words of the first record."""
    count: int = 0
    records: list[str] = field(default_factory=list)
    """The first records, as file and line."""


def sources(log: RunLog) -> list[Source]:
    """Sources in the order of the config, followed by those that come from a registry or a holdout."""
    configured = {part: {str(source.get("name")): source for source in log.sources(part)} for part in ("train", "eval")}
    if log.other_model:
        all_sources = {**configured["train"], **configured["eval"]}
        return [
            _source(name, use, all_sources, planned)
            for use in ("evaluation", "generation")
            for planned in [_planned(log, use)]
            for name in planned
        ]
    found = []
    for use, part, plan_key in (("training", "train", "sources"), ("evaluation", "eval", "evaluation")):
        planned = _planned(log, plan_key)
        names = dict.fromkeys([*configured[part], *planned])
        found += [_source(name, use, configured[part], planned) for name in names]
    return found


def _planned(log: RunLog, part: str) -> dict[str, Any]:
    planned = log.plan.get(part)
    return planned if isinstance(planned, dict) else {}


def _source(name: str, use: str, configured: dict[str, dict[str, Any]], planned: dict[str, Any]) -> Source:
    paths = configured.get(name, {}).get("path", "")
    path = ", ".join(visible(masked(path)) for path in (paths if isinstance(paths, list) else [paths]))
    plan = planned.get(name)
    facts = _facts(plan if isinstance(plan, dict) else {})
    if use == "generation":
        facts.pop("loss tokens", None)
    return Source(name, use, path, facts)


def _facts(plan: dict[str, Any]) -> dict[str, str]:
    """Sizes of one source, and the counts that are not 0."""
    counted = {**plan, **(plan["counts"] if isinstance(plan.get("counts"), dict) else {})}
    examples, tokens = finite(plan.get("examples")), finite(plan.get("tokens"))
    shown = {
        label: finite(plan.get(key))
        for key, label in (
            ("records", "records"),
            ("examples", "examples"),
            ("tokens", "tokens"),
            ("loss_tokens", "loss tokens"),
        )
    }
    shown["tokens per example"] = tokens / examples if tokens and examples else None
    shown["longest example"] = finite(plan.get("longest"))
    shown |= {label: finite(counted.get(key)) or None for key, label in _COUNTS.items()}
    return {label: f"{value:,.0f}" for label, value in shown.items() if value is not None}


def reasons(log: RunLog) -> tuple[int, list[Reason]]:
    """Reasons for which records were rejected or dropped.

    Returns:
        The number of records, and the most frequent reasons with their first records.
    """
    found: dict[tuple[str, str], Reason] = {}
    total = 0
    for row in read_lines(log.directory.rejected):
        total += 1
        source, text = str(row.get("source", "")), str(row.get("reason", ""))
        kind = (source, _kind(text))
        if kind not in found and len(found) >= MAX_KINDS:
            kind, text = (source, ""), "other reasons"
        reason = found.setdefault(kind, Reason(visible(source), visible(text[:500])))
        reason.count += 1
        if len(reason.records) < MAX_RECORDS:
            reason.records.append(visible(masked(row.get("record", ""))[:300]))
    return total, sorted(found.values(), key=lambda reason: -reason.count)[:MAX_REASONS]


def _kind(reason: str) -> str:
    """A reason without its numbers and quotations, which differ between records.

    >>> _kind("420 tokens, a row holds 128") == _kind("9 tokens, a row holds 128")
    True
    """
    return re.sub(r"'[^']*'|\"[^\"]*\"|\d[\d,.]*", "…", reason)[:300]
