"""How the assistant's turns that are trained on begin and end: where generation may stop, and what training never saw.

It is seen from the labels themselves, turn by turn, and counted with the shards.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, Literal, NamedTuple

import numpy as np

from raysft.data.tokenization.assistant_spans import ChatTemplate, Rendered
from raysft.data.tokenization.markers import Render
from raysft.data.tokenization.markers import Turn as Conversed
from raysft.data.tokenization.span_search import Span
from raysft.data.types import IGNORE_INDEX


class Turn(NamedTuple):
    """One thing that is seen of a trained turn."""

    kind: Literal["ended", "worded", "open", "cut", "inside", "asked", "unasked", "headed"]
    """``ended`` by a token of its own, as ``<|im_end|>`` is one; ``worded``: the template ends it with ordinary tokens; ``open``:
    nothing stands behind its text; ``cut``: its end was cut off; ``inside``: the template writes a token of its own inside it;
    ``asked``: it begins with all that the generation prompt opens; ``unasked``: it does not; ``headed``: the generation prompt
    opens nothing, and something precedes the turn."""
    token: int = -1
    """The last token, or the one inside."""
    text: str = ""
    """The token as text; of ``unasked`` what only the generation prompt has, of ``headed`` what it lacks."""


ASKED = (Turn("asked"),)
Seen = tuple[tuple[int, Turn], ...]
"""What is seen of an example's turns, each with the index of the token that it is about."""


@dataclass(frozen=True)
class Turns:
    """What is seen of all turns that are trained on, in numbers."""

    ended: dict[str, int] = field(default_factory=dict)
    """Turns by the token that ends them."""
    passed: tuple[str, ...] = ()
    """Tokens that end some turns and that the template writes inside others, so that generation does not stop at them."""
    worded: int = 0
    last_word: str = ""
    """The last token of most of these."""
    open: int = 0
    cut: int = 0
    unseen: str = ""
    """What the generation prompt opens and no turn begins with."""
    unprompted: str = ""
    """What precedes the turns and no generation prompt opens."""

    @classmethod
    def of(cls, counts: Counter[Turn]) -> Turns:
        """Sum up what was counted."""

        def number(kind: str) -> int:
            return sum(count for turn, count in counts.items() if turn.kind == kind)

        def most(kind: str) -> str:
            return max(((count, turn.text) for turn, count in counts.items() if turn.kind == kind), default=(0, ""))[1]

        stops = end_tokens(counts)
        ended = {turn.text: count for turn, count in counts.most_common() if turn.kind == "ended"}
        return cls(
            ended=ended,
            passed=tuple(turn.text for turn in counts if turn.kind == "ended" and turn.token not in stops),
            worded=number("worded"),
            last_word=most("worded"),
            open=number("open"),
            cut=number("cut"),
            unseen="" if number("asked") else most("unasked"),
            unprompted="" if number("asked") else most("headed"),
        )

    @property
    def total(self) -> int:
        """Turns whose end is known."""
        return sum(self.ended.values()) + self.worded + self.open + self.cut


def end_tokens(counts: Counter[Turn]) -> tuple[int, ...]:
    """Tokens that end turns and never stand inside one, where generation would stop too early."""
    inside = {turn.token for turn in counts if turn.kind == "inside"}
    return tuple(sorted({turn.token for turn in counts if turn.kind == "ended"} - inside))


def kept(seen: Seen, indices: np.ndarray) -> Seen:
    """What is left to be seen of an example that was cut down to the tokens at these indices."""
    there = np.isin([at for at, _ in seen], indices)
    ends = ("ended", "worded", "open")
    pairs = zip(seen, there, strict=True)
    return tuple((at, turn if stays else Turn("cut")) for (at, turn), stays in pairs if stays or turn.kind in ends)


class Framing:
    """Looks at what frames the trained turns of conversations."""

    def __init__(self, backend: Any, eos: int | None, ids_end: int) -> None:
        # Some tokenizers have white space and HTML among the tokens that were added to them.
        added = {index: each for index, each in backend.get_added_tokens_decoder().items() if each.content.strip()}
        self.texts = {index: token.content for index, token in added.items()}
        self.special = {index for index, token in added.items() if token.special} | ({eos} - {None})
        self.own = np.zeros(ids_end, np.bool_)
        self.own[[*added, *self.special]] = True
        self.decode = lru_cache(maxsize=10_000)(lambda token: backend.decode([token], skip_special_tokens=False))
        self._turns: dict[tuple[str, int], Turn] = {}
        self._openings: dict[tuple[bool, str], str | Turn | None] = {}

    def end_of_ids(self, ids: np.ndarray, labels: np.ndarray) -> Seen:
        """How ids that are no conversation end, where that is a token of its own; of others nothing is known."""
        labelled = np.flatnonzero(labels != IGNORE_INDEX)
        at = self._last(ids, 0, int(labelled[-1]) + 1) if len(labelled) else 0
        return (
            ((at, self._turn("ended", ids[at])),) if labels[at] != IGNORE_INDEX and int(ids[at]) in self.special else ()
        )

    def look(
        self,
        template: ChatTemplate,
        rendered: Rendered,
        ids: np.ndarray,
        number: int,
        tokens: Span,
        written: bool,
    ) -> Seen:
        """How a turn of a conversation begins and ends.

        Args:
            template: that of the conversation.
            rendered: what it made of the conversation.
            ids: the tokens of that.
            number: which of the assistant's turns it is.
            tokens: [start, end) of its tokens.
            written: control tokens stand in what somebody wrote, so that those inside a turn may not be the template's.
        """
        start, end = tokens
        if start == end:
            return ()
        span, index = rendered.spans[number], rendered.form.answers[number]
        content = rendered.form.turns[index].get("content")
        last = self._last(ids, start, end)
        if int(ids[last]) in self.special:
            how = self._turn("ended", ids[last])
        elif isinstance(content, str) and _ends_with(rendered.text[slice(*span)], content):
            how = Turn("open")
        else:
            how = self._turn("ended" if self.own[ids[last]] else "worded", ids[last])
        before = rendered.form.turns[:index]
        begun = self._with_bos(template, before, rendered.form.tools, rendered.text, span[0])
        inside = [] if written else start + np.flatnonzero(self.own[ids[start:last]])
        return (
            *((start, turn) for turn in begun),
            *((int(at), self._turn("inside", ids[at])) for at in inside),
            (last, how),
        )

    def _last(self, ids: np.ndarray, start: int, end: int) -> int:
        """The last token of a turn; white space behind a token of its own does not count."""
        at = end - 1
        while at > start and not self.own[ids[at]] and not self.decode(int(ids[at])).strip():
            at -= 1
        return at

    def _turn(self, kind: Any, token: Any) -> Turn:
        token = int(token)
        if (kind, token) not in self._turns:
            self._turns[kind, token] = Turn(kind, token, self.texts.get(token) or self.decode(token))
        return self._turns[kind, token]

    def _with_bos(
        self, template: ChatTemplate, before: Sequence[Conversed], tools: Sequence[Any], text: str, start: int
    ) -> tuple[Turn, ...]:
        """Whether a turn that starts there begins as generation would begin it: with all that the generation prompt opens.

        The generation prompt is rendered for the first turn of its kind, and looked for in all.
        """
        key = bool(tools), before[-1]["role"]
        if key not in self._openings:
            self._openings[key] = _opening(template.render, before, tools, text[:start])
        opening = self._openings[key]
        if not isinstance(opening, str):
            return () if opening is None else (opening,)
        if text.find(opening, max(0, start - len(opening)), start + len(opening)) >= 0:
            return ASKED
        common = next(size for size in range(len(opening) - 1, -1, -1) if text.endswith(opening[:size], 0, start))
        return (Turn("unasked", text=opening[common:]),)


def _ends_with(text: str, content: str) -> bool:
    return bool(content.strip()) and text.rstrip().endswith(content.strip())


def _opening(render: Render, before: Sequence[Conversed], tools: Sequence[Any], trained: str) -> str | Turn | None:
    """What the generation prompt opens behind a conversation; where that is nothing, what precedes a trained turn all the same.

    None where there is nothing to say.
    """
    try:
        told, asked = render(before, tools, False), render(before, tools, True)
    except Exception:  # some templates refuse conversations that end with what precedes a turn
        return None
    same = next((at for at, pair in enumerate(zip(told, asked, strict=False)) if pair[0] != pair[1]), len(told))
    if opening := asked[same:]:
        return opening
    header = trained[len(asked) :] if trained.startswith(asked) else ""
    return Turn("headed", text=header) if header.strip() else None


def total(counts: Iterable[Counter[Turn]]) -> Counter[Turn]:
    """What was counted of several sets together."""
    whole = Counter[Turn]()
    for each in counts:
        whole.update(each)
    return whole
