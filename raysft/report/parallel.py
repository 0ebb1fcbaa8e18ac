"""Parallel coordinates as inline SVG: each configuration is a line over an axis for each setting and one for the result."""

from __future__ import annotations

from collections.abc import Sequence

from markupsafe import Markup

from raysft.report.axes import Axis
from raysft.report.sweep import Configuration, Sweep
from raysft.report.sweep_charts import MANY_CURVES, summary_of
from raysft.report.text import shortened, visible

SHADES = 5
"""Number of shades that lines have by their rank."""
MAX_AXES = 12
"""Number of settings that are drawn, in the order of ``tune.space``."""
WIDTH, HEIGHT = 940, 340
_LEFT, _RIGHT, _TOP, _BOTTOM = 70, 70, 30, 26


def parallel(sweep: Sweep, configurations: Sequence[Configuration]) -> Markup | None:
    """The drawing; None with fewer than two configurations or without a setting that varies.

    Lines are drawn from the worst to the best, the best one in its own color.
    """
    keys = [
        key for key in sweep.keys if len({repr(one.values[key]) for one in configurations if key in one.values}) > 1
    ][:MAX_AXES]
    if not keys or len(configurations) < 2:
        return None
    metric, lowest = sweep.objectives[0]
    few = " few" if len(configurations) <= MANY_CURVES else ""
    axes = [sweep.axis(key) for key in keys]
    result = sweep.result_axis
    spacing = (WIDTH - _LEFT - _RIGHT) / len(keys)
    parts = []
    ranked = sorted(configurations, key=lambda one: one.means[0], reverse=lowest)
    for rank, one in enumerate(ranked):
        places = [
            axis.place(one.values[key]) if key in one.values else None for key, axis in zip(keys, axes, strict=True)
        ]
        shade = min(SHADES - 1, SHADES * rank // len(ranked))
        classes = "line c1 top" if one is sweep.configurations[0] else f"line shade{shade}{few}"
        points = [
            f"{_LEFT + number * spacing:.1f} {_top(place):.1f}"
            for number, place in enumerate([*places, result.place(one.means[0])])
            if place is not None
        ]
        parts.append(
            Markup('<path class="{}" d="M{}"><title>{}</title></path>').format(
                classes, "L".join(points), summary_of(one, metric)
            )
        )
    for number, (name, axis) in enumerate(zip([*keys, metric], [*axes, result], strict=True)):
        parts.append(_axis(_LEFT + number * spacing, name, axis, spacing))
    return Markup('<svg viewBox="0 0 {} {}" role="img" aria-label="Parallel coordinates">{}</svg>').format(
        WIDTH, HEIGHT, Markup("").join(parts)
    )


def _top(place: float) -> float:
    return _TOP + (1 - place) * (HEIGHT - _TOP - _BOTTOM)


def _axis(left: float, name: str, axis: Axis, spacing: float) -> Markup:
    parts = [Markup('<path class="axis" d="M{:.1f} {}V{}"/>').format(left, _TOP, HEIGHT - _BOTTOM)]
    for place, text in axis.marks(5):
        parts.append(
            Markup(
                '<path class="axis" d="M{0:.1f} {1:.1f}h-4"/><text class="y halo" x="{2:.1f}" y="{3:.1f}">{4}</text>'
            ).format(left, _top(place), left - 7, _top(place) + 4, shortened(text, 14))
        )
    parts.append(
        Markup('<text class="x name" x="{:.1f}" y="{}">{}<title>{}</title></text>').format(
            left, 16, shortened(_short(name), max(8, int(spacing / 6.5))), visible(name)
        )
    )
    return Markup("").join(parts)


def _short(key: str) -> str:
    """The last part of a dotted key, which says most, with an index before it.

    >>> _short("train.learning_rate"), _short("data.train.0.weight")
    ('learning_rate', '0.weight')
    """
    parts = visible(key).split(".")
    return ".".join(parts[-2:]) if len(parts) > 2 and parts[-2].isdigit() else parts[-1]
