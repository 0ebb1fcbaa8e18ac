"""Chat templates that only write contents out: what they add depends on the roles alone, and so is rendered once for each order
of roles instead of twice for each conversation."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import jinja2
from jinja2 import nodes

Span = tuple[int, int]
HIDING = (
    nodes.AssignBlock,
    nodes.FilterBlock,
    nodes.CallBlock,
    nodes.Macro,
    nodes.Block,
    nodes.ScopedEvalContextModifier,
    nodes.Extends,
    nodes.Include,
    nodes.Import,
    nodes.FromImport,
)
"""What may look at, or change, what is written inside it."""


def only_writes_contents(template: str) -> bool:
    """Whether a template takes a turn's content nowhere but, joined to other text, to its output.

    What is not seen to be so counts as no: filters, conditions and variables that get to see a content, loops over anything but
    the turns, turns handed on as a whole.

    >>> only_writes_contents("{% for m in messages %}{{ m['role'] + ': ' + m.content }}{% endfor %}")
    True
    >>> only_writes_contents("{% for m in messages %}{{ m.content | trim }}{% endfor %}")
    False
    >>> only_writes_contents("{% for m in messages %}{% filter trim %}{{ m.content }}{% endfilter %}{% endfor %}")
    False
    """
    try:
        tree = jinja2.Environment(trim_blocks=True, lstrip_blocks=True).parse(template)
    except jinja2.TemplateError:
        return False
    if any(True for _ in tree.find_all(HIDING)):
        return False
    turns = {"messages"}
    for loop in tree.find_all(nodes.For):
        if isinstance(loop.iter, nodes.Name) and loop.iter.name == "messages" and isinstance(loop.target, nodes.Name):
            turns.add(loop.target.name)
    return all(_harmless(node, parents, turns) for node, parents in _walk(tree, ()))


def _walk(node: nodes.Node, parents: tuple[nodes.Node, ...]) -> Iterator[tuple[nodes.Node, tuple[nodes.Node, ...]]]:
    """Every node with those above it, the nearest first."""
    yield node, parents
    for child in node.iter_child_nodes():
        yield from _walk(child, (node, *parents))


def _harmless(node: nodes.Node, parents: tuple[nodes.Node, ...], turns: set[str]) -> bool:
    parent = parents[0] if parents else None
    if isinstance(node, nodes.Name) and node.ctx == "store":
        return isinstance(parent, nodes.For) or node.name not in turns
    if isinstance(node, nodes.Name) and node.name in turns:
        if isinstance(parent, nodes.For):
            return node.name == "messages" and parent.iter is node
        # messages[0], and the role or the content of a turn.
        return isinstance(_key(parent), int) if node.name == "messages" else _key(parent) in ("role", "content")
    key = _key(node)
    if isinstance(key, int):
        return _key(parent) in ("role", "content")
    if key == "content":
        above = next((each for each in parents if not isinstance(each, nodes.Add | nodes.Concat)), None)
        return isinstance(above, nodes.Output)
    return True


def _key(node: nodes.Node | None) -> str | int | None:
    """What a node looks up: the attribute or the constant in brackets."""
    if isinstance(node, nodes.Getattr):
        return node.attr
    if isinstance(node, nodes.Getitem) and isinstance(node.arg, nodes.Const):
        return node.arg.value
    return None


@dataclass(frozen=True)
class Skeleton:
    """What a template writes around the contents of a conversation whose roles are known."""

    pieces: tuple[str, ...]
    """Text before, between and behind the contents."""
    spans: tuple[tuple[int, int, int], ...]
    """For each assistant turn its number, the characters of its span before its content and those behind it."""

    @classmethod
    def learn(cls, text: str, contents: Sequence[str], turns: Sequence[int], spans: Sequence[Span]) -> Skeleton | None:
        """Take a rendering of contents that stand nowhere else apart.

        Args:
            text: the rendering.
            contents: one for each turn.
            turns: numbers of the assistant's turns.
            spans: where these stand in the text.

        Returns:
            None where contents are not all written once and in order, or a turn has no end of its own.
        """
        pieces, at, places = [], 0, []
        for content in contents:
            place = text.find(content, at)
            if place < 0 or text.count(content) != 1:
                return None
            pieces.append(text[at:place])
            places.append(place)
            at = place + len(content)
        around = tuple(
            (turn, places[turn] - start, end - places[turn] - len(contents[turn]))
            for turn, (start, end) in zip(turns, spans, strict=True)
        )
        if any(before < 0 or behind <= 0 for _, before, behind in around):
            return None
        return cls((*pieces, text[at:]), around)

    def fill(self, contents: Sequence[str]) -> tuple[str, tuple[Span, ...]]:
        """The conversation with these contents: its text, and the span of each assistant turn."""
        parts: list[str] = []
        ends: list[int] = []
        length = 0
        for piece, content in zip(self.pieces, contents, strict=False):
            parts += (piece, content)
            length += len(piece) + len(content)
            ends.append(length)
        parts.append(self.pieces[-1])
        spans = tuple(
            (ends[turn] - len(contents[turn]) - before, ends[turn] + behind) for turn, before, behind in self.spans
        )
        return "".join(parts), spans
