"""The plots of a run: raw values light, smoothed curves bold, in a palette for color-blind readers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from raysft.report.matplotlib_agg import Axes, Figure, FigureCanvasAgg, FuncFormatter, MaxNLocator, mpl
from raysft.report.read_run import RunLog, series
from raysft.storage.path import StoragePath

# Okabe and Ito's palette.
BLUE, VERMILION, GREEN, PURPLE, ORANGE, SKY = "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9"
_MARKERS = "sD^vPX"

MAX_POINTS = 2000
"""Number of points that fit into the width of a plot. Of longer runs, the mean and the extremes of as many bins are drawn."""
WIDTH, LEFT, RIGHT, TOP, BOTTOM = 9, 1.05, 0.12, 0.5, 0.6
"""Inches of a figure and its margins, with room for the widest labels: to measure them takes longer than to draw."""
MAX_MARKS = 30
"""Largest number of points that are drawn with a mark."""

_STYLE: dict[Any, Any] = {
    "axes.edgecolor": "#888888",
    "axes.grid": True,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlelocation": "left",
    "axes.titlesize": 13,
    "axes.titleweight": "bold",
    "axes.titley": 1.0,
    "axes.xmargin": 0.02,
    "figure.dpi": 150,
    "font.size": 11,
    "grid.color": "#dddddd",
    "grid.linewidth": 0.8,
    "legend.fontsize": 10,
    "legend.framealpha": 0.9,
    "legend.edgecolor": "#dddddd",
}


def draw(log: RunLog) -> list[Path]:
    """Draw all plots that have data.

    Returns:
        The files written.
    """
    with mpl.rc_context(_STYLE):
        sets = log.evaluation_sets
        plots = {
            "training_loss.png": _training_loss(log),
            "training_eval_loss.png": _evaluation(log, "loss", sets),
            "training_eval_accuracy.png": _evaluation(log, "accuracy", sets),
            "training_throughput.png": _panels(
                log,
                "Throughput",
                [("throughput", "tokens/s, no padding", BLUE), ("packing_efficiency", "row capacity in use, %", GREEN)],
            ),
            "training_grad_norm.png": _panels(
                log,
                "Gradient norm and learning rate",
                [("grad_norm", "gradient norm", PURPLE), ("lr", "learning rate", BLUE)],
            ),
        }
        plots |= {f"training_eval_{name}_loss.png": _evaluation(log, f"{name}_loss", []) for name in sets}
        paths = []
        for name, figure in plots.items():
            if figure is not None:
                paths.append(log.directory.path / name)
                _save(figure, paths[-1])
    return paths


def smooth(values: np.ndarray) -> np.ndarray:
    """Smooth values by a centred Gaussian over a sixtieth of them, at least over neighbours. It does not lag.

    Args:
        values: [points] finite values, equally spaced.

    Returns:
        [points] smoothed values; near the ends, the mean is over the values that exist.

    >>> smooth(np.array([1.0, 1.0, 1.0])).tolist()
    [1.0, 1.0, 1.0]
    """
    sigma = max(1.0, len(values) / 60)
    reach = min(int(3 * sigma), len(values) - 1)
    kernel = np.exp(-0.5 * (np.arange(-reach, reach + 1) / sigma) ** 2)
    inside = slice(reach, reach + len(values))
    return np.convolve(values, kernel)[inside] / np.convolve(np.ones(len(values)), kernel)[inside]


def _training_loss(log: RunLog) -> Figure | None:
    """Training loss by step, and evaluation losses on the same axes."""
    if not series(log.steps, "loss")[0]:
        return None
    figure, (axes,) = _figure(f"Training loss: {log.name}")
    highest = _draw_smoothed(axes, *series(log.steps, "loss"), color=BLUE, label="training")
    steps, values = series(log.evaluations, "eval_loss")
    if steps:
        axes.plot(steps, values, color=VERMILION, linewidth=1.6, label="evaluation", zorder=4, **_marks(steps))
        highest = max(highest, *values)
    _cut_spikes(axes, highest, [record.get("loss") for record in log.steps])
    axes.set_ylabel("loss (nats per token)")
    axes.legend(loc="upper right")
    return figure


def _evaluation(log: RunLog, key: str, sets: list[str]) -> Figure | None:
    """One result of the evaluations by step, over all sets and, if there are several, for each of them."""
    steps, values = series(log.evaluations, f"eval_{key}")
    if not steps:
        return None
    set_name = key.removesuffix("_loss") if key not in ("loss", "accuracy") else ""
    measure = "accuracy" if key == "accuracy" else "loss"
    scale = 100 if measure == "accuracy" else 1
    figure, (axes,) = _figure(f"Evaluation {measure}{f' on {set_name}' if set_name else ''}: {log.name}")
    for position, name in enumerate(sets):
        at, points = series(log.evaluations, f"eval_{name}_{key}")
        color = (BLUE, ORANGE, GREEN, PURPLE, SKY)[position % 5]
        marks = _marks(at, _MARKERS[position % len(_MARKERS)])
        axes.plot(at, scale * np.array(points), color=color, linewidth=1.4, label=name, **marks)
    label = "all sets" if sets else None
    axes.plot(steps, scale * np.array(values), color=VERMILION, linewidth=2.4, label=label, zorder=4, **_marks(steps))
    axes.set_ylabel("accuracy (% of loss tokens)" if measure == "accuracy" else "loss (nats per token)")
    if log.best:
        step, metric, _ = log.best
        axes.axvline(step, color="#888888", linewidth=1.4, linestyle="--", label=f"best {metric}: step {step:,}")
    if sets or log.best:
        axes.legend(loc="best")
    return figure


def _panels(log: RunLog, title: str, panels: list[tuple[str, str, str]]) -> Figure | None:
    """Several keys, in panels above each other over the same steps."""
    present = [panel for panel in panels if series(log.steps, panel[0])[0]]
    if not present:
        return None
    figure, rows = _figure(f"{title}: {log.name}", len(present))
    for axes, (key, label, color) in zip(rows, present, strict=True):
        steps, values = series(log.steps, key)
        axes.set_ylabel(label)
        if key == "lr":
            axes.plot(steps, values, color=color, linewidth=2, **_marks(steps))
            axes.yaxis.set_major_formatter(FuncFormatter(_plain))
            axes.set_ylim(bottom=0)
            continue
        scale = 100 if key == "packing_efficiency" else 1
        highest = _draw_smoothed(axes, steps, [scale * value for value in values], color=color, label=None)
        if key == "packing_efficiency":
            axes.set_ylim(0, 105)
        else:
            axes.yaxis.set_major_formatter(FuncFormatter(_plain))
            _cut_spikes(axes, highest, [record.get(key) for record in log.steps])
            axes.set_ylim(bottom=0)
    return figure


def _figure(title: str, rows: int = 1) -> tuple[Figure, list[Axes]]:
    """An empty figure with panels that share the axis of the steps."""
    height = 5 if rows == 1 else 3.2 * rows
    figure = Figure(figsize=(WIDTH, height))
    FigureCanvasAgg(figure)
    panels = list(figure.subplots(rows, 1, sharex=True, squeeze=False)[:, 0])
    figure.subplots_adjust(
        left=LEFT / WIDTH, right=1 - RIGHT / WIDTH, top=1 - TOP / height, bottom=BOTTOM / height, hspace=0.15
    )
    panels[0].set_title(title if len(title) <= 80 else title[:79] + "…", pad=12)
    panels[-1].set_xlabel("step")
    panels[-1].xaxis.set_major_locator(MaxNLocator(integer=True, nbins=10, steps=[1, 2, 5, 10]))
    panels[-1].xaxis.set_major_formatter(FuncFormatter(_plain))
    return figure, panels


def _draw_smoothed(axes: Axes, steps: list[int], values: list[float], *, color: str, label: str | None) -> float:
    """Draw raw values light and a smoothed curve bold.

    Returns:
        The highest value that the axis must show: the highest of all, unless that is far above the smoothed curve.
    """
    x, y = np.array(steps, dtype=float), np.array(values)
    highest = float(y.max())
    # Single spikes are capped: smoothing would turn them into hills.
    capped = np.minimum(y, 3 * np.percentile(y, 99))
    if len(y) > MAX_POINTS:
        bins = np.array_split(np.arange(len(y)), MAX_POINTS)
        low, high = (np.array([pick(y[part]) for part in bins]) for pick in (np.min, np.max))
        x, capped = (np.array([numbers[part].mean() for part in bins]) for numbers in (x, capped))
        axes.fill_between(x, low, high, color=color, alpha=0.25, linewidth=0)
    else:
        axes.plot(x, y, color=color, alpha=0.35, linewidth=1, **_marks(steps, size=4))
    smoothed = smooth(capped)
    axes.plot(
        x, smoothed, color=color, linewidth=2.4, label=label, zorder=3, **(_marks(steps, size=9) if len(x) < 2 else {})
    )
    usual = float(smoothed.max())
    return highest if highest <= 3 * usual or usual <= 0 else 1.5 * usual


def _marks(steps: list[int], marker: str = "o", size: int = 6) -> dict[str, Any]:
    """Style of the marks on a curve; none if it has many points."""
    return {"marker": marker, "markersize": size} if len(steps) <= MAX_MARKS else {}


def _cut_spikes(axes: Axes, highest: float, values: list[object]) -> None:
    """Cut the axis off above ``highest``, with a note about values above it and values that are not finite."""
    numbers = np.array([value if isinstance(value, int | float) else np.nan for value in values], dtype=float)
    beyond = int(np.sum(np.isfinite(numbers) & (numbers > highest)))
    broken = int(np.sum(~np.isfinite(numbers)))
    notes = []
    if beyond:
        lowest = axes.dataLim.ymin
        margin = 0.05 * (highest - lowest)
        axes.set_ylim(max(axes.get_ylim()[0], lowest - margin), highest + margin)
        notes.append(f"steps above the axis: {beyond} (up to {numbers[np.isfinite(numbers)].max():.3g})")
    if broken:
        notes.append(f"not finite: {broken}")
    if notes:
        box = {"facecolor": "white", "edgecolor": "none", "alpha": 0.9, "pad": 2}
        axes.text(0.01, 0.03, "; ".join(notes), transform=axes.transAxes, fontsize=10, color="#333333", bbox=box)


def _plain(value: float, _: object = None) -> str:
    """A tick label.

    >>> _plain(20000.0), _plain(0.5)
    ('20,000', '0.5')
    """
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:g}"


def _save(figure: Figure, path: Path) -> None:
    """Write a PNG atomically."""
    StoragePath.of(path).write(lambda stream: figure.savefig(stream, format="png"))
