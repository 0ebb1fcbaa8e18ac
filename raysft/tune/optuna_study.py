"""Optuna's suggestions for a sweep, and what it is told of the trials."""

from __future__ import annotations

import importlib.util
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from raysft.config import Config
from raysft.errors import RequestError
from raysft.tune.ranking import Objectives, mean
from raysft.tune.record import TrialRecord
from raysft.tune.space import CHOICE, Dimension, dimensions
from raysft.tune.trials import Trial, make_trial, probes, repeats

TRIES = 100
"""Suggestions that Optuna is asked for until one makes a valid and new config; the second half of them is random."""


def check_installed() -> None:
    """Refuse a search by Optuna where it is not installed."""
    if importlib.util.find_spec("optuna") is None:
        raise RequestError(
            "tune.search=optuna needs the package optuna, which is not installed; pip install 'raysft[tune]', or set "
            "tune.search=random"
        )


@dataclass(frozen=True)
class Restored:
    """A configuration of an earlier call."""

    trial: Trial
    """Its first trial."""
    ended: bool
    """True if all its trials have ended."""
    values: tuple[float, ...] | None
    """Mean metrics of its trials; None if they have none."""


class OptunaStudy:
    """Gives configurations one after another. What it gives follows from the seed and what it was told before, so that a study
    that is restored continues as if it had not been interrupted."""

    def __init__(
        self,
        config: Config,
        restored: Sequence[Restored],
        accept: Callable[[Config], Any],
        notify: Callable[[str], None],
    ) -> None:
        """Make a study.

        Args:
            config: the sweep's config.
            restored: configurations of an earlier call, in their order.
            accept: raises RequestError for a config that is valid, but cannot run.
            notify: prints a line.
        """
        import optuna

        optuna.logging.set_verbosity(optuna.logging.ERROR)
        self._config, self._accept, self._notify = config, accept, notify
        self._space = dimensions(config)
        # Optuna knows the indices of choices, as they may be lists and mappings.
        self._choices = {
            key: [trial.values[key] for trial in trials] for key, trials in probes(config, self._space).items()
        }
        self._distributions = {dimension.key: _distribution(dimension) for dimension in self._space}
        self._objectives = Objectives.of(config.tune)
        self._study = optuna.create_study(
            directions=["minimize" if sign > 0 else "maximize" for sign in self._objectives.signs]
        )
        self._numbers: dict[str, int] = {}
        """Optuna's number by configuration."""
        self._asked = 0
        self._unfinished: list[Trial] = []
        self.trials: list[Trial] = []
        """The first trial of each configuration so far."""
        for one in restored:
            self._restore(one)

    def _restore(self, one: Restored) -> None:
        from optuna.trial import TrialState, create_trial

        params = {dimension.key: self._param(dimension, one.trial.values) for dimension in self._space}
        state = TrialState.RUNNING if not one.ended else TrialState.COMPLETE if one.values else TrialState.FAIL
        values = list(one.values) if one.ended and one.values else None
        self._study.add_trial(
            create_trial(state=state, values=values, params=params, distributions=self._distributions)
        )
        self._numbers[one.trial.name] = self._asked
        self._asked += 1
        self.trials.append(one.trial)
        if not one.ended:
            self._unfinished.append(one.trial)

    def _param(self, dimension: Dimension, values: Mapping[str, Any]) -> Any:
        value = values[dimension.key]
        return self._choices[dimension.key].index(value) if dimension.kind == CHOICE else value

    def next(self) -> Trial | None:
        """Return the first trial of the next configuration; None when ``tune.num_samples`` have been given."""
        if self._unfinished:
            return self._unfinished.pop(0)
        if len(self._numbers) >= (self._config.tune.num_samples or 0):
            return None
        for attempt in range(TRIES):
            if trial := self._ask(by_chance=attempt >= TRIES // 2):
                return trial
        self._notify(
            f"tune: none of {TRIES} further suggestions made a valid new config; the sweep ends with {len(self._numbers)} "
            "configurations"
        )
        return None

    def _ask(self, by_chance: bool) -> Trial | None:
        """Ask for a suggestion; None, and Optuna is told, if it makes no valid and new config."""
        import optuna

        seed = random.Random(f"{self._config.tune.seed} {self._asked}").getrandbits(32)
        sampler = optuna.samplers.RandomSampler if by_chance else optuna.samplers.TPESampler
        self._study.sampler = sampler(seed=seed)
        suggested = self._study.ask(self._distributions)
        self._asked += 1
        values = {
            dimension.key: dimension.values[suggested.params[dimension.key]]
            if dimension.kind == CHOICE
            else suggested.params[dimension.key]
            for dimension in self._space
        }
        try:
            trial = make_trial(self._config, values)
            self._accept(trial.config)
        except RequestError as error:
            self._notify(f"tune: Optuna's suggestion cannot run, so it is asked again: {error}")
            trial = None
        if trial is None or trial.name in self._numbers:
            self._study.tell(suggested.number, state=optuna.trial.TrialState.FAIL)
            return None
        self._numbers[trial.name] = suggested.number
        self.trials.append(trial)
        return trial

    def tell(self, configuration: str, values: tuple[float, ...] | None) -> None:
        """Tell Optuna a configuration's mean metrics; None if all its trials failed."""
        from optuna.trial import TrialState

        number = self._numbers[configuration]
        if values is None:
            self._study.tell(number, state=TrialState.FAIL)
        else:
            self._study.tell(number, list(values))


def _distribution(dimension: Dimension) -> Any:
    from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

    if dimension.kind == CHOICE:
        return CategoricalDistribution(list(range(len(dimension.values))))
    low, high = dimension.values[:2]
    if dimension.kind.endswith("randint"):
        return IntDistribution(low, high, log=dimension.kind == "lograndint")
    if dimension.kind == "quniform":
        # The end of the last step, as Optuna warns of a range that is not a multiple of its step.
        return FloatDistribution(low, dimension.probes()[1], step=dimension.values[2])
    return FloatDistribution(low, high, log=dimension.kind == "loguniform")


def restored(config: Config, recorded: Mapping[str, TrialRecord]) -> list[Restored]:
    """Return the configurations of an earlier call that are in the sweep's space, which may have changed, in their order."""
    space, objectives = dimensions(config), Objectives.of(config.tune)
    choices = {key: [trial.values[key] for trial in trials] for key, trials in probes(config, space).items()}
    found: list[Restored] = []
    for name, record in {record.configuration: record for record in recorded.values()}.items():
        if record.values.keys() != choices.keys() or not all(_holds(one, record.values, choices) for one in space):
            continue
        try:
            first = make_trial(config, record.values)
        except RequestError:
            continue
        if first.name != name:
            continue
        records = [recorded.get(trial.name) for trial in repeats(config, first)]
        ended = [one for one in records if one is not None and one.ended_well]
        values = mean([row for one in ended if (row := objectives.values(one.metrics)) is not None])
        found.append(Restored(first, len(ended) == len(records), values))
    return found


def _holds(dimension: Dimension, values: Mapping[str, Any], choices: Mapping[str, Sequence[Any]]) -> bool:
    value = values[dimension.key]
    return value in choices[dimension.key] if dimension.kind == CHOICE else dimension.holds(value)
