"""Placement groups of trials whose process died: nobody else removes them, and they hold CPUs and GPUs until the sweep ends.

Ray removes a placement group when the actor that made it and the job are both dead. The workers of a trial die with its process.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any

import ray
import ray.tune
from ray.util.placement_group import PlacementGroup, placement_group_table, remove_placement_group

LOOK_SECONDS = 2.0
"""Time between two looks at the groups."""
EMPTY_SECONDS = 10.0
"""How long a group must be empty: one that was just made is empty, too, until its workers are placed."""
WATCH_SECONDS = 300.0
"""How long after a trial's failure there may be such groups; Ray may notice late that a node is dead."""


class AbandonedGroups(ray.tune.Callback):
    """After a trial has failed, removes the placement groups of this sweep that are empty and stay empty."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._watch_until = self._next_look = float("-inf")
        self._empty_since: dict[str, float] = {}

    def on_trial_recover(self, iteration: int, trials: Any, trial: Any, **info: Any) -> None:
        """A trial has failed, and starts again."""
        self._watch_until = self._clock() + WATCH_SECONDS

    on_trial_error = on_trial_recover

    def on_step_end(self, iteration: int, trials: Any, **info: Any) -> None:
        """Look at the groups, if it is time to; Tune calls this several times a second."""
        now = self._clock()
        if now > self._watch_until or now < self._next_look:
            return
        self._next_look = now + LOOK_SECONDS
        empty = empty_groups(ray.get_runtime_context().get_job_id(), ray.cluster_resources(), ray.available_resources())
        self._empty_since = {name: self._empty_since.get(name, now) for name in empty}
        for name, since in self._empty_since.items():
            if now - since >= EMPTY_SECONDS:
                remove_placement_group(PlacementGroup(ray.PlacementGroupID.from_hex(name)))


def empty_groups(job: str, total: Mapping[str, float], free: Mapping[str, float]) -> list[str]:
    """Return the placement groups of a job in which nothing runs.

    Args:
        job: id of the job, which the ids of its placement groups end with.
        total: the cluster's resources; those that a placement group reserves have its id in their names.
        free: those of them that nothing uses.
    """
    return [
        name
        for name, group in placement_group_table().items()
        if group["state"] == "CREATED"
        and name.endswith(job)
        and free.get(f"bundle_group_{name}") == total.get(f"bundle_group_{name}")
    ]
