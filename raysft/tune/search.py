"""The search of a sweep, for Ray Tune: hands out trials, and tells the search what became of them."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping
from typing import Any

from ray.tune.search import Searcher

from raysft.config import Config
from raysft.stopping import current
from raysft.tune.ranking import Objectives, mean
from raysft.tune.record import TrialRecord
from raysft.tune.sources import Source
from raysft.tune.trials import Trial, repeats


class Search(Searcher):
    """Hands out every trial that has not ended; those of an earlier call count as they were recorded."""

    def __init__(
        self,
        config: Config,
        source: Source,
        recorded: Mapping[str, TrialRecord],
        place: Callable[[Config], Config],
        deadline: float | None = None,
    ) -> None:
        """Make a search.

        Args:
            config: the sweep's config.
            source: gives the configurations.
            recorded: the record of an earlier call, by trial.
            place: fits a trial's config into the cluster.
            deadline: when no further trial is handed out, in seconds since 1970.
        """
        super().__init__()
        self._config, self._source, self._recorded, self._place = config, source, recorded, place
        self._deadline = deadline
        self._objectives = Objectives.of(config.tune)
        self._numbers = {name: record.number for name, record in recorded.items()}
        self._queue: list[Trial] = []
        self._running: dict[str, Trial] = {}
        """Trials by Tune's identifiers."""
        self._open: dict[str, set[str]] = {}
        """Trials of each configuration that have not ended."""
        self._found: dict[str, list[tuple[float, ...]]] = {}
        """Metrics of each configuration's trials."""
        self.finished = False
        """True once every trial was handed out, the time is over, or the sweep is to stop."""

    def suggest(self, trial_id: str) -> dict[str, Any] | str:
        """Return what Tune has of a trial: its name, number, configuration, and its config as JSON, which Tune leaves as it is."""
        if not self._fill():
            self.finished = True
            return Searcher.FINISHED
        trial = self._queue.pop(0)
        self._running[trial_id] = trial
        number = self._numbers.setdefault(trial.name, max(self._numbers.values(), default=-1) + 1)
        return {
            "trial": trial.name,
            "number": number,
            "configuration": trial.configuration,
            "values": json.dumps(trial.values),
            "config": self._place(trial.config).model_dump_json(),
        }

    def _fill(self) -> bool:
        """Queue trials if none wait; return False if no more should start."""
        if current().request is not None or (self._deadline is not None and time.time() >= self._deadline):
            return False
        while not self._queue:
            first = self._source.next()
            if first is None:
                return False
            self._add(first)
        return True

    def _add(self, first: Trial) -> None:
        """Queue the trials of a configuration that have not ended."""
        trials = repeats(self._config, first)
        found = {trial.name: self._recorded.get(trial.name) for trial in trials}
        ended = {name: record for name, record in found.items() if record is not None and record.ended_well}
        self._found[first.name] = list(
            filter(None, (self._objectives.values(record.metrics) for record in ended.values()))
        )
        self._queue += [trial for trial in trials if trial.name not in ended]
        self._open[first.name] = {trial.name for trial in self._queue if trial.configuration == first.name}

    def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
        """Tell the source about a configuration when the last of its trials ended."""
        trial = self._running.pop(trial_id)
        if not error and result and (values := self._objectives.values(result)) is not None:
            self._found[trial.configuration].append(values)
        self._open[trial.configuration].discard(trial.name)
        if not self._open[trial.configuration]:
            self._source.tell(trial.configuration, mean(self._found[trial.configuration]))

    def save(self, checkpoint_path: str) -> None:
        """Save nothing: a search continues from the record of the trials."""

    def restore(self, checkpoint_path: str) -> None:
        """Restore nothing, as ``save`` saves nothing."""
