"""Who went on from whose checkpoint in population-based training, as inline SVG."""

from __future__ import annotations

from collections import Counter

from markupsafe import Markup

from raysft.report.axes import Axis
from raysft.report.curves import number_text, ticks
from raysft.report.sweep import Sweep, Trial

MAX_ROWS = 80
"""Number of trials that are drawn: those that went on from others first, and those that others went on from."""
ARROWS, ARROW_GAP = 12, 4
"""Number of arrows of one step that stand next to each other, and the distance between them."""
WIDTH = 940
_LEFT, _RIGHT, _TOP, _BOTTOM = 70, 20, 8, 34


def lineage(sweep: Sweep) -> Markup | None:
    """A row for each trial up to the step that it reached, and an arrow for each checkpoint that another went on from.

    Returns:
        None if no trial went on from another.
    """
    if not any(trial.parents for trial in sweep.trials):
        return None
    rows = _rows(sweep)
    last = max([trial.step or 0 for trial in rows] + [step for trial in rows for _, step in trial.parents] + [1])
    height = max(8, min(22, 600 // len(rows)))
    bottom = _TOP + height * len(rows)
    axis, tops = Axis(0, last), {trial.name: _TOP + height * (place + 0.5) for place, trial in enumerate(rows)}
    best = sweep.configurations[0].trials[0].name if sweep.configurations else ""

    def left(step: float) -> float:
        return _LEFT + axis.place(step) * (WIDTH - _LEFT - _RIGHT)

    parts = []
    for step in ticks(0, last, 10):
        parts.append(
            Markup('<path class="grid" d="M{0:.1f} {1}V{2}"/><text class="x" x="{0:.1f}" y="{3}">{4}</text>').format(
                left(step), _TOP, bottom, bottom + 15, number_text(step)
            )
        )
    every = max(1, 14 // height + 1) if height < 14 else 1
    for place, trial in enumerate(rows):
        top, style = tops[trial.name], "c1" if trial.name == best else "c0"
        parts.append(
            Markup('<path class="line {}" d="M{:.1f} {:.1f}H{:.1f}"/>').format(
                style, left(0), top, left(trial.step or 0)
            )
        )
        if place % every == 0:
            parts.append(
                Markup('<text class="y" x="{}" y="{:.1f}">trial {}</text>').format(_LEFT - 8, top + 4, trial.number)
            )
    at_step: Counter[int] = Counter()
    for trial in rows:
        for name, step in trial.parents:
            if name in tops:
                # Many trials continue at the same step: their arrows stand next to each other.
                beside = ARROW_GAP * (at_step[step] % ARROWS)
                at_step[step] += 1
                text = _sentence(sweep, trial, name, step)
                parts.append(_arrow(left(step) + beside, tops[name], tops[trial.name], text))
    parts.append(Markup('<text class="x" x="{}" y="{}">step</text>').format((_LEFT + WIDTH - _RIGHT) / 2, bottom + 30))
    return Markup('<svg viewBox="0 0 {} {}" role="img" aria-label="Lineage">{}</svg>').format(
        WIDTH, bottom + _BOTTOM, Markup("").join(parts)
    )


def events(sweep: Sweep) -> list[str]:
    """Each time that a trial went on from another, by step."""
    found = [(step, trial, name) for trial in sweep.trials for name, step in trial.parents]
    found.sort(key=lambda event: (event[0], event[1].number))
    return [_sentence(sweep, trial, name, step) for step, trial, name in found]


def _rows(sweep: Sweep) -> list[Trial]:
    parents = {name for trial in sweep.trials for name, _ in trial.parents}
    involved = sorted(sweep.trials, key=lambda trial: not (trial.parents or trial.name in parents))[:MAX_ROWS]
    return sorted(involved, key=lambda trial: trial.number)


def _arrow(left: float, start: float, end: float, text: str) -> Markup:
    """An arrow from one row to another at a step."""
    tip = 5 if end > start else -5
    return Markup(
        '<path class="line thin c2" d="M{0:.1f} {1:.1f}V{2:.1f}m-3 {3}l3 {4}l3 {3}"><title>{5}</title></path>'
    ).format(left, start, end, -tip, tip, text)


def _sentence(sweep: Sweep, trial: Trial, parent: str, step: int) -> str:
    number = next((f"trial {other.number}" for other in sweep.trials if other.name == parent), parent)
    return f"step {step:,}: trial {trial.number} continued from {number}"
