"""Schedulers end trials or let them take over others, on a local Ray cluster of 2 CPUs, with a tiny model."""

import json
import time
from pathlib import Path
from typing import Any

import pytest
import ray
import ray.tune
from ray.util import placement_group_table

from raysft.cli import main
from raysft.config import load
from raysft.train.checkpoint import catalog
from raysft.tune.lineage import read_lineage
from raysft.tune.trainable import Trainable, TrialSettings
from tests.messages import holds
from tests.sweeps import write_sweep

STEPS, EVERY = 9, 3
RATES = [1.0e-2, 1.0e-5]
"""The first one is the best, so that the one after it is behind."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("schedulers")
    generate = {"compare_base": False, "max_examples": 2, "max_new_tokens": 4, "do_sample": False}
    write_sweep(folder, RATES, 120, {"max_steps": STEPS, "eval_every_steps": EVERY}, generate)
    return folder


@pytest.fixture(autouse=True)
def _in_folder(folder, monkeypatch):
    monkeypatch.chdir(folder)


def swept(folder: Path, name: str, *overrides: str) -> Path:
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        assert main(["tune", "sweep.yaml", f"run.name={name}", f"tune.scheduler={name}", *overrides]) == 0
    return folder / "runs" / name


@pytest.fixture(scope="module")
def halved(local_ray, folder) -> Path:
    return swept(folder, "asha", "tune.scheduler_options={reduction_factor: 2}")


POPULATION = (
    "tune.scheduler_options={quantile_fraction: 0.5}",
    "generate.enabled=false",
)


@pytest.fixture(scope="module")
def population(local_ray, folder) -> Path:
    return swept(folder, "pbt", *POPULATION)


def records(sweep: Path) -> list[dict]:
    return [json.loads(line) for line in (sweep / "trials.jsonl").read_text().splitlines()]


def trials(sweep: Path) -> dict[float, dict]:
    """The last line of each trial, by its learning rate."""
    return {line["values"]["train.learning_rate"]: line for line in records(sweep)}


def log(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "trainer_log.jsonl").read_text().splitlines()]


def test_trials_that_are_behind_end_early_and_keep_what_they_have(halved):
    found = trials(halved)
    assert found[1e-2]["state"] == "done"
    assert found[1e-2]["step"] == STEPS
    # The other one is worse than what was there when it came to the first evaluation.
    stopped, run = found[1e-5], halved / "trials" / found[1e-5]["trial"]
    assert (stopped["state"], stopped["step"]) == ("stopped", EVERY)
    assert [line["current_steps"] for line in log(run)] == [0, 1, 2, 3, 3]
    assert stopped["metrics"]["eval_loss"] == log(run)[-1]["eval_loss"]
    newest = catalog.newest(run / "checkpoints")
    assert newest
    assert newest.cursor.step == EVERY
    assert not (run / "model").exists()
    assert not (run / "generated_predictions.jsonl").exists()
    assert (halved / "trials" / found[1e-2]["trial"] / "generated_predictions.jsonl").exists()
    assert load(halved / "best.yaml").train.learning_rate == 1e-2


def test_a_sweep_started_again_leaves_the_stopped_trials_alone(halved, capsys):
    before = (halved / "trials.jsonl").read_text()
    assert main(["tune", "sweep.yaml", "run.name=asha", "tune.scheduler=asha"]) == 0
    assert (halved / "trials.jsonl").read_text() == before
    assert "2 done before" in capsys.readouterr().out


def test_a_stopped_trial_goes_on_as_a_run_of_its_own(halved, folder):
    run = halved / "trials" / trials(halved)[1e-5]["trial"]
    assert main(["train", str(run / "config.yaml")]) == 0
    steps = [line["current_steps"] for line in log(run) if "loss" in line]
    assert steps == list(range(1, STEPS + 1))
    assert (run / "model" / "model.safetensors").exists()


def held() -> tuple[float, int]:
    """CPUs and placement groups that somebody holds."""
    groups = [group for group in placement_group_table().values() if group["state"] != "REMOVED"]
    return ray.cluster_resources()["CPU"] - ray.available_resources().get("CPU", 0.0), len(groups)


def wait_until_nothing_is_held() -> None:
    """Ray may still be taking back what an actor had that has ended."""
    begun = time.monotonic()
    while held() != (0.0, 0):
        assert time.monotonic() - begun < 20, f"{held()} are still held"
        time.sleep(0.1)


def test_a_trial_that_is_stopped_gives_back_all_that_it_held(local_ray, folder):
    config = load(folder / "sweep.yaml", ["run.name=alone", "tune={}", "train.max_steps=400"])
    wait_until_nothing_is_held()
    settings = TrialSettings(scheduled=True, home=str(folder), environment={})
    trainable: Any = ray.tune.with_parameters(Trainable, settings=settings)
    trial = ray.remote(num_cpus=0)(trainable).remote({"config": config.model_dump_json()})
    try:
        first: Any = ray.get(trial.train.remote(), timeout=120)
        assert (first["step"], first["done"]) == (EVERY, False)
        # A data task that reads ahead may hold half a CPU more.
        cpus, groups = held()
        assert cpus >= 1.0
        assert groups == 1, "a worker waits for what is decided"
        ray.get(trial.stop.remote(), timeout=60)
        wait_until_nothing_is_held()
        assert log(folder / "runs" / "alone")[-1]["current_steps"] == EVERY
    finally:
        ray.kill(trial)  # else what a failure shows keeps it alive, and the next tests have no CPU


def test_trials_that_are_behind_go_on_from_better_ones(population):
    parents = [line["parent"] for line in records(population) if line["parent"]]
    assert parents
    for name in {line["trial"] for line in records(population)}:
        lineage = read_lineage(population / "trials" / name)
        recorded = [line["parent"] for line in records(population) if line["trial"] == name and line["parent"]]
        assert list(dict.fromkeys(map(str, recorded))) == list(map(str, lineage))
    last = {line["trial"]: (line["state"], line["step"]) for line in records(population)}
    assert list(last.values()) == [("done", STEPS)] * 2


def test_a_population_that_has_ended_is_left_alone_when_it_is_started_again(population, folder, capsys):
    before = records(population)
    swept(folder, "pbt", *POPULATION)
    assert records(population) == before
    assert "2 done before" in capsys.readouterr().out


def test_whoever_took_over_has_the_others_past_and_each_row_once(population):
    taken_over = [run for run in (population / "trials").iterdir() if read_lineage(run)]
    assert taken_over
    rows_of_all = set()
    for run in (population / "trials").iterdir():
        steps = [line for line in log(run) if "loss" in line]
        assert [line["current_steps"] for line in steps] == list(range(1, STEPS + 1))
        assert [line["rows"] for line in steps] == [2 * step for step in range(1, STEPS + 1)]
        rows_of_all.add(json.dumps(json.loads((run / "plan.json").read_text())["row_plan"], sort_keys=True))
    assert len(rows_of_all) == 1, "all train on the same rows in the same steps"
    for run in taken_over:
        parent = read_lineage(run)[-1]
        theirs = log(population / "trials" / parent["trial"])
        until = [line for line in log(run) if line["current_steps"] <= parent["step"]]
        # What the parent became later may have another past: it may have taken over another trial in turn.
        if not any(each["step"] >= parent["step"] for each in read_lineage(population / "trials" / parent["trial"])):
            assert until == [line for line in theirs if line["current_steps"] <= parent["step"]]
        rates = {line["lr"] for line in log(run) if "loss" in line and line["current_steps"] > parent["step"]}
        assert rates == {load(run / "config.yaml").train.learning_rate}
        assert rates <= set(RATES)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            ["tune.scheduler=asha", "train.eval_every_steps=null"],
            "tune.scheduler=asha … train.eval_every_steps=null; set it",
        ),
        (
            ["tune.scheduler=asha", "tune.metric=predict_rouge-1"],
            "tune.scheduler=asha … 'predict_rouge-1' … ; use a metric",
        ),
        (
            ["tune.scheduler=asha", "tune.metric=[eval_loss, eval_accuracy]"],
            "tune.scheduler=asha … one metric … ; use one",
        ),
        (
            ["tune.scheduler=median", "tune.scheduler_options={max_t: 3}"],
            "tune.scheduler_options: median has no option max_t; use grace_period",
        ),
        (
            ["tune.scheduler_options={grace_period: 3}"],
            "tune.scheduler_options … needs a scheduler, but tune.scheduler=none; set one",
        ),
        (
            ["tune.scheduler=asha", "tune.scheduler_options={reduction_factor: 0.5}"],
            "tune.scheduler_options: reduction_factor=0.5 is not a number above 1; correct it",
        ),
        (
            ["tune.scheduler=pbt", "tune.space={model.lora.rank: [2, 4]}"],
            "tune.scheduler=pbt … model.lora.rank cannot change then; use",
        ),
        (["tune.scheduler=pbt", "tune.repeats=2"], "tune.scheduler=pbt … tune.repeats=2 … ; set it to 1"),
        (
            ["tune.scheduler=pbt", "train.keep_best=true"],
            "tune.scheduler=pbt … train.keep_best=true … ; set it to false",
        ),
        (
            ["tune.scheduler=pbt", "tune.search=optuna", "tune.num_samples=2"],
            "tune.scheduler=pbt … tune.search=optuna … ; use tune.search=random",
        ),
    ],
)
@pytest.mark.usefixtures("local_ray")
def test_a_scheduler_that_cannot_decide_is_one_line(overrides, message, capsys):
    assert main(["tune", "sweep.yaml", "run.name=refused", *overrides]) == 2
    line, *more = capsys.readouterr().err.splitlines()
    assert not more
    assert holds(line.removeprefix("raysft: error: "), message), line
    assert not Path("runs/refused").exists()
