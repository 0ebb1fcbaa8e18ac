"""What a scheduler has seen in earlier calls of a sweep: trials are compared with those that ended then, too."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

NOBODY = SimpleNamespace(get_live_trials=list)
"""Tune's controller as a scheduler sees it while no trial runs."""


@dataclass(frozen=True)
class EarlierTrial:
    """A trial that has ended, as far as a scheduler looks at it."""

    trial_id: str


def replay(scheduler: Any, metric: str, ended: Collection[str], lines: Iterable[Mapping[str, Any]]) -> None:
    """Tell a scheduler the evaluations of trials that have ended, in their order; its decisions on them count no more.

    Args:
        scheduler: Ray Tune's scheduler, before the first trial of this call.
        metric: what it compares.
        ended: names of the trials.
        lines: the record of the sweep, from its beginning.
    """
    trials = {name: EarlierTrial(f"earlier {name}") for name in ended}
    seen: dict[str, int] = {}
    for line in lines:
        name, step = line["trial"], line.get("step")
        if name not in trials or step is None or metric not in line["metrics"]:
            continue
        result = {"step": step, metric: line["metrics"][metric]}
        if name not in seen:
            scheduler.on_trial_add(NOBODY, trials[name])
        if step > seen.get(name, 0) and line["state"] != "done":
            scheduler.on_trial_result(NOBODY, trials[name], result)
        if line["state"] == "done":
            scheduler.on_trial_complete(NOBODY, trials[name], result)
        seen[name] = step
