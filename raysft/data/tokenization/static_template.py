"""Chat templates that copy contents unchanged: what they add depends on the roles alone.

The text around the contents is rendered once for each order of roles, instead of twice for each conversation.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import jinja2
from jinja2 import nodes

Span = tuple[int, int]
OPAQUE = (
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
"""Nodes that may read or change the text inside them."""


def only_copies_contents(template: str) -> bool:
    """Return True if a template uses contents only to write them, joined to other text.

    False if that cannot be seen: if filters, conditions or variables read a content, loops run over anything but the messages, or
    messages are passed on whole.

    >>> only_copies_contents("{% for m in messages %}{{ m['role'] + ': ' + m.content }}{% endfor %}")
    True
    >>> only_copies_contents("{% for m in messages %}{{ m.content | trim }}{% endfor %}")
    False
    >>> only_copies_contents("{% for m in messages %}{% filter trim %}{{ m.content }}{% endfilter %}{% endfor %}")
    False
    """
    try:
        tree = jinja2.Environment(trim_blocks=True, lstrip_blocks=True).parse(template)
    except jinja2.TemplateError:
        return False
    if any(True for _ in tree.find_all(OPAQUE)):
        return False
    names = {"messages"}
    for loop in tree.find_all(nodes.For):
        if isinstance(loop.iter, nodes.Name) and loop.iter.name == "messages" and isinstance(loop.target, nodes.Name):
            names.add(loop.target.name)
    return all(_only_copies(node, parents, names) for node, parents in _walk(tree, ()))


def _walk(node: nodes.Node, parents: tuple[nodes.Node, ...]) -> Iterator[tuple[nodes.Node, tuple[nodes.Node, ...]]]:
    """Yield every node with its parents, the nearest first."""
    yield node, parents
    for child in node.iter_child_nodes():
        yield from _walk(child, (node, *parents))


def _only_copies(node: nodes.Node, parents: tuple[nodes.Node, ...], names: set[str]) -> bool:
    """Return True if a node does not read a content except to write it.

    Args:
        node: a node of the template.
        parents: its parents, the nearest first.
        names: variables that hold a message, and ``messages``.
    """
    parent = parents[0] if parents else None
    if isinstance(node, nodes.Name) and node.ctx == "store":
        return isinstance(parent, nodes.For) or node.name not in names
    if isinstance(node, nodes.Name) and node.name in names:
        if isinstance(parent, nodes.For):
            return node.name == "messages" and parent.iter is node
        # messages[0], or the role or the content of a message.
        return isinstance(_key(parent), int) if node.name == "messages" else _key(parent) in ("role", "content")
    key = _key(node)
    if isinstance(key, int):
        return _key(parent) in ("role", "content")
    if key == "content":
        user = next((above for above in parents if not isinstance(above, nodes.Add | nodes.Concat)), None)
        return isinstance(user, nodes.Output)
    return True


def _key(node: nodes.Node | None) -> str | int | None:
    """Return the attribute or the constant in brackets that a node looks up."""
    if isinstance(node, nodes.Getattr):
        return node.attr
    if isinstance(node, nodes.Getitem) and isinstance(node.arg, nodes.Const):
        return node.arg.value
    return None


@dataclass(frozen=True)
class StaticTemplate:
    """The text that a template writes around the contents of a conversation with given roles."""

    texts: tuple[str, ...]
    """Text before, between and after the contents."""
    spans: tuple[tuple[int, int, int], ...]
    """(turn, characters of its span before its content, characters after) of each assistant turn."""

    @classmethod
    def from_rendering(
        cls, text: str, contents: Sequence[str], turns: Sequence[int], spans: Sequence[Span]
    ) -> StaticTemplate | None:
        """Split a rendering at its contents, which occur nowhere else.

        Args:
            text: the rendering.
            contents: one for each turn.
            turns: indices of the assistant turns.
            spans: their spans in the text.

        Returns:
            None if the contents are not all written once and in order, or a turn has no end of its own.
        """
        texts, end, starts = [], 0, []
        for content in contents:
            start = text.find(content, end)
            if start < 0 or text.count(content) != 1:
                return None
            texts.append(text[end:start])
            starts.append(start)
            end = start + len(content)
        around = tuple(
            (turn, starts[turn] - span_start, span_end - starts[turn] - len(contents[turn]))
            for turn, (span_start, span_end) in zip(turns, spans, strict=True)
        )
        if any(before < 0 or after <= 0 for _, before, after in around):
            return None
        return cls((*texts, text[end:]), around)

    def fill(self, contents: Sequence[str]) -> tuple[str, tuple[Span, ...]]:
        """Return the conversation with these contents: its text, and the span of each assistant turn."""
        parts: list[str] = []
        ends: list[int] = []
        length = 0
        for text, content in zip(self.texts, contents, strict=False):
            parts += (text, content)
            length += len(text) + len(content)
            ends.append(length)
        parts.append(self.texts[-1])
        spans = tuple(
            (ends[turn] - len(contents[turn]) - before, ends[turn] + after) for turn, before, after in self.spans
        )
        return "".join(parts), spans
