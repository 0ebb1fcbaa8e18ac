"""Line charts as inline SVG. Points are thinned without losing spikes, and values can be read without a script."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from markupsafe import Markup

from raysft.report.plots import smooth

MAX_DOTS = 40
"""Largest number of points that are drawn as dots."""
TOOLTIP_COLUMNS = 80
"""Number of columns with a tooltip."""
LEFT, RIGHT, TOP, BOTTOM = 52, 18, 10, 34
"""Margins of a chart. The labels of the axes are in the left and bottom ones."""


@dataclass(frozen=True)
class Line:
    """One curve: [points] steps and finite values."""

    label: str
    steps: Sequence[int]
    values: Sequence[float]
    color: int = 0
    """Index of one of the page's colors."""
    noisy: bool = False
    """Draw the values light and a smoothed curve bold."""
    raw: bool = True
    """Draw the values of a noisy line, too, not only its smoothed curve."""
    style: str = ""
    """CSS classes of the curve. A ``thin`` one has no dots."""


@dataclass(frozen=True)
class Chart:
    """Lines over the same steps."""

    title: str
    lines: list[Line]
    missing: Sequence[int] = ()
    """Steps whose value is not finite."""
    from_zero: bool = False
    width: int = 440
    height: int = 240
    tooltips: bool = True
    highest: float | None = None
    """Cut the axis off above this value."""


def thin(steps: np.ndarray, values: np.ndarray, columns: int) -> tuple[np.ndarray, np.ndarray]:
    """Keep the lowest and the highest point of each column, so that the curve looks as if all points were drawn.

    Args:
        steps: [points] increasing.
        values: [points] finite.
        columns: number of pixel columns.

    >>> thin(np.arange(1000), np.eye(1, 1000, 7)[0], columns=10)[1].max()
    np.float64(1.0)
    """
    if len(steps) <= 2 * columns:
        return steps, values
    kept: list[int] = []
    for part in _parts(steps, columns):
        low, high = part[0] + int(values[part].argmin()), part[0] + int(values[part].argmax())
        kept += sorted({low, high})
    return steps[kept], values[kept]


def _parts(steps: np.ndarray, columns: int) -> list[np.ndarray]:
    """Indices of the points in each column that is not empty."""
    edges = np.linspace(float(steps[0]), float(steps[-1]) + 1e-9, columns + 1)[1:-1]
    return [part for part in np.split(np.arange(len(steps)), np.searchsorted(steps, edges)) if len(part)]


def ticks(low: float, high: float, count: int) -> list[float]:
    """Round numbers between two values.

    >>> ticks(0.3, 2.2, 5), ticks(0, 33, 6)
    ([0.5, 1.0, 1.5, 2.0], [0.0, 5.0, 10.0, 15.0, 20.0, 25.0, 30.0])
    """
    raw = (high - low) / max(1, count) or 1.0
    power = 10.0 ** math.floor(math.log10(raw))
    width = next(step * power for step in (1, 2, 2.5, 5, 10) if step * power >= raw * 0.8)
    first, last = math.ceil(low / width - 1e-9), math.floor(high / width + 1e-9)
    return [float(f"{index * width:.12g}") for index in range(first, last + 1)]


def number_text(value: float) -> str:
    """A number on an axis or in a tooltip.

    >>> [number_text(value) for value in (41234, 1500000, 0.00002, 2.34567, 1234.5)]
    ['41.2k', '1.5M', '2e-05', '2.346', '1,234']
    """
    for size, letter in ((1e9, "G"), (1e6, "M"), (1e4, "k")):
        if abs(value) >= size:
            return f"{value / (size if letter != 'k' else 1e3):.3g}{letter}"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


class Drawing:
    """A chart with its axes, computed from its values."""

    def __init__(self, chart: Chart) -> None:
        self.chart = chart
        self.lines = [
            (line, np.array(line.steps, dtype=np.int64), np.array(line.values, dtype=float)) for line in chart.lines
        ]
        all_steps = np.concatenate([steps for _, steps, _ in self.lines] + [np.array(chart.missing, dtype=np.int64)])
        self.first, self.last = int(all_steps.min()), int(all_steps.max())
        if self.first == self.last:
            self.first, self.last = self.first - 1, self.last + 1
        self.columns = chart.width - LEFT - RIGHT
        self.smoothed = {index: self._smooth(index) for index, (line, _, _) in enumerate(self.lines) if line.noisy}
        self.low, self.high = self._range()

    def svg(self) -> Markup:
        """The chart as SVG. Its text has its nominal size if the chart is drawn at its nominal width."""
        chart = self.chart
        parts = [self._axes()]
        for index in range(len(self.lines)):
            parts.append(self._line(index))
        parts += [self._beyond(), self._missing(), *([self._tooltips()] if chart.tooltips else [])]
        return Markup('<svg viewBox="0 0 {} {}" role="img" aria-label="{}">{}</svg>').format(
            chart.width, chart.height, chart.title, Markup("").join(parts)
        )

    def note(self) -> str:
        """A sentence about values that the curves cannot show."""
        above = np.concatenate([values[values > self.high] for _, _, values in self.lines] or [np.zeros(0)])
        missing, notes = sorted(self.chart.missing), []
        if len(above):
            notes.append(f"▲ above the axis: {_count(len(above), 'step')}, up to {number_text(float(above.max()))}")
        if missing:
            notes.append(f"not finite: {_count(len(missing), 'step')}, first step {missing[0]:,}")
        return "; ".join(notes)

    def _x(self, step: float) -> float:
        return LEFT + self.columns * (step - self.first) / (self.last - self.first)

    def _y(self, value: float) -> float:
        height = self.chart.height - TOP - BOTTOM
        return TOP + height * (1 - (min(value, self.high) - self.low) / (self.high - self.low))

    def _smooth(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        """The smoothed curve, from the means of two-pixel columns. Single spikes are capped, otherwise they would become hills."""
        _, steps, values = self.lines[index]
        capped = np.minimum(values, 3 * np.percentile(values, 99)) if len(values) and values.min() >= 0 else values
        parts = _parts(steps, self.columns // 2) if len(steps) else []
        x, y = (np.array([array[part].mean() for part in parts]) for array in (steps, capped))
        return (x, smooth(y)) if len(x) > 2 else (x, y)

    def _range(self) -> tuple[float, float]:
        """Lowest and highest value on the axis. Values far above the smoothed curves are cut off."""
        lows, highs = [0.0] if self.chart.from_zero else [], []
        for index, (_, _, values) in enumerate(self.lines):
            if not len(values):
                continue
            lows.append(float(values.min()))
            highest = float(values.max())
            usual = float(self.smoothed[index][1].max()) if index in self.smoothed else 0.0
            highs.append(1.5 * usual if 0 < 3 * usual < highest else highest)
        low, high = min(lows, default=0.0), max(highs, default=1.0)
        high = max(low, min(high, self.chart.highest)) if self.chart.highest is not None else high
        span = (high - low) or abs(high) or 1.0
        return low if self.chart.from_zero and low >= 0 else low - 0.06 * span, high + 0.06 * span

    def _axes(self) -> Markup:
        chart, bottom = self.chart, self.chart.height - BOTTOM
        parts = [
            Markup('<path class="grid" d="M{} {:.1f}H{}"/><text class="y" x="{}" y="{:.1f}">{}</text>').format(
                LEFT, self._y(value), chart.width - RIGHT, LEFT - 6, self._y(value) + 4, number_text(value)
            )
            for value in ticks(self.low, self.high, max(3, (chart.height - TOP - BOTTOM) // 34))
        ]
        marks = [step for step in ticks(self.first, self.last, max(3, self.columns // 75)) if step == int(step)]
        for step in marks:
            parts.append(
                Markup('<path class="axis" d="M{0:.1f} {1}v4"/><text class="x" x="{0:.1f}" y="{2}">{3}</text>').format(
                    self._x(step), bottom, bottom + 17, number_text(step)
                )
            )
        parts.append(Markup('<path class="axis" d="M{} {}H{}"/>').format(LEFT, bottom, chart.width - RIGHT))
        middle = LEFT + self.columns / 2
        parts.append(Markup('<text class="x" x="{}" y="{}">step</text>').format(middle, chart.height - 3))
        return Markup("").join(parts)

    def _line(self, index: int) -> Markup:
        line, steps, values = self.lines[index]
        color = f"c{line.color % 6}"
        if line.noisy and not line.raw:
            return self._curve(line, *self.smoothed[index])
        few = len(steps) <= MAX_DOTS and ("thin" not in line.style or len(steps) == 1)
        x, y = thin(steps, values, self.columns)
        raw = (
            Markup('<path class="raw {}" d="{}"/>').format(color, self._path(x, y))
            if line.noisy
            else self._curve(line, x, y)
        )
        dots = (
            Markup("").join(
                Markup('<circle class="{}" cx="{:.1f}" cy="{:.1f}" r="{}"/>').format(
                    f"{color} faint" if line.noisy and len(x) > 2 else f"{color} {line.style}".rstrip(),
                    self._x(step),
                    self._y(value),
                    2.6,
                )
                for step, value in zip(x, y, strict=True)
                if value <= self.high
            )
            if few
            else ""
        )
        if index not in self.smoothed:
            return raw + dots
        return raw + dots + self._curve(line, *self.smoothed[index])

    def _curve(self, line: Line, x: np.ndarray, y: np.ndarray) -> Markup:
        classes = f"line c{line.color % 6} {line.style}".rstrip()
        return Markup('<path class="{}" d="{}"/>').format(classes, self._path(x, y))

    def _path(self, x: np.ndarray, y: np.ndarray) -> str:
        points = [f"{self._x(step):.1f} {self._y(value):.1f}" for step, value in zip(x, y, strict=True)]
        return "M" + "L".join(points) if points else ""

    def _beyond(self) -> Markup:
        """Marks at the upper edge for values above the axis."""
        parts = []
        for _, steps, values in self.lines:
            above = values > self.high
            if above.any():
                for step, value in zip(*thin(steps[above], values[above], self.columns // 8), strict=True):
                    parts.append(
                        Markup('<path class="beyond" d="M{:.1f} {}l-4 7h8z"><title>{}</title></path>').format(
                            self._x(step), TOP - 8, f"step {step:,}: {number_text(value)}, above the axis"
                        )
                    )
        return Markup("").join(parts)

    def _missing(self) -> Markup:
        """Marks at the lower edge for steps whose value is not finite."""
        steps = np.array(self.chart.missing, dtype=np.int64)
        steps, _ = thin(steps, np.zeros(len(steps)), self.columns // 4) if len(steps) else (steps, steps)
        bottom = self.chart.height - BOTTOM
        return Markup("").join(
            Markup('<path class="missing" d="M{:.1f} {}v-9"><title>step {}: not finite</title></path>').format(
                self._x(step), bottom, f"{step:,}"
            )
            for step in steps
        )

    def _tooltips(self) -> Markup:
        """Invisible columns with their values as tooltips."""
        width, parts = (self.last - self.first) / TOOLTIP_COLUMNS, []
        for column in range(TOOLTIP_COLUMNS):
            start, end = self.first + column * width, self.first + (column + 1) * width
            texts = [
                text for line in self.lines if (text := _tooltip(*line, start, end + (column == TOOLTIP_COLUMNS - 1)))
            ]
            if texts:
                parts.append(
                    Markup('<rect x="{:.1f}" y="{}" width="{:.1f}" height="{}"><title>{}</title></rect>').format(
                        self._x(start),
                        TOP,
                        self.columns / TOOLTIP_COLUMNS,
                        self.chart.height - TOP - BOTTOM,
                        "\n".join(texts),
                    )
                )
        return Markup('<g class="point">{}</g>').format(Markup("").join(parts))


def _count(number: int, noun: str) -> str:
    return f"{number:,} {noun}{'s' * (number != 1)}"


def _tooltip(line: Line, steps: np.ndarray, values: np.ndarray, start: float, end: float) -> str:
    """Values of a line in a range of steps, as text.

    >>> _tooltip(Line("loss", [], []), np.array([1, 2]), np.array([2.0, 1.0]), 1, 3)
    'steps 1–2: loss 1.5 (1 to 2)'
    """
    low, high = np.searchsorted(steps, [start, end])
    if low == high:
        return ""
    inside, label = values[low:high], line.label
    if high - low == 1:
        return f"step {steps[low]:,}: {label} {number_text(float(inside[0]))}"
    span = f"{number_text(float(inside.min()))} to {number_text(float(inside.max()))}"
    return f"steps {steps[low]:,}–{steps[high - 1]:,}: {label} {number_text(float(inside.mean()))} ({span})"
