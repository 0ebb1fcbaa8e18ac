"""Predictions for the page. Each file is read once, and only the predictions that are shown stay in memory."""

from __future__ import annotations

import heapq
import random
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from markupsafe import Markup

from raysft.report.pictures import Picture, draw, pictures
from raysft.report.read_run import RunLog, read_lines
from raysft.report.text import last_user_turn, visible, without_middle
from raysft.report.word_diff import marked, word_f1

SHOWN = 20
"""Number of predictions in each group: the best, the worst, random ones."""
SCORE_BINS = 10
"""Bins of the histogram of scores, from 0 to 1."""


@dataclass(frozen=True)
class Prediction:
    """One prediction as the page shows it."""

    id: str
    source: str
    score: float | None
    """Word F1 with the reference; None without a reference."""
    stop: str
    tokens: int | None
    question: str
    """Last turn of the prompt."""
    prompt: str
    """The whole prompt; empty if it is the same as ``question``."""
    pictures: Sequence[Picture]
    """Its images."""
    more_pictures: int
    """Number of images that are not shown."""
    reference: Markup
    after: Markup
    before: Markup | None
    before_score: float | None


@dataclass
class Tally:
    """Counts over all predictions of one model."""

    count: int = 0
    scored: int = 0
    score: float = 0.0
    """Sum of the scores."""
    scores: Counter[int] = field(default_factory=Counter)
    """Number of predictions in each bin of the score."""
    characters: Counter[int] = field(default_factory=Counter)
    """Number of predictions of each length in characters."""
    references: Counter[int] = field(default_factory=Counter)
    """Number of references of each length in characters, without those that are empty."""
    tokens: Counter[int] = field(default_factory=Counter)
    """Number of predictions of each length in tokens."""
    stops: Counter[str] = field(default_factory=Counter)
    """Number of predictions for each stop reason."""

    @property
    def mean(self) -> float | None:
        """Mean score; None if no prediction has a reference."""
        return self.score / self.scored if self.scored else None

    def add(self, row: dict[str, Any]) -> float | None:
        """Count one prediction.

        Returns:
            Its score; None without a reference.
        """
        predicted, reference = _text(row.get("predict")), _text(row.get("label"))
        self.count += 1
        self.characters[len(predicted)] += 1
        if isinstance(row.get("tokens"), int):
            self.tokens[row["tokens"]] += 1
        if row.get("stop"):
            self.stops[_text(row["stop"])[:40]] += 1
        if not reference.strip():
            return None
        self.references[len(reference)] += 1
        score = word_f1(predicted, reference)
        self.scored, self.score = self.scored + 1, self.score + score
        self.scores[min(SCORE_BINS - 1, int(SCORE_BINS * score))] += 1
        return score


@dataclass(frozen=True)
class Predictions:
    """Predictions of a run, before and after training."""

    after: Tally
    before: Tally
    groups: list[tuple[str, list[Prediction]]]
    """The worst, the best and random predictions, with their titles; one group if there are few predictions."""


def read_predictions(log: RunLog) -> Predictions:
    """Read the predictions of the trained model, and those of the base model for the same prompts.

    Raises:
        RequestError: a file of predictions is corrupt.
    """
    seed = log.option("run.seed", 0)
    after, groups = _choose(read_lines(log.directory.predictions), random.Random(f"{seed}"))
    shown_ids = {_text(row.get("id")) for _, rows in groups for _, row in rows if row.get("id") is not None}
    before, base = Tally(), {}
    for row in read_lines(log.directory.base_predictions):
        score = before.add(row)
        if _text(row.get("id")) in shown_ids:
            base[_text(row["id"])] = (score, row)
    drawn = draw(row for _, rows in groups for _, row in rows)
    return Predictions(
        after,
        before,
        [
            (title, [_prediction(row, score, base.get(_text(row.get("id"))), drawn) for score, row in rows])
            for title, rows in groups
        ],
    )


_Scored = tuple[float | None, dict[str, Any]]
"""A row of the file with its score."""


def _choose(rows: Iterable[dict[str, Any]], chance: random.Random) -> tuple[Tally, list[tuple[str, list[_Scored]]]]:
    """Choose the worst, the best and random rows. Ties are broken at random: otherwise all would come from one source."""
    tally = Tally()
    sample: list[tuple[int, float | None, dict[str, Any]]] = []
    best: list[tuple[float, float, int, dict[str, Any]]] = []
    worst: list[tuple[float, float, int, dict[str, Any]]] = []
    for number, row in enumerate(rows):
        score, tie_break = tally.add(row), chance.random()
        if number < SHOWN:
            sample.append((number, score, row))
        elif (slot := chance.randrange(number + 1)) < SHOWN:  # reservoir sampling
            sample[slot] = (number, score, row)
        if score is not None:
            for heap, sign in ((best, 1), (worst, -1)):
                entry = (sign * score, tie_break, number, row)
                if len(heap) < SHOWN:
                    heapq.heappush(heap, entry)
                elif entry > heap[0]:
                    heapq.heapreplace(heap, entry)
    sample.sort(key=lambda item: item[0])
    random_rows: list[_Scored] = [(score, row) for _, score, row in sample]
    if tally.count <= SHOWN:
        return tally, _one_group(random_rows)
    kept = min(SHOWN, tally.scored // 3)
    lowest: list[_Scored] = [(-score, row) for score, _, _, row in sorted(worst, reverse=True)[:kept]]
    highest: list[_Scored] = [(score, row) for score, _, _, row in sorted(best, reverse=True)[:kept]]
    ends = (("Lowest scores", lowest), ("Highest scores", highest))
    return tally, [group for group in (*ends, ("Random sample", random_rows)) if group[1]]


def _one_group(rows: list[_Scored]) -> list[tuple[str, list[_Scored]]]:
    """All rows in one group, the lowest score first and those without a score last."""
    if not rows:
        return []
    title = "All predictions" + (", lowest score first" if any(score is not None for score, _ in rows) else "")
    return [(title, sorted(rows, key=lambda item: item[0] if item[0] is not None else 2.0))]


def _prediction(
    row: dict[str, Any], score: float | None, base: _Scored | None, drawn: dict[str, Picture]
) -> Prediction:
    prompt, reference, predicted = (_text(row.get(key)) for key in ("prompt", "label", "predict"))
    question = last_user_turn(prompt)
    marked_reference, after = marked(reference, predicted)
    before = marked(reference, _text(base[1].get("predict")))[1] if base else None
    shown, more = pictures(row, drawn)
    return Prediction(
        id=visible(_text(row.get("id")))[:200],
        source=visible(_text(row.get("source")))[:100],
        score=score,
        stop=visible(_text(row.get("stop")))[:40],
        tokens=row["tokens"] if isinstance(row.get("tokens"), int) else None,
        question=visible(without_middle(question)),
        prompt=visible(without_middle(prompt)) if prompt.strip() != question.strip() else "",
        pictures=shown,
        more_pictures=more,
        reference=marked_reference,
        after=after,
        before=before,
        before_score=base[0] if base else None,
    )


def _text(value: Any) -> str:
    return "" if value is None else str(value)
