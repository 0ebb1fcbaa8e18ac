"""How trained assistant turns begin and end, and what generation needs to know about it.

The tokenizer observes each turn from its own labels and counts the observations with the shards. From the counts follow the tokens
that generation stops at, and warnings where training never sees what generation asks for.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, Literal, NamedTuple

import numpy as np

from raysft.data.tokenization.assistant_spans import ChatTemplate, Rendered
from raysft.data.tokenization.markers import Render, Turn
from raysft.data.tokenization.span_search import Span
from raysft.data.types import IGNORE_INDEX

Kind = Literal["end_token", "end_text", "no_end", "truncated", "inner_token", "prompted", "prompt_only", "turn_only"]


class TurnObservation(NamedTuple):
    """One observation about a trained turn."""

    kind: Kind
    """How it ends: ``end_token``: with a dedicated token, such as ``<|im_end|>``; ``end_text``: with ordinary tokens that the
    template writes; ``no_end``: with its content; ``truncated``: its end was cut off.

    ``inner_token``: the template writes a token of its own inside the turn.

    How it begins: ``prompted``: with all that the generation prompt opens; ``prompt_only``: without part of it; ``turn_only``: the
    generation prompt opens nothing, but the template writes text before the turn."""
    token: int = -1
    """Id of the last or the inner token."""
    text: str = ""
    """The token as text. For ``prompt_only`` the text that only the generation prompt has, for ``turn_only`` the text that it
    lacks."""


PROMPTED = (TurnObservation("prompted"),)
Observations = tuple[tuple[int, TurnObservation], ...]
"""Observations about the turns of an example, each with the index of the token that it is about."""


@dataclass(frozen=True)
class TurnStatistics:
    """Observations about all trained turns, in numbers."""

    end_tokens: dict[str, int] = field(default_factory=dict)
    """End token → number of turns."""
    inner_end_tokens: tuple[str, ...] = ()
    """Tokens that end some turns but occur inside others, so that generation does not stop at them."""
    text_ends: int = 0
    """Turns that end with ordinary tokens."""
    end_text: str = ""
    """The last token of most of these."""
    no_end: int = 0
    truncated: int = 0
    prompt_only: str = ""
    """Text that the generation prompt opens but no turn begins with."""
    turn_only: str = ""
    """Text that precedes the turns but is not in the generation prompt."""

    @classmethod
    def of(cls, counts: Counter[TurnObservation]) -> TurnStatistics:
        """Summarize counted observations."""

        def number(kind: Kind) -> int:
            return sum(count for seen, count in counts.items() if seen.kind == kind)

        def most_frequent(kind: Kind) -> str:
            return max(((count, seen.text) for seen, count in counts.items() if seen.kind == kind), default=(0, ""))[1]

        stops = stop_token_ids(counts)
        return cls(
            end_tokens={seen.text: count for seen, count in counts.most_common() if seen.kind == "end_token"},
            inner_end_tokens=tuple(
                seen.text for seen in counts if seen.kind == "end_token" and seen.token not in stops
            ),
            text_ends=number("end_text"),
            end_text=most_frequent("end_text"),
            no_end=number("no_end"),
            truncated=number("truncated"),
            prompt_only="" if number("prompted") else most_frequent("prompt_only"),
            turn_only="" if number("prompted") else most_frequent("turn_only"),
        )

    @property
    def total(self) -> int:
        """Turns whose end is known."""
        return sum(self.end_tokens.values()) + self.text_ends + self.no_end + self.truncated


def stop_token_ids(counts: Counter[TurnObservation]) -> tuple[int, ...]:
    """Tokens that end turns and never occur inside one, where generation would stop too early; the most frequent first."""
    inner = {seen.token for seen in counts if seen.kind == "inner_token"}
    ends = Counter[int]()
    for seen, count in counts.items():
        if seen.kind == "end_token" and seen.token not in inner:
            ends[seen.token] += count
    return tuple(sorted(ends, key=lambda token: (-ends[token], token)))


def truncate_observations(observations: Observations, kept_tokens: np.ndarray) -> Observations:
    """Observations that remain true of an example cut down to the tokens at these indices."""
    kept = np.isin([index for index, _ in observations], kept_tokens)
    return tuple(
        (index, seen if stays else TurnObservation("truncated"))
        for (index, seen), stays in zip(observations, kept, strict=True)
        if stays or seen.kind in ("end_token", "end_text", "no_end")
    )


class TurnInspector:
    """Observes how the trained turns of tokenized examples begin and end."""

    def __init__(self, backend: Any, eos: int | None, vocab_size: int) -> None:
        # Some tokenizers list white space and HTML among their added tokens.
        added = {index: token for index, token in backend.get_added_tokens_decoder().items() if token.content.strip()}
        self.texts = {index: token.content for index, token in added.items()}
        self.special = {index for index, token in added.items() if token.special} | ({eos} - {None})
        self.is_added = np.zeros(vocab_size, np.bool_)
        self.is_added[[*added, *self.special]] = True
        self.decode = lru_cache(maxsize=10_000)(lambda token: backend.decode([token], skip_special_tokens=False))
        self._observations: dict[tuple[Kind, int], TurnObservation] = {}
        self._openings: dict[tuple[bool, str], str | TurnObservation | None] = {}

    def inspect_ids(self, ids: np.ndarray, labels: np.ndarray) -> Observations:
        """Observe how ids that are not a conversation end: only a special token can be told from text."""
        labelled = np.flatnonzero(labels != IGNORE_INDEX)
        last = self._last_token(ids, 0, int(labelled[-1]) + 1) if len(labelled) else 0
        if labels[last] == IGNORE_INDEX or int(ids[last]) not in self.special:
            return ()
        return ((last, self._observation("end_token", ids[last])),)

    def inspect_turn(
        self,
        template: ChatTemplate,
        rendered: Rendered,
        ids: np.ndarray,
        number: int,
        tokens: Span,
        has_control_tokens: bool,
    ) -> Observations:
        """Observe how one assistant turn of a conversation begins and ends.

        Args:
            template: the chat template that rendered the conversation.
            rendered: the rendered conversation.
            ids: its tokens.
            number: index among the assistant turns.
            tokens: [start, end) of the turn's tokens.
            has_control_tokens: the record itself contains control tokens, so that one inside a turn may not be the template's.
        """
        start, end = tokens
        if start == end:
            return ()
        span, index = rendered.spans[number], rendered.given.assistant_turns[number]
        content = rendered.given.turns[index].get("content")
        last = self._last_token(ids, start, end)
        if int(ids[last]) in self.special:
            ending = self._observation("end_token", ids[last])
        elif isinstance(content, str) and _ends_with(rendered.text[slice(*span)], content):
            ending = TurnObservation("no_end")
        else:
            ending = self._observation("end_token" if self.is_added[ids[last]] else "end_text", ids[last])
        before = rendered.given.turns[:index]
        beginning = self._beginning(template, before, rendered.given.tools, rendered.text, span[0])
        inner = [] if has_control_tokens else start + np.flatnonzero(self.is_added[ids[start:last]])
        return (
            *((start, seen) for seen in beginning),
            *((int(at), self._observation("inner_token", ids[at])) for at in inner),
            (last, ending),
        )

    def _last_token(self, ids: np.ndarray, start: int, end: int) -> int:
        """Index of a turn's last token that is not white space."""
        last = end - 1
        while last > start and not self.is_added[ids[last]] and not self.decode(int(ids[last])).strip():
            last -= 1
        return last

    def _observation(self, kind: Kind, token: Any) -> TurnObservation:
        token = int(token)
        if (kind, token) not in self._observations:
            text = self.texts.get(token) or self.decode(token)
            self._observations[kind, token] = TurnObservation(kind, token, text)
        return self._observations[kind, token]

    def _beginning(
        self, template: ChatTemplate, before: Sequence[Turn], tools: Sequence[Any], text: str, start: int
    ) -> tuple[TurnObservation, ...]:
        """Compare the text around ``start``, where a turn begins, with what the generation prompt opens.

        The generation prompt is rendered once for each kind of conversation, for its first turn.
        """
        key = bool(tools), before[-1]["role"]
        if key not in self._openings:
            self._openings[key] = _opening(template.render, before, tools, text[:start])
        opening = self._openings[key]
        if not isinstance(opening, str):
            return () if opening is None else (opening,)
        if text.find(opening, max(0, start - len(opening)), start + len(opening)) >= 0:
            return PROMPTED
        common = next(size for size in range(len(opening) - 1, -1, -1) if text.endswith(opening[:size], 0, start))
        return (TurnObservation("prompt_only", text=opening[common:]),)


def _ends_with(text: str, content: str) -> bool:
    return bool(content.strip()) and text.rstrip().endswith(content.strip())


def _opening(
    render: Render, before: Sequence[Turn], tools: Sequence[Any], text_before: str
) -> str | TurnObservation | None:
    """Text that the generation prompt adds to a conversation, or the header that a trained turn has without it.

    None where the template refuses the conversation or there is neither.
    """
    try:
        without, with_prompt = render(before, tools, False), render(before, tools, True)
    except Exception:  # some templates refuse conversations that end before an assistant turn
        return None
    pairs = zip(without, with_prompt, strict=False)
    same = next((index for index, (one, other) in enumerate(pairs) if one != other), len(without))
    if opening := with_prompt[same:]:
        return opening
    header = text_before[len(with_prompt) :] if text_before.startswith(with_prompt) else ""
    return TurnObservation("turn_only", text=header) if header.strip() else None


def merge_counts(counts: Iterable[Counter[TurnObservation]]) -> Counter[TurnObservation]:
    """Add up counts of several sets."""
    merged = Counter[TurnObservation]()
    for part in counts:
        merged.update(part)
    return merged
