"""Predictions for the page: read once from first to last, of which only what is shown stays in memory."""

from __future__ import annotations

import heapq
import random
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from markupsafe import Markup, escape

from raysft.report.read_run import RunLog, read_lines
from raysft.report.summary import last_user_turn

SHOWN = 20
"""Predictions of each kind: the best, the worst, random ones."""
SCORE_PARTS = 10
"""Bars of the histogram of scores."""
MOST_CHARACTERS = 1500
"""Of a text that is shown; a page with all of every text could not be opened."""
MOST_WORDS = 400
"""Of a text that is compared word by word."""
ALIKE = 0.4
"""Texts of which less than this is alike are not marked: every word would be."""

_UNSPACED = "\u0e00-\u0eff\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uac00-\ud7af\uf900-\ufaff"
_WORD = re.compile(rf"[{_UNSPACED}]|[^\W{_UNSPACED}]+|[^\w\s]")
"""A word, a sign, or a character of a script that has no spaces between words."""
_VISIBLE = {code: 0x2400 + code for code in range(32) if code not in b"\n\t\r"}
_VISIBLE |= {0x7F: 0x2421} | dict.fromkeys(range(0x80, 0xA0), 0xFFFD)
"""Control characters as the symbols that Unicode has for them: in a page they would be nothing or an error."""


@dataclass(frozen=True)
class Prediction:
    """One prediction as the page shows it."""

    id: Any
    source: str
    score: float | None
    stop: str
    tokens: int | None
    asked: str
    """What the prompt asks: its last turn."""
    prompt: str
    """The whole prompt; empty if it is no more than what is asked."""
    reference: Markup
    after: Markup
    before: Markup | None
    before_score: float | None


@dataclass
class Tally:
    """What is counted over all predictions of one model."""

    count: int = 0
    scored: int = 0
    score: float = 0.0
    """Sum over the scored ones."""
    scores: Counter[int] = field(default_factory=Counter)
    """How many are in each part of the way from 0 to 1."""
    characters: Counter[int] = field(default_factory=Counter)
    """How many predictions have so many characters."""
    references: Counter[int] = field(default_factory=Counter)
    tokens: Counter[int] = field(default_factory=Counter)
    stops: Counter[str] = field(default_factory=Counter)

    @property
    def mean(self) -> float | None:
        """Mean score; None where nothing can be scored."""
        return self.score / self.scored if self.scored else None

    def add(self, row: dict[str, Any]) -> float | None:
        """Count one prediction.

        Returns:
            Its score; None without a reference.
        """
        predicted, reference = _text(row.get("predict")), _text(row.get("label"))
        self.count += 1
        self.characters[len(predicted)] += 1
        self.references[len(reference)] += 1
        if isinstance(row.get("tokens"), int):
            self.tokens[row["tokens"]] += 1
        if row.get("stop"):
            self.stops[_text(row["stop"])[:40]] += 1
        if not reference.strip():
            return None
        score = word_f1(predicted, reference)
        self.scored, self.score = self.scored + 1, self.score + score
        self.scores[min(SCORE_PARTS - 1, int(SCORE_PARTS * score))] += 1
        return score


@dataclass(frozen=True)
class Predictions:
    """All that the page says of predictions."""

    after: Tally
    before: Tally
    groups: list[tuple[str, list[Prediction]]]
    """The worst, the best and random ones, under their titles; each only once in a run with few of them."""


def read_predictions(log: RunLog) -> Predictions:
    """Read the predictions of the trained model, and of the one before for those that are shown.

    Raises:
        RunFailed: a file of them is corrupt.
    """
    seed = log.option("run.seed", 0)
    after, chosen = _choose(read_lines(log.directory.predictions), random.Random(f"{seed}"))
    wanted = {_text(row.get("id")) for _, rows in chosen for _, row in rows if row.get("id") is not None}
    before, found = Tally(), {}
    for row in read_lines(log.directory.base_predictions):
        score = before.add(row)
        if _text(row.get("id")) in wanted:
            found[_text(row["id"])] = (score, row)
    groups = [
        (title, [_shown(row, score, found.get(_text(row.get("id")))) for score, row in rows]) for title, rows in chosen
    ]
    return Predictions(after, before, groups)


_Scored = tuple[float | None, dict[str, Any]]


def _choose(rows: Iterable[dict[str, Any]], chance: random.Random) -> tuple[Tally, list[tuple[str, list[_Scored]]]]:
    """The worst, the best and random rows; among equals chance decides, or all would stem from the first source."""
    tally, drawn = Tally(), []
    best: list[tuple[float, float, int, dict[str, Any]]] = []
    worst: list[tuple[float, float, int, dict[str, Any]]] = []
    for number, row in enumerate(rows):
        score, lot = tally.add(row), chance.random()
        if number < SHOWN:
            drawn.append((number, score, row))
        elif (place := chance.randrange(number + 1)) < SHOWN:
            drawn[place] = (number, score, row)
        if score is not None:
            for heap, sign in ((best, 1), (worst, -1)):
                entry = (sign * score, lot, number, row)
                if len(heap) < SHOWN:
                    heapq.heappush(heap, entry)
                elif entry > heap[0]:
                    heapq.heapreplace(heap, entry)
    drawn.sort(key=lambda item: item[0])
    random_rows: list[_Scored] = [(score, row) for _, score, row in drawn]
    if tally.count <= SHOWN:
        title = "All of them, the worst first" if tally.scored else "All of them"
        if not tally.count:
            return tally, []
        return tally, [(title, sorted(random_rows, key=lambda item: item[0] if item[0] is not None else 2.0))]
    kept = min(SHOWN, tally.scored // 3)
    lowest: list[_Scored] = [(-score, row) for score, _, _, row in sorted(worst, reverse=True)[:kept]]
    highest: list[_Scored] = [(score, row) for score, _, _, row in sorted(best, reverse=True)[:kept]]
    ends = (("The worst", lowest), ("The best", highest))
    return tally, [group for group in (*ends, ("Drawn at random", random_rows)) if group[1]]


def _shown(row: dict[str, Any], score: float | None, base: _Scored | None) -> Prediction:
    prompt, reference, predicted = (_text(row.get(key)) for key in ("prompt", "label", "predict"))
    asked = last_user_turn(prompt)
    marked_reference, after = marked(reference, predicted)
    before = marked(reference, _text(base[1].get("predict")))[1] if base else None
    return Prediction(
        id=visible(_text(row.get("id")))[:200],
        source=visible(_text(row.get("source")))[:100],
        score=score,
        stop=visible(_text(row.get("stop")))[:40],
        tokens=row["tokens"] if isinstance(row.get("tokens"), int) else None,
        asked=visible(middle_out(asked)),
        prompt=visible(middle_out(prompt)) if prompt.strip() != asked.strip() else "",
        reference=marked_reference,
        after=after,
        before=before,
        before_score=base[0] if base else None,
    )


def word_f1(prediction: str, reference: str) -> float:
    """How many words two texts share, over the words that they have: 1 if all, 0 if none; order does not count.

    It is cheap and the same in both directions. Signs count as words, and so do single characters of scripts that
    have no spaces.

    >>> word_f1("The sea is blue.", "the sea was blue."), word_f1("北京", "北京市"), word_f1("", "a")
    (0.8, 0.8, 0.0)
    """
    ours, theirs = Counter(words(prediction)), Counter(words(reference))
    total = ours.total() + theirs.total()
    return 2 * (ours & theirs).total() / total if total else 1.0


def words(text: str) -> list[str]:
    """The words of a text, in small letters.

    >>> words("It's 北京!")
    ['it', "'", 's', '北', '京', '!']
    """
    return _WORD.findall(text.lower())


def marked(reference: str, prediction: str) -> tuple[Markup, Markup]:
    """Both texts, escaped, with the words marked that the other one does not have at that place.

    >>> marked("a red <b>", "a blue <b>")[1]
    Markup('a <mark>blue</mark> &lt;b&gt;')
    """
    texts = [visible(middle_out(text)) for text in (reference, prediction)]
    pieces = [_pieces(text) for text in texts]
    heads = [[word.lower() for word, _ in each[:MOST_WORDS]] for each in pieces]
    pairs = aligned(*heads)
    if 2 * len(pairs) < ALIKE * (len(heads[0]) + len(heads[1])):
        return escape(texts[0]), escape(texts[1])
    left = set(range(len(heads[0]))) - {ours for ours, _ in pairs}
    right = set(range(len(heads[1]))) - {theirs for _, theirs in pairs}
    return _mark(pieces[0], left), _mark(pieces[1], right)


def aligned(left: Sequence[str], right: Sequence[str]) -> list[tuple[int, int]]:
    """A longest common subsequence of two texts, as indices into both, in descending order.

    A row of the usual table is one number whose bits are the steps of that row (Hyyrö's form), so that texts of the same
    word over and over, as bad models write them, take no longer than others.

    >>> aligned("a red cat sat".split(), "a cat sat down".split())
    [(3, 2), (2, 1), (0, 0)]
    """
    places: dict[str, int] = {}
    for index, word in enumerate(left):
        places[word] = places.get(word, 0) | 1 << index
    whole = (1 << len(left)) - 1
    rows, row = [], whole
    for word in right:
        found = row & places.get(word, 0)
        row = (row + found | row - found) & whole
        rows.append(row)
    pairs, i, j = [], len(left), len(right)
    while i and j:
        if rows[j - 1] >> i - 1 & 1:
            i -= 1
        elif j > 1 and not rows[j - 2] >> i - 1 & 1:
            j -= 1
        else:
            i, j = i - 1, j - 1
            pairs.append((i, j))
    return pairs


def _pieces(text: str) -> list[tuple[str, str]]:
    """A text as (word, space after it), nothing lost.

    >>> _pieces(" a b")
    [('', ' '), ('a', ' '), ('b', '')]
    """
    ends = [(0, 0), *(match.span() for match in _WORD.finditer(text))]
    starts = [start for start, _ in ends[1:]] + [len(text)]
    pieces = [(text[begin:end], text[end:after]) for (begin, end), after in zip(ends, starts, strict=True)]
    return pieces if pieces[0] != ("", "") else pieces[1:]


def _mark(pieces: list[tuple[str, str]], other: set[int]) -> Markup:
    """Neighbouring marked words become one mark."""
    parts: list[Markup] = []
    for place, (word, space) in enumerate(pieces):
        inside = place in other and word
        if inside and place - 1 not in other:
            parts.append(Markup("<mark>"))
        parts.append(escape(word))
        if inside and place + 1 not in other:
            parts.append(Markup("</mark>"))
        parts.append(escape(space))
    return Markup("").join(parts)


def visible(text: str) -> str:
    """A text with control characters that can be seen, and half characters as JSON escapes them.

    >>> visible("a\\x00\\ud800\\r\\n")
    'a␀\\\\ud800\\n'
    """
    whole = text.encode("utf-8", "backslashreplace").decode("utf-8")
    return whole.replace("\r\n", "\n").replace("\r", "\n").translate(_VISIBLE)


def middle_out(text: str) -> str:
    """A text without its middle if it is long: what a prompt asks often stands at its end."""
    if len(text) <= MOST_CHARACTERS:
        return text
    tail = MOST_CHARACTERS // 3
    left_out = len(text) - MOST_CHARACTERS
    return f"{text[: MOST_CHARACTERS - tail]} […{left_out:,} characters left out…] {text[-tail:]}"


def _text(value: Any) -> str:
    return "" if value is None else str(value)
