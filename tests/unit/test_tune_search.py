"""What a search hands out, what it is told, and that one which was interrupted goes on as if it had not been."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
from ray.tune.search import Searcher

from raysft.cluster.placement import Node
from raysft.config import Config, parse, with_overrides
from raysft.errors import RequestError
from raysft.tune import sweep
from raysft.tune.earlier_call import earlier_trials
from raysft.tune.optuna_study import OptunaStudy, check_installed, restored
from raysft.tune.record import Record, TrialRecord
from raysft.tune.search import Search
from raysft.tune.sources import FixedList
from raysft.tune.sweep import _source
from raysft.tune.trials import Trial, combinations, make_trial, repeats
from tests.messages import holds, refusal

RATE = "train.learning_rate"
SPACE = {
    RATE: {"loguniform": [1e-5, 1e-1]},
    "model.lora.rank": {"randint": [2, 64]},
    "train.betas": [[0.9, 0.95], [0.9, 0.999], [0.8, 0.99]],
    "train.warmup_ratio": {"quniform": [0, 0.4, 0.15]},
}


def config(space: dict | None = None, **tune: Any) -> Config:
    data = {"train": [{"name": "a", "path": "a.jsonl"}]}
    tune = {"search": "optuna", "num_samples": 30, "space": space or SPACE, **tune}
    return parse({"model": {"path": "m"}, "data": data, "tune": tune})


def loss(trial: Trial) -> float:
    """Lowest, 0, at a rate of 1e-3, the second betas and no warmup."""
    found = trial.config.train
    return abs(math.log10(found.learning_rate) + 3) + (found.betas[1] != 0.999) + found.warmup_ratio


def study(
    given: Config, recorded: dict[str, TrialRecord] | None = None, accept: Callable[[Config], Any] = lambda trial: None
):
    lines: list[str] = []
    return OptunaStudy(given, restored(given, recorded or {}), accept, lines.append), lines


def record(trial: Trial, number: int, state: Any = "done", **metrics: float) -> TrialRecord:
    seed = trial.config.run.seed
    return TrialRecord(trial.name, number, trial.configuration, trial.values, seed, state, 1, metrics, "", 0.0, 1.0)


def ran(given: Config, told: Callable[[Trial], tuple[float, ...] | None] = lambda trial: (loss(trial),)) -> list[Trial]:
    """The configurations of a search that runs to its end, one at a time."""
    source, _ = study(given)
    while trial := source.next():
        source.tell(trial.name, told(trial))
    return source.trials


@pytest.fixture(scope="module")
def whole() -> list[Trial]:
    return ran(config())


def test_optuna_finds_what_a_random_search_of_the_same_size_does_not(whole):
    drawn = combinations(config(search="random"))
    assert len(whole) == len(drawn) == 30
    assert len({trial.name for trial in whole}) == 30
    assert sum(map(loss, whole[10:])) < 0.7 * sum(map(loss, drawn[10:]))


@pytest.mark.parametrize("after", [4, 17])
def test_a_search_that_is_restored_suggests_what_it_would_have_suggested(whole, after):
    recorded = {trial.name: record(trial, number, eval_loss=loss(trial)) for number, trial in enumerate(whole[:after])}
    source, _ = study(config(), recorded)
    while trial := source.next():
        source.tell(trial.name, (loss(trial),))
    assert [trial.name for trial in source.trials] == [trial.name for trial in whole]


def test_an_interrupted_trial_and_a_failed_one_come_first_when_a_search_is_restored(whole):
    states = ["done", "failed", "done", "running"]
    recorded = {
        trial.name: record(trial, number, state, **({"eval_loss": loss(trial)} if state == "done" else {}))
        for number, (trial, state) in enumerate(zip(whole, states, strict=False))
    }
    source, _ = study(config(), recorded)
    given = [source.next(), source.next(), source.next()]
    assert [trial.name for trial in given[:2] if trial] == [whole[1].name, whole[3].name]
    assert given[2] is not None
    assert given[2].name not in recorded
    assert len(source.trials) == 5


def test_a_recorded_configuration_outside_the_space_is_left_out(whole):
    recorded = {trial.name: record(trial, number, eval_loss=1.0) for number, trial in enumerate(whole[:8])}
    fewer = config({**SPACE, "train.betas": SPACE["train.betas"][1:]})
    kept = [one.trial.name for one in restored(fewer, recorded)]
    assert kept == [trial.name for trial in whole[:8] if list(trial.config.train.betas) != [0.9, 0.95]]
    assert 0 < len(kept) < 8
    assert not restored(config({RATE: SPACE[RATE]}), recorded)


def test_a_suggestion_that_cannot_run_is_shown_and_asked_again():
    def accept(trial: Config) -> None:
        if trial.model.lora.rank > 32:
            raise RequestError("no room")

    source, lines = study(config(num_samples=12), accept=accept)
    while trial := source.next():
        source.tell(trial.name, (loss(trial),))
    assert len(source.trials) == 12
    assert all(trial.config.model.lora.rank <= 32 for trial in source.trials)
    assert lines
    assert all("asked again: no room" in line for line in lines)


def test_a_suggestion_that_has_no_memory_is_asked_again_and_each_shape_is_looked_at_once(monkeypatch, capsys):
    looked: list[tuple[int, int]] = []

    def plan_trials(trials, *_):
        (trial,) = trials
        looked.append((trial.micro_batch_size, trial.model.lora.rank))
        if trial.micro_batch_size > 4:
            raise RequestError("no memory")

    monkeypatch.setattr(sweep, "plan_trials", plan_trials)
    space = {RATE: SPACE[RATE], "train.micro_batch_size": [2, 4, 8], "model.lora.rank": [8, 16]}
    given = with_overrides(config(space, num_samples=20), {"data.holdout": 0.1})
    checked = make_trial(given, {RATE: 0.5, "train.micro_batch_size": 2, "model.lora.rank": 8}).config
    source = _source(given, [], {}, [Node(2.0)], [checked])
    while trial := source.next():
        source.tell(trial.name, (0.0,))
    assert len(source.trials) == 20
    assert {trial.config.micro_batch_size for trial in source.trials} == {2, 4}
    fitting = [shape for shape in looked if shape[0] <= 4]
    assert sorted(fitting) == [(2, 16), (4, 8), (4, 16)], "two rows at rank 8 had been looked at before"
    assert "asked again: no memory" in capsys.readouterr().out


def test_a_search_ends_when_no_suggestion_can_run():
    def accept(trial: Config) -> None:
        raise RequestError("no room")

    source, lines = study(config(num_samples=3), accept=accept)
    assert source.next() is None
    assert "suggestions made a valid new config; the sweep ends with 0 configurations" in lines[-1]


def test_optuna_can_try_all_of_a_small_space():
    found = ran(config({"train.epochs": [1, 2, 3], "train.loss": ["cross_entropy", "dft"]}, num_samples=6))
    assert len({trial.name for trial in found}) == 6


def test_optuna_takes_several_metrics_and_failures():
    given = config(metric=["eval_loss", "predict_bleu"], mode=["min", "max"])
    found = ran(given, lambda trial: None if trial.config.model.lora.rank < 8 else (loss(trial), -loss(trial)))
    assert len(found) == 30
    best = ran(config(mode="max"))
    assert sum(map(loss, best[10:])) > 1.5 * sum(map(loss, found[10:]))


def test_a_trial_counts_again_only_with_its_metrics_its_run_and_the_same_generation(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    grid = {"search": "grid", "num_samples": None}
    names = dict(zip("abcde", combinations(config({RATE: [1, 2, 3, 4, 5]}, **grid)), strict=True))

    def asked(**sections: Any) -> Config:
        data = {"train": [{"name": "a", "path": "a.jsonl"}], "holdout": 0.1}
        return parse({"model": {"path": "m"}, "data": data, "tune": {"space": {RATE: [1, 2, 3, 4, 5]}}, **sections})

    file = Record(tmp_path / "trials.jsonl")
    for number, (key, trial) in enumerate(names.items()):
        state = "stopped" if key == "d" else "failed" if key == "e" else "done"
        file.append(record(trial, number, state, **({} if key == "b" else {"eval_loss": 1.0})))
        if key != "c":
            run = tmp_path / "runs" / "run" / "trials" / trial.name
            run.mkdir(parents=True)
            (run / "config.yaml").write_text(with_overrides(asked(), {"generate.num_actors": 3}).to_yaml())
    assert (tmp_path / "runs" / "run") == asked().run_directory

    def states(given: Config) -> list[str]:
        return [one.state for one in earlier_trials(given, file).values()]

    assert states(asked()) == ["done", "running", "running", "stopped", "failed"]
    assert states(asked(generate={"max_new_tokens": 7})) == ["running", "running", "running", "running", "failed"]
    assert states(asked(generate={"max_new_tokens": 7, "enabled": False})) == states(asked())
    assert [one.number for one in earlier_trials(asked(), file).values()] == list(range(5))


class Told(FixedList):
    """A list that keeps what it is told."""

    def __init__(self, trials: list[Trial]) -> None:
        super().__init__(trials)
        self.told: dict[str, Any] = {}

    def tell(self, configuration: str, values: tuple[float, ...] | None) -> None:
        self.told[configuration] = values


GRID = {"search": "grid", "num_samples": None}


def test_a_search_tells_the_mean_when_the_last_repeat_of_a_configuration_has_ended():
    given = config({RATE: [1e-4, 1e-3]}, **GRID, repeats=3)
    source = Told(combinations(given))
    search = Search(given, source, {}, lambda trial: trial)
    suggested = [search.suggest(str(number)) for number in range(6)]
    assert search.suggest("6") == Searcher.FINISHED
    assert [one["number"] for one in suggested] == list(range(6))
    assert [Config.model_validate_json(one["config"]).run.seed for one in suggested] == [
        given.run.seed + k for k in (0, 1, 2)
    ] * 2
    first, second = (trial.name for trial in source.trials)
    assert [one["configuration"] for one in suggested] == [first] * 3 + [second] * 3
    search.on_trial_complete("0", {"eval_loss": 1.0})
    search.on_trial_complete("3", {"eval_loss": 8.0})
    search.on_trial_complete("2", error=True)
    search.on_trial_complete("4", {"eval_loss": math.nan})
    assert not source.told
    search.on_trial_complete("1", {"eval_loss": 2.0})
    search.on_trial_complete("5", error=True)
    assert source.told == {first: (1.5,), second: (8.0,)}


def test_a_search_hands_out_only_what_has_not_ended_and_counts_what_has():
    given = config({RATE: [1e-4, 1e-3]}, **GRID, repeats=2)
    trials = [trial for first in combinations(given) for trial in repeats(given, first)]
    states = ["done", "done", "stopped", "failed"]
    recorded = {
        trial.name: record(trial, 10 + number, state, eval_loss=float(number))
        for number, (trial, state) in enumerate(zip(trials, states, strict=True))
    }
    source = Told(combinations(given))
    search = Search(given, source, recorded, lambda trial: trial)
    (suggested, end) = search.suggest("x"), search.suggest("y")
    assert (suggested["trial"], suggested["number"]) == (trials[3].name, 13)
    assert end == Searcher.FINISHED
    search.on_trial_complete("x", {"eval_loss": 4.0})
    assert source.told == {trials[2].name: (3.0,)}


def test_a_search_hands_out_nothing_after_its_deadline(monkeypatch):
    given = config({RATE: [1e-4, 1e-3]}, **GRID)
    now = 10.0
    monkeypatch.setattr("raysft.tune.search.time.time", lambda: now)
    source = Told(combinations(given))
    search = Search(given, source, {}, lambda trial: trial, deadline=20.0)
    first, now = search.suggest("0"), 20.0
    assert first != Searcher.FINISHED
    assert not search.finished
    assert search.suggest("1") == Searcher.FINISHED
    assert search.finished
    # A trial that was interrupted tells the source nothing.
    search.on_trial_complete("0", {"interrupted": "its time is over", "done": True})
    assert list(source.told.values()) == [None]


def test_a_search_by_optuna_needs_it(monkeypatch):
    check_installed()
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert holds(refusal(check_installed), "tune.search=optuna needs … pip install 'raysft[tune]' … tune.search=random")


@pytest.mark.parametrize("repeat", [0, 1])
def test_a_study_does_not_go_on_with_trials_of_another_config(tmp_path, repeat):
    """What Optuna suggested is not among the trials that are known before it is asked."""
    given = with_overrides(
        config(repeats=2, num_samples=1), {"run.storage": str(tmp_path), "data.cache": str(tmp_path)}
    )
    trials = repeats(given, ran(given)[0])
    recorded = {trial.name: record(trial, number, eval_loss=1.0) for number, trial in enumerate(trials)}
    had = trials[repeat].config
    had.run_directory.mkdir(parents=True)
    (had.run_directory / "config.yaml").write_text(had.to_yaml())
    (had.run_directory / "trainer_log.jsonl").touch()
    assert [trial.name for trial in _source(given, [], recorded, []).trials] == [trials[0].name]
    changed = with_overrides(given, {"train.max_steps": 7})
    message = refusal(lambda: _source(changed, [], recorded, []))
    assert holds(
        message,
        f"{had.run_directory}: belongs to another config: train.max_steps=7 (the run has null); restore the old value",
    )
