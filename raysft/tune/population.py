"""Population-based training (Jaderberg et al. 2017) on a cluster that need not hold the whole population at a time."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from ray.tune.experiment import Trial
from ray.tune.schedulers import PopulationBasedTraining
from ray.tune.search import Searcher

from raysft.tune.record import TrialRecord
from raysft.tune.search import Search
from raysft.tune.trainable import PERTURBED


def members(search: Search, recorded: Mapping[str, TrialRecord]) -> dict[str, dict[str, Any]]:
    """Return what Tune is to have of each trial of a population, by its name: those that are furthest behind first.

    Args:
        search: hands out the trials.
        recorded: the record of an earlier call, by trial: a member continues with the values that it had last.
    """
    found: dict[str, dict[str, Any]] = {}
    while (member := search.suggest(f"member {len(found)}")) != Searcher.FINISHED:
        assert isinstance(member, dict)
        last = recorded.get(member["trial"])
        found[member["trial"]] = {**member, PERTURBED: last.values if last else json.loads(member["values"])}
    steps = {name: record.step or 0 for name, record in recorded.items()}
    return dict(sorted(found.items(), key=lambda member: steps.get(member[0], 0)))


class Population(PopulationBasedTraining):
    """Ray Tune's scheduler with a limit on the trials that train at a time.

    Tune starts whatever trial its CPUs are free for, and knows nothing of the workers that a trial starts. A sweep usually limits
    the trials that exist, but all members of a population must exist: they take turns, the one that is furthest behind first.
    """

    concurrent = 1
    """Trials that may train at a time."""
    members: Mapping[str, dict[str, Any]] = {}
    """As ``members`` returns them."""

    def on_trial_add(self, tune_controller: Any, trial: Trial) -> None:
        """Let a new trial wait until it is chosen; Tune would start it at once."""
        trial.set_config(dict(self.members[trial.config["trial"]]))
        super().on_trial_add(tune_controller, trial)
        trial.set_status(Trial.PAUSED)

    def on_trial_result(self, tune_controller: Any, trial: Trial, result: dict[str, Any]) -> str:
        """Decide on a trial. One that takes over another's values stays the trial that it is."""
        decision = super().on_trial_result(tune_controller, trial, result)
        for each in tune_controller.get_trials():
            own = self.members[str(each)]
            if each.config["trial"] != own["trial"]:
                values = {**json.loads(own["values"]), **each.config[PERTURBED]}
                each.set_config({**own, PERTURBED: each.config[PERTURBED], "values": json.dumps(values)})
        return decision

    def choose_trial_to_run(self, tune_controller: Any) -> Trial | None:
        """Return the waiting trial that is furthest behind, if there is a place for it."""
        started = sum(trial.status in (Trial.PENDING, Trial.RUNNING) for trial in tune_controller.get_trials())
        return super().choose_trial_to_run(tune_controller) if started < self.concurrent else None
