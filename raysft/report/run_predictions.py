"""Predictions of several runs for the same prompts. Files are read twice; only what is shown stays in memory."""

from __future__ import annotations

import heapq
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from markupsafe import Markup

from raysft.errors import RequestError
from raysft.report.pictures import Picture, draw, pictures
from raysft.report.read_run import read_lines
from raysft.report.runs import Run
from raysft.report.text import last_user_turn, visible, without_middle
from raysft.report.word_diff import marked, word_f1

SHOWN = 10
"""Number of prompts in each group: those on which the runs differ most, and random ones."""

Key = tuple[str, str]
"""A prompt that several runs have: its id, or its last turn without one, and its reference."""


@dataclass(frozen=True)
class Answer:
    """What one run predicted."""

    run: Run
    text: Markup
    score: float | None
    """Word F1 with the reference; None without a reference."""


@dataclass(frozen=True)
class Prompt:
    """One prompt with the predictions of all runs."""

    id: str
    source: str
    question: str
    pictures: Sequence[Picture]
    more_pictures: int
    reference: str
    answers: list[Answer]


@dataclass(frozen=True)
class SharedPredictions:
    """Predictions for the prompts that runs share."""

    runs: list[Run]
    """The runs that have them."""
    shared: int
    """Number of prompts that all of these runs have."""
    groups: list[tuple[str, list[Prompt]]]


def key_of(row: dict[str, Any]) -> Key:
    """What makes predictions of two runs answers to the same prompt."""
    identity = _text(row.get("id")) if row.get("id") is not None else last_user_turn(_text(row.get("prompt")))
    return identity, _text(row.get("label"))


def predictions(run: Run) -> Iterator[dict[str, Any]]:
    """Rows of a run's predictions, the first of each prompt; up to the first corrupt line, which is noted."""
    seen: set[Key] = set()
    try:
        for row in read_lines(run.log.directory.predictions):
            if (key := key_of(row)) not in seen:
                seen.add(key)
                yield row
    except RequestError as error:
        if str(error) not in run.problems:
            run.problems.append(str(error))


def shared_predictions(runs: Sequence[Run], seed: int) -> SharedPredictions:
    """Choose prompts that all runs with predictions share, those with the most different scores and random ones."""
    scores: dict[Key, list[float]] = {}
    having: list[Run] = []
    for run in runs:
        own = {key_of(row): _score(row) for row in predictions(run)}
        if own:
            having.append(run)
            known = scores if len(having) > 1 else {key: [] for key in own}
            scores = {key: [*known[key], own[key]] for key in known if key in own}
    if len(having) < 2 or not scores:
        return SharedPredictions(having, 0, [])
    chosen = _choose(scores, random.Random(seed))
    wanted = {key for _, keys in chosen for key in keys}
    rows = [{key: row for row in predictions(run) if (key := key_of(row)) in wanted} for run in having]
    drawn = draw(rows[0].values())
    groups = [(title, [_prompt(having, [own[key] for own in rows], drawn) for key in keys]) for title, keys in chosen]
    return SharedPredictions(having, len(scores), groups)


def _choose(scores: dict[Key, list[float]], chance: random.Random) -> list[tuple[str, list[Key]]]:
    if len(scores) <= SHOWN:
        return [("All shared prompts", list(scores))]
    spreads = {key: max(values) - min(values) for key, values in scores.items()}
    different = [key for key in heapq.nlargest(SHOWN, spreads, key=lambda key: spreads[key]) if spreads[key] > 0]
    sample = chance.sample(list(scores), SHOWN)
    groups = [("Where the scores differ most", different), ("Random sample", sample)]
    return [group for group in groups if group[1]]


def _prompt(runs: Sequence[Run], rows: Sequence[dict[str, Any]], drawn: dict[str, Picture]) -> Prompt:
    first, reference = rows[0], _text(rows[0].get("label"))
    answers = [
        Answer(
            run,
            marked(reference, _text(row.get("predict")))[1],
            _score(row) if reference.strip() else None,
        )
        for run, row in zip(runs, rows, strict=True)
    ]
    return Prompt(
        visible(_text(first.get("id")))[:200],
        visible(_text(first.get("source")))[:100],
        visible(without_middle(last_user_turn(_text(first.get("prompt"))))),
        *pictures(first, drawn),
        visible(without_middle(reference)),
        answers,
    )


def _score(row: dict[str, Any]) -> float:
    """Word F1 with the reference; 0 for all predictions without one."""
    reference = _text(row.get("label"))
    return word_f1(_text(row.get("predict")), reference) if reference.strip() else 0.0


def _text(value: Any) -> str:
    return "" if value is None else str(value)
