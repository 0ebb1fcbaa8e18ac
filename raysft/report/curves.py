"""Curves as SVG inside the page: thinned so that no spike is lost, readable without a script."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from markupsafe import Markup

from raysft.report.plots import smooth

FEW = 40
"""Up to as many points get a mark each."""
COLUMNS_OF_TITLES = 80
"""Parts of the width that say their values when pointed at."""
LEFT, RIGHT, TOP, BOTTOM = 52, 18, 10, 34
"""Margins of a chart; at the left and at the bottom stand the figures of its axes."""


@dataclass(frozen=True)
class Line:
    """One curve: [points] steps and finite values."""

    label: str
    steps: Sequence[int]
    values: Sequence[float]
    colour: int = 0
    """Which of the page's colours."""
    noisy: bool = False
    """Draw the values light and their smoothed course bold."""


@dataclass(frozen=True)
class Chart:
    """Curves over the same steps."""

    title: str
    lines: list[Line]
    missing: Sequence[int] = ()
    """Steps whose value is not finite."""
    from_zero: bool = False
    width: int = 440
    height: int = 240


def thin(steps: np.ndarray, values: np.ndarray, columns: int) -> tuple[np.ndarray, np.ndarray]:
    """The lowest and the highest point of each column, in the order of the steps: what a curve of all points looks like.

    Args:
        steps: [points] increasing.
        values: [points] finite.
        columns: of pixels.

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
    """Indices of the points in each column that has any."""
    edges = np.linspace(float(steps[0]), float(steps[-1]) + 1e-9, columns + 1)[1:-1]
    return [part for part in np.split(np.arange(len(steps)), np.searchsorted(steps, edges)) if len(part)]


def ticks(low: float, high: float, count: int) -> list[float]:
    """Round figures between two values.

    >>> ticks(0.3, 2.2, 5), ticks(0, 33, 6)
    ([0.5, 1.0, 1.5, 2.0], [0.0, 5.0, 10.0, 15.0, 20.0, 25.0, 30.0])
    """
    raw = (high - low) / max(1, count) or 1.0
    power = 10.0 ** math.floor(math.log10(raw))
    width = next(step * power for step in (1, 2, 2.5, 5, 10) if step * power >= raw * 0.8)
    first, last = math.ceil(low / width - 1e-9), math.floor(high / width + 1e-9)
    return [float(f"{index * width:.12g}") for index in range(first, last + 1)]


def figure(value: float) -> str:
    """A number at an axis or in a title.

    >>> figure(41234), figure(1500000), figure(0.00002), figure(2.34567), figure(1234.5)
    ('41.2k', '1.5M', '2e-05', '2.346', '1,234')
    """
    for size, letter in ((1e9, "G"), (1e6, "M"), (1e4, "k")):
        if abs(value) >= size:
            return f"{value / (size if letter != 'k' else 1e3):.3g}{letter}"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


class Drawing:
    """A chart as it is drawn: what its axes show follows from its values."""

    def __init__(self, chart: Chart) -> None:
        self.chart = chart
        self.lines = [
            (line, np.array(line.steps, dtype=np.int64), np.array(line.values, dtype=float)) for line in chart.lines
        ]
        every = np.concatenate([steps for _, steps, _ in self.lines] + [np.array(chart.missing, dtype=np.int64)])
        self.first, self.last = int(every.min()), int(every.max())
        if self.first == self.last:
            self.first, self.last = self.first - 1, self.last + 1
        self.columns = chart.width - LEFT - RIGHT
        self.courses = {place: self._course(place) for place, (line, _, _) in enumerate(self.lines) if line.noisy}
        self.low, self.high = self._range()

    def svg(self) -> Markup:
        """The chart; its text has the size that it says where the chart is as wide as it says."""
        chart = self.chart
        parts = [self._axes()]
        for place in range(len(self.lines)):
            parts.append(self._line(place))
        parts += [self._beyond(), self._missing(), self._titles()]
        return Markup('<svg viewBox="0 0 {} {}" role="img" aria-label="{}">{}</svg>').format(
            chart.width, chart.height, chart.title, Markup("").join(parts)
        )

    def note(self) -> str:
        """What the curves cannot show, in words."""
        above = np.concatenate([values[values > self.high] for _, _, values in self.lines] or [np.zeros(0)])
        missing, said = sorted(self.chart.missing), []
        if len(above):
            said.append(f"▲ above the axis: {_times(len(above), 'step')}, up to {figure(float(above.max()))}")
        if missing:
            said.append(f"not finite: {_times(len(missing), 'step')}, first step {missing[0]:,}")
        return "; ".join(said)

    def _x(self, step: float) -> float:
        return LEFT + self.columns * (step - self.first) / (self.last - self.first)

    def _y(self, value: float) -> float:
        room = self.chart.height - TOP - BOTTOM
        return TOP + room * (1 - (min(value, self.high) - self.low) / (self.high - self.low))

    def _course(self, place: int) -> tuple[np.ndarray, np.ndarray]:
        """The smoothed curve: of the mean of every second column, a single spike capped so that it does not become a hill."""
        _, steps, values = self.lines[place]
        capped = np.minimum(values, 3 * np.percentile(values, 99)) if len(values) and values.min() >= 0 else values
        parts = _parts(steps, self.columns // 2) if len(steps) else []
        x, y = (np.array([array[part].mean() for part in parts]) for array in (steps, capped))
        return (x, smooth(y)) if len(x) > 2 else (x, y)

    def _range(self) -> tuple[float, float]:
        """Lowest and highest value that the axis shows: it ends above the courses if single steps lie far beyond them."""
        lows, highs = [0.0] if self.chart.from_zero else [], []
        for place, (_, _, values) in enumerate(self.lines):
            if not len(values):
                continue
            lows.append(float(values.min()))
            highest, usual = float(values.max()), float(self.courses[place][1].max()) if place in self.courses else 0.0
            highs.append(1.5 * usual if 0 < 3 * usual < highest else highest)
        low, high = min(lows, default=0.0), max(highs, default=1.0)
        room = (high - low) or abs(high) or 1.0
        return low if self.chart.from_zero and low >= 0 else low - 0.06 * room, high + 0.06 * room

    def _axes(self) -> Markup:
        chart, bottom = self.chart, self.chart.height - BOTTOM
        parts = [
            Markup('<path class="grid" d="M{} {:.1f}H{}"/><text class="y" x="{}" y="{:.1f}">{}</text>').format(
                LEFT, self._y(value), chart.width - RIGHT, LEFT - 6, self._y(value) + 4, figure(value)
            )
            for value in ticks(self.low, self.high, max(3, (chart.height - TOP - BOTTOM) // 34))
        ]
        marks = [step for step in ticks(self.first, self.last, max(3, self.columns // 75)) if step == int(step)]
        for step in marks:
            parts.append(
                Markup('<path class="axis" d="M{0:.1f} {1}v4"/><text class="x" x="{0:.1f}" y="{2}">{3}</text>').format(
                    self._x(step), bottom, bottom + 17, figure(step)
                )
            )
        parts.append(Markup('<path class="axis" d="M{} {}H{}"/>').format(LEFT, bottom, chart.width - RIGHT))
        middle = LEFT + self.columns / 2
        parts.append(Markup('<text class="x" x="{}" y="{}">step</text>').format(middle, chart.height - 3))
        return Markup("").join(parts)

    def _line(self, place: int) -> Markup:
        line, steps, values = self.lines[place]
        colour, few = f"c{line.colour % 6}", len(steps) <= FEW
        x, y = thin(steps, values, self.columns)
        raw = Markup('<path class="{}" d="{}"/>').format(
            f"raw {colour}" if line.noisy else f"line {colour}", self._path(x, y)
        )
        dots = (
            Markup("").join(
                Markup('<circle class="{}" cx="{:.1f}" cy="{:.1f}" r="{}"/>').format(
                    f"{colour} faint" if line.noisy and len(x) > 2 else colour, self._x(step), self._y(value), 2.6
                )
                for step, value in zip(x, y, strict=True)
                if value <= self.high
            )
            if few
            else ""
        )
        if place not in self.courses:
            return raw + dots
        return raw + dots + Markup('<path class="line {}" d="{}"/>').format(colour, self._path(*self.courses[place]))

    def _path(self, x: np.ndarray, y: np.ndarray) -> str:
        points = [f"{self._x(step):.1f} {self._y(value):.1f}" for step, value in zip(x, y, strict=True)]
        return "M" + "L".join(points) if points else ""

    def _beyond(self) -> Markup:
        """A mark at the upper edge where the axis ends below a value."""
        parts = []
        for _, steps, values in self.lines:
            above = values > self.high
            if above.any():
                for step, value in zip(*thin(steps[above], values[above], self.columns // 8), strict=True):
                    parts.append(
                        Markup('<path class="beyond" d="M{:.1f} {}l-4 7h8z"><title>{}</title></path>').format(
                            self._x(step), TOP - 8, f"step {step:,}: {figure(value)}, above the axis"
                        )
                    )
        return Markup("").join(parts)

    def _missing(self) -> Markup:
        """A mark at the lower edge for every step whose value is not finite."""
        steps = np.array(self.chart.missing, dtype=np.int64)
        steps, _ = thin(steps, np.zeros(len(steps)), self.columns // 4) if len(steps) else (steps, steps)
        bottom = self.chart.height - BOTTOM
        return Markup("").join(
            Markup('<path class="missing" d="M{:.1f} {}v-9"><title>step {}: not finite</title></path>').format(
                self._x(step), bottom, f"{step:,}"
            )
            for step in steps
        )

    def _titles(self) -> Markup:
        """Columns that say their values when pointed at."""
        width, parts = (self.last - self.first) / COLUMNS_OF_TITLES, []
        for column in range(COLUMNS_OF_TITLES):
            start, end = self.first + column * width, self.first + (column + 1) * width
            says = [
                text for line in self.lines if (text := _said(*line, start, end + (column == COLUMNS_OF_TITLES - 1)))
            ]
            if says:
                parts.append(
                    Markup('<rect x="{:.1f}" y="{}" width="{:.1f}" height="{}"><title>{}</title></rect>').format(
                        self._x(start),
                        TOP,
                        self.columns / COLUMNS_OF_TITLES,
                        self.chart.height - TOP - BOTTOM,
                        "\n".join(says),
                    )
                )
        return Markup('<g class="point">{}</g>').format(Markup("").join(parts))


def _times(number: int, noun: str) -> str:
    return f"{number:,} {noun}{'s' * (number != 1)}"


def _said(line: Line, steps: np.ndarray, values: np.ndarray, start: float, end: float) -> str:
    """The values of a line in some steps, as text.

    >>> _said(Line("loss", [], []), np.array([1, 2]), np.array([2.0, 1.0]), 1, 3)
    'steps 1–2: loss 1.5 (1 to 2)'
    """
    low, high = np.searchsorted(steps, [start, end])
    if low == high:
        return ""
    inside, label = values[low:high], line.label
    if high - low == 1:
        return f"step {steps[low]:,}: {label} {figure(float(inside[0]))}"
    among = f"{figure(float(inside.min()))} to {figure(float(inside.max()))}"
    return f"steps {steps[low]:,}–{steps[high - 1]:,}: {label} {figure(float(inside.mean()))} ({among})"
