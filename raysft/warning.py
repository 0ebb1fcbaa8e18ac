"""What a person would otherwise find out only by looking at the result: one line for each, known before anything starts.

``check`` and ``run`` print the lines with the plan, and the report repeats them from ``plan.json``. A warning refuses nothing:
the run is possible, and perhaps not what is wanted. Each line is fact, value and remedy, and each function is one warning.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from raysft.config import Config

if TYPE_CHECKING:
    from raysft.plan import Plan


def warnings(config: Config, plan: Plan) -> Iterator[str]:
    """The lines for a run, most important first."""
    for warning in WARNINGS:
        yield from warning(config, plan)


def nothing_evaluated(config: Config, plan: Plan) -> Iterator[str]:
    """Without held-out examples nobody learns whether the model got better."""
    if not plan.evaluation:
        yield (
            "nothing is evaluated, so nothing will tell whether the model got better; hold some examples out with "
            "data.holdout=0.1, or name files in data.eval"
        )


WARNINGS: tuple[Callable[[Config, Plan], Iterator[str]], ...] = (nothing_evaluated,)
