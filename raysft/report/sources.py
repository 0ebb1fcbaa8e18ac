"""The data of a run for the page: what was used of each source, and what was rejected and why."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any

from raysft.report.card import masked
from raysft.report.predictions import visible
from raysft.report.read_run import RunLog, finite, read_lines

MOST_REASONS = 20
"""Reasons that are shown, the most frequent ones."""
MOST_PLACES = 5
"""Records that are named for each."""
MOST_KINDS = 2000
"""Reasons that are told apart while they are counted: data can be wrong in as many ways as it has records."""

_COUNTS = {
    "rejected": "rejected",
    "dropped": "dropped",
    "dropped_tokens": "tokens dropped",
    "truncated": "truncated",
    "truncated_tokens": "tokens cut off",
    "split": "split",
    "split_pieces": "pieces of them",
    "control_tokens": "control tokens in the text",
    "tools_as_text": "tools written into the text",
    "turns_left_out": "turns left out by the chat template",
    "quoted_arguments": "arguments of calls written as a quoted text",
}
"""What is counted of a source, in the order of the plan."""


@dataclass(frozen=True)
class Source:
    """One source as it was used."""

    name: str
    use: str
    path: str
    figures: dict[str, str]
    """Label → text, only what is there."""


@dataclass
class Reason:
    """Records that were rejected for the same reason."""

    source: str
    text: str
    """The reason as the first of them has it."""
    count: int = 0
    places: list[str] = field(default_factory=list)


def sources(log: RunLog) -> list[Source]:
    """The sources in the order of the config; those that a registry or a holdout brought in follow."""
    listed = {part: {str(source.get("name")): source for source in log.sources(part)} for part in ("train", "eval")}
    if log.other_model:
        planned, everywhere = _planned(log, "generation"), {**listed["train"], **listed["eval"]}
        return [_source(name, "generation", everywhere, planned) for name in planned]
    found = []
    for use, part, planned_as in (("training", "train", "sources"), ("evaluation", "eval", "evaluation")):
        planned = _planned(log, planned_as)
        names = dict.fromkeys([*listed[part], *planned])
        found += [_source(name, use, listed[part], planned) for name in names]
    return found


def _planned(log: RunLog, part: str) -> dict[str, Any]:
    planned = log.plan.get(part)
    return planned if isinstance(planned, dict) else {}


def _source(name: str, use: str, listed: dict[str, dict[str, Any]], planned: dict[str, Any]) -> Source:
    paths = listed.get(name, {}).get("path", "")
    path = ", ".join(visible(masked(each)) for each in (paths if isinstance(paths, list) else [paths]))
    plan = planned.get(name)
    figures = _figures(plan if isinstance(plan, dict) else {})
    if use == "generation":
        figures.pop("trained tokens", None)
    return Source(name, use, path, figures)


def _figures(plan: dict[str, Any]) -> dict[str, str]:
    """The figures of one source in the plan; only what happened is counted among them."""
    counted = {**plan, **(plan["counts"] if isinstance(plan.get("counts"), dict) else {})}
    examples, tokens = finite(plan.get("examples")), finite(plan.get("tokens"))
    shown = {
        label: finite(plan.get(key))
        for key, label in (
            ("records", "records"),
            ("examples", "examples"),
            ("tokens", "tokens"),
            ("loss_tokens", "trained tokens"),
        )
    }
    shown["tokens an example"] = tokens / examples if tokens and examples else None
    shown["longest"] = finite(plan.get("longest"))
    shown |= {label: finite(counted.get(key)) or None for key, label in _COUNTS.items()}
    return {label: f"{value:,.0f}" for label, value in shown.items() if value is not None}


def reasons(log: RunLog) -> tuple[int, list[Reason]]:
    """Why records were rejected or dropped.

    Returns:
        How many were, and the most frequent reasons, with the first records of each.
    """
    found: dict[tuple[str, str], Reason] = {}
    total = 0
    for row in read_lines(log.directory.rejected):
        total += 1
        source, text = str(row.get("source", "")), str(row.get("reason", ""))
        kind = (source, _kind(text))
        if kind not in found and len(found) >= MOST_KINDS:
            kind, text = (source, ""), "other reasons"
        reason = found.setdefault(kind, Reason(visible(source), visible(text[:500])))
        reason.count += 1
        if len(reason.places) < MOST_PLACES:
            reason.places.append(visible(masked(row.get("record", ""))[:300]))
    return total, sorted(found.values(), key=lambda reason: -reason.count)[:MOST_REASONS]


def _kind(reason: str) -> str:
    """A reason without what differs between records.

    >>> _kind("420 tokens, a row holds 128") == _kind("9 tokens, a row holds 128")
    True
    """
    return re.sub(r"'[^']*'|\"[^\"]*\"|\d[\d,.]*", "…", reason)[:300]
