"""Scatter plots as inline SVG, with intervals, lines between points, and tooltips."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from markupsafe import Markup

from raysft.report.axes import Axis
from raysft.report.curves import BOTTOM, LEFT, RIGHT, TOP


@dataclass(frozen=True)
class Point:
    """One point."""

    x: Any
    y: float
    text: str
    """Tooltip."""
    style: str = "c0"
    """CSS classes."""
    spread: float | None = None
    """Half the length of its interval."""
    shift: float = 0.0
    """Share of the axis by which a point is shifted from its place, so that points of a category do not cover each other."""


@dataclass(frozen=True)
class Scatter:
    """Points on two axes."""

    title: str
    label: str
    """Of the horizontal axis."""
    x: Axis
    y: Axis
    points: Sequence[Point]
    steps: Sequence[tuple[Any, float]] = ()
    """Corners of a line of steps: each value holds up to the next one."""
    width: int = 440
    height: int = 240

    def svg(self) -> Markup:
        """The plot as SVG."""
        parts = [*self._axes(), *([self._steps()] if self.steps else []), *map(self._point, self.points)]
        return Markup('<svg viewBox="0 0 {} {}" role="img" aria-label="{}">{}</svg>').format(
            self.width, self.height, self.title, Markup("").join(parts)
        )

    @property
    def beyond(self) -> int:
        """Number of points beyond the vertical axis, which are drawn at its end."""
        return sum(self.y.beyond(point.y) for point in self.points)

    def _left(self, place: float) -> float:
        return LEFT + place * (self.width - LEFT - RIGHT)

    def _top(self, value: float) -> float:
        return TOP + (1 - self.y.place(value)) * (self.height - TOP - BOTTOM)

    def _axes(self) -> list[Markup]:
        bottom, right = self.height - BOTTOM, self.width - RIGHT
        parts = []
        for place, text in self.y.marks(max(3, (bottom - TOP) // 34)):
            top = TOP + (1 - place) * (bottom - TOP)
            parts.append(
                Markup('<path class="grid" d="M{} {:.1f}H{}"/><text class="y" x="{}" y="{:.1f}">{}</text>').format(
                    LEFT, top, right, LEFT - 6, top + 4, text
                )
            )
        marks = self.x.marks(max(3, (right - LEFT) // 75))
        room = max(4, (right - LEFT) // (7 * max(1, len(marks))))
        for place, text in marks:
            shown = text if len(text) <= room or not self.x.categories else f"{text[: room - 1]}…"
            parts.append(
                Markup(
                    '<path class="axis" d="M{0:.1f} {1}v4"/><text class="x" x="{0:.1f}" y="{2}">{3}<title>{4}</title></text>'
                ).format(self._left(place), bottom, bottom + 17, shown, text)
            )
        parts.append(Markup('<path class="axis" d="M{} {}H{}"/>').format(LEFT, bottom, right))
        middle = (LEFT + right) / 2
        parts.append(Markup('<text class="x" x="{}" y="{}">{}</text>').format(middle, self.height - 3, self.label))
        return parts

    def _steps(self) -> Markup:
        corners = [(self._left(self.x.place(x)), self._top(y)) for x, y in self.steps]
        path = f"M{corners[0][0]:.1f} {corners[0][1]:.1f}" + "".join(f"H{x:.1f}V{y:.1f}" for x, y in corners[1:])
        return Markup('<path class="line c1" d="{}"/>').format(path)

    def _point(self, point: Point) -> Markup:
        left, top = self._left(self.x.place(point.x) + point.shift), self._top(point.y)
        bar = Markup("")
        if point.spread:
            ends = self._top(point.y + point.spread), self._top(point.y - point.spread)
            bar = Markup('<path class="bar-line {}" d="M{:.1f} {:.1f}V{:.1f}"/>').format(point.style, left, *ends)
        if self.y.beyond(point.y):
            shape = Markup('<path class="beyond {}" d="M{:.1f} {:.1f}l-4 {}h8z">').format(
                point.style, left, top, 7 if point.y > self.y.high else -7
            )
            return shape + Markup("<title>{}</title></path>").format(point.text)
        return bar + Markup('<circle class="{}" cx="{:.1f}" cy="{:.1f}" r="3.2"><title>{}</title></circle>').format(
            point.style, left, top, point.text
        )
