"""Generation during training through the command line, beside the workers and between two steps, on a cluster of 2 CPUs."""

import json
import shutil
import time
from collections.abc import Callable
from contextlib import redirect_stdout
from functools import cache
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
import ray
import torch
from safetensors.torch import load_file

from raysft.cli import main
from raysft.errors import RunFailed
from raysft.run import step_generation
from raysft.run.step_generation import predict_step
from raysft.stopping import current
from raysft.storage.json_files import read_jsonl
from tests.processes import children_named
from tests.tiny import tiny_folder

pytestmark = pytest.mark.usefixtures("local_ray")

CONFIG = """
run: {{storage: {folder}/runs, seed: 1}}
model: {{path: {folder}/base, dtype: float32, lora: {{rank: 4}}}}
data:
  train: [{{name: chat, path: {folder}/chat.jsonl}}]
  holdout: 0.2
  sequence_length: 128
train:
  max_steps: 6
  global_batch_size: 2
  learning_rate: 1.0e-2
  schedule: constant
  warmup_steps: 0
  eval_at_start: false
  save_every_minutes: null
scaling: {{cpus_per_worker: 0.5, threads_per_worker: 1}}
generate:
  {{compare_base: false, max_examples: 6, max_new_tokens: 8, do_sample: false, batch_size: 4, metrics: [similarity, chrf]}}
"""
BETWEEN = ["scaling.num_workers=2", "scaling.cpus_per_worker=0.75"]
"""Two workers leave half a CPU, of which data tasks need all."""
CHECKPOINTS = ["train.save_every_steps=4", "train.keep_last=9"]
WAYS = {"beside": CHECKPOINTS, "between": [*BETWEEN, "model.finetuning=full", "train.zero_stage=3"]}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("steps")
    return tiny_folder(folder, CONFIG.format(folder=folder), spread=0.2, file="sft.yaml", chat=60)


def run(folder: Path, name: str, *settings: str, verb: str = "run") -> Path:
    assert main([verb, str(folder / "sft.yaml"), f"run.name={name}", *settings]) == 0
    return folder / "runs" / name


def generations(run: Path) -> dict[int, dict]:
    """The records of predictions in the log, by step; each step has one."""
    records = [each for each in read_jsonl(run / "trainer_log.jsonl") if "predict_examples" in each]
    by_step = {record["current_steps"]: record for record in records}
    assert len(by_step) == len(records)
    return by_step


def weights(run: Path) -> dict[str, torch.Tensor]:
    [file] = (run / "model").glob("*.safetensors")
    return load_file(file)


def scores(results: dict) -> dict:
    """The results that do not depend on time."""
    timed = ("runtime", "per_second", "signature")
    return {key: value for key, value in results.items() if key.startswith("predict_") and not key.endswith(timed)}


@pytest.fixture(scope="module")
def uninterrupted(folder) -> Callable[[str], tuple[Path, str]]:
    """Way → a run that generates after every second step, made once, and what it printed."""

    @cache
    def made(way: str) -> tuple[Path, str]:
        with redirect_stdout(StringIO()) as printed:
            place = run(folder, way, "generate.every_steps=2", *WAYS[way])
        return place, printed.getvalue()

    return made


@pytest.fixture(scope="module")
def beside(uninterrupted) -> Path:
    return uninterrupted("beside")[0]


@pytest.mark.parametrize(
    ("name", "where"), [("beside", "by 1 engine alongside training"), ("between", "between two steps")]
)
def test_predictions_of_a_step_are_those_of_its_model_and_change_no_weight(folder, uninterrupted, name, where):
    settings = WAYS[name]
    every, printed = uninterrupted(name)
    assert f"after every 2 steps, 3 times, {where}" in printed
    assert "after step 4 | rouge-1" in printed
    found = generations(every)
    assert sorted(found) == [2, 4, 6]
    assert [found[4][key] for key in ("total_steps", "percentage")] == [6, 66.67]
    shorter = run(folder, f"{name}-4", "train.max_steps=4", *settings)
    ours, theirs = every / "generation" / "4", shorter
    assert (ours / "generated_predictions.jsonl").read_text() == (theirs / "generated_predictions.jsonl").read_text()
    expected = scores(json.loads((theirs / "predict_results.json").read_text()))
    assert expected["predict_examples"] == 6
    assert scores(found[4]) == scores(json.loads((ours / "predict_results.json").read_text())) == expected
    rows = [row for row in read_jsonl(every / "metrics.jsonl") if row.get("step") == 4 and row["metric"] == "chrf"]
    assert [row["value"] for row in rows] == [expected["predict_chrf"]]
    # The last step's are those of the trained model, which is not asked again.
    assert scores(found[6]) == scores(json.loads((every / "predict_results.json").read_text())) != expected
    assert not list((every / "generation").glob("*/model"))
    without = weights(run(folder, f"{name}-none", *settings, verb="train"))
    with_generation = weights(every)
    assert without.keys() == with_generation.keys()
    assert all(torch.equal(without[key], with_generation[key]) for key in without)


def test_predictions_of_a_step_are_those_of_its_checkpoint(folder, beside, tmp_path):
    exported = tmp_path / "exported"
    assert main(["export", str(beside / "checkpoints" / "4"), "--no-merge", "--output", str(exported)]) == 0
    other = run(folder, "exported", f"generate.model={exported}", verb="generate")
    assert (other / "generated_predictions.jsonl").read_text() == (
        beside / "generation" / "4" / "generated_predictions.jsonl"
    ).read_text()
    assert scores(json.loads((other / "predict_results.json").read_text())) == scores(generations(beside)[4])


def test_a_checkpoint_that_is_saved_while_workers_wait_has_the_weights_that_are_trained(folder, tmp_path):
    settings = [*BETWEEN, "train.optimizer=schedulefree_adamw", *CHECKPOINTS, "train.max_steps=5"]
    found = []
    for name, more in {"averages": ["generate.every_steps=4"], "averages-none": []}.items():
        trained = run(folder, name, *settings, *more, verb="train")
        exported = tmp_path / name
        assert main(["export", str(trained / "checkpoints" / "4"), "--no-merge", "--output", str(exported)]) == 0
        found.append(load_file(exported / "adapter_model.safetensors"))
    with_generation, without = found
    assert with_generation.keys() == without.keys()
    assert all(torch.equal(with_generation[key], without[key]) for key in without)


def stopping(run: Path, at: int):
    """What predicts the prompts, and after a step asks the run to stop instead."""

    def predict(config, directory, step, *more):
        if step != at:
            return predict_step(config, directory, step, *more)
        (run / "stop").touch()
        limit = time.monotonic() + 60
        while time.monotonic() < limit:
            current().check()
            time.sleep(0.05)
        raise AssertionError("nobody asked it to stop")

    return predict


class Killing:
    """Predicts the prompts; at its first call it first kills a worker of the training (SIGKILL)."""

    killed = False

    def __call__(self, config, directory, step, *more):
        if not self.killed:
            next(children_named("RayTrainWorker")).kill()
            self.killed = True
            time.sleep(1)  # the request is under way while the workers fail
            current().check()
        return predict_step(config, directory, step, *more)


@pytest.fixture(scope="module")
def stopped(folder) -> Callable[..., Path]:
    """Settings → a run that was stopped while it generated after step 4, made once."""

    @cache
    def made(*settings: str) -> Path:
        place = folder / "runs" / f"stopped-{len(settings)}"
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(step_generation, "predict_step", stopping(place, at=4))
            command = ["train", str(folder / "sft.yaml"), f"run.name={place.name}", "generate.every_steps=2"]
            assert main([*command, *settings]) == 75
        assert sorted(generations(place)) == [2]
        assert (place / "generation" / "4" / "model" / "adapter_config.json").exists()
        return place

    return made


SAVES = ["train.save_every_steps=2", "train.keep_last=9"]


@pytest.mark.parametrize(("name", "settings"), [("stopped", []), ("stopped-between", [*BETWEEN, *SAVES])])
def test_a_run_that_stops_and_whose_worker_dies_while_it_generates_goes_on_with_the_same_predictions(
    folder, beside, stopped, capsys, monkeypatch, name, settings
):
    place = folder / "runs" / name
    shutil.copytree(stopped(*settings), place)
    killing = Killing()
    monkeypatch.setattr(step_generation, "predict_step", killing)
    capsys.readouterr()
    run(folder, name, "generate.every_steps=2", *settings, verb="train")
    assert killing.killed
    assert "restarting the workers" in capsys.readouterr().out
    found = generations(place)
    if settings:
        assert sorted(found) == [2, 4, 6]
    else:
        assert {step: scores(found[step]) for step in found} == {
            step: scores(record) for step, record in generations(beside).items()
        }
        assert all(torch.equal(weight, weights(place)[key]) for key, weight in weights(beside).items())
    assert not list((place / "generation").glob("*/model"))


def test_a_run_that_resumes_before_a_step_forgets_its_generation(folder, stopped):
    place = folder / "runs" / "earlier"
    shutil.copytree(stopped(*BETWEEN, *SAVES), place)
    [newest] = (place / "checkpoints").glob("checkpoint_00000004_*")
    shutil.rmtree(newest)
    (place / "generation" / "6").mkdir()
    (place / "generation" / "6" / "predict_results.json").write_text('{"predict_examples": 1}')  # of an earlier life
    run(folder, "earlier", "generate.every_steps=3", *BETWEEN, *SAVES, verb="train")
    found = generations(place)
    assert sorted(found) == [2, 3, 6]
    assert found[6]["predict_examples"] == 6
    assert not list((place / "generation").glob("*/model"))


@pytest.mark.parametrize(
    ("name", "before"),
    [
        ("other-metric", ["generate.metrics=[similarity]"]),
        ("other-answers", ["generate.max_new_tokens=1", "train.keep_best=true", "train.best_metric=predict_chrf"]),
    ],
)
def test_scores_that_cannot_be_compared_with_later_ones_are_made_again(folder, capsys, name, before):
    first = ["train.max_steps=4", "train.save_every_steps=4", "generate.every_steps=4", *before]
    run(folder, name, *first, verb="train")
    command = ["train", str(folder / "sft.yaml"), f"run.name={name}", "--allow-changed", "train.save_every_steps=4"]
    best = ["train.keep_best=true", "train.best_metric=predict_chrf"]
    capsys.readouterr()
    assert main([*command, "generate.every_steps=2", *best]) == 0
    told = [line for line in capsys.readouterr().out.splitlines() if "no longer counts" in line]
    assert len(told) == (name == "other-answers")
    assert all("step 4 with predict_chrf=" in line and "generate settings" in line for line in told)
    place = folder / "runs" / name
    values = {}
    for step in (4, 6):
        results = json.loads((place / "generation" / str(step) / "predict_results.json").read_text())
        values[step] = results["predict_chrf"]
        predictions = read_jsonl(place / "generation" / str(step) / "generated_predictions.jsonl")
        assert max(row["tokens"] for row in predictions) > 1
    results = json.loads((place / "train_results.json").read_text())
    step = max(values, key=lambda step: values[step])
    assert (results["best_step"], results["best_predict_chrf"]) == (step, values[step])


def failing(at: int):
    """What predicts the prompts, and fails after a step."""

    def predict(config, directory, step, *more):
        if step == at:
            raise RunFailed("generation failed: out of memory")
        return predict_step(config, directory, step, *more)

    return predict


def test_a_generation_that_fails_is_told_and_training_goes_on(folder, beside, capsys, monkeypatch):
    monkeypatch.setattr(step_generation, "predict_step", failing(at=2))
    failed = run(folder, "failed", "generate.every_steps=2", verb="train")
    told = [line for line in capsys.readouterr().out.splitlines() if "out of memory" in line]
    assert len(told) == 1
    assert "predictions after step 2: generation failed" in told[0]
    assert sorted(generations(failed)) == [4, 6]
    assert not (failed / "generation" / "2" / "model").exists()
    assert all(torch.equal(weight, weights(failed)[key]) for key, weight in weights(beside).items())


def test_a_training_that_needs_scores_ends_with_a_checkpoint_where_there_are_none(folder, capsys, monkeypatch):
    monkeypatch.setattr(step_generation, "predict_step", failing(at=4))
    evaluates = ["train.eval_every_steps=2", "generate.every_steps=2"]
    command = ["train", str(folder / "sft.yaml"), "run.name=needs", *evaluates, *BEST]
    assert main(command) == 1
    printed = capsys.readouterr()
    [line] = printed.err.splitlines()[-1:]
    assert "out of memory" in line
    assert "continues without" not in printed.out
    assert "train.best_metric" in line
    monkeypatch.undo()
    assert main(command) == 0
    check_best(folder / "runs" / "needs", steps=[2, 4, 6])
    evaluated = [each for each in read_jsonl(folder / "runs" / "needs" / "trainer_log.jsonl") if "eval_loss" in each]
    assert [record["current_steps"] for record in evaluated] == [2, 4, 6]


def test_a_training_that_has_ended_is_not_repeated_for_its_last_predictions(folder, capsys, monkeypatch):
    place = folder / "runs" / "ended"

    def predict(*asked: Any) -> dict[str, float]:
        until = time.monotonic() + 60
        while not (place / "train_results.json").exists():  # a run that is killed from here on is trained
            assert time.monotonic() < until
            time.sleep(0.05)
        return stopping(place, at=2)(*asked)

    monkeypatch.setattr(step_generation, "predict_step", predict)
    command = ["train", str(folder / "sft.yaml"), "run.name=ended", "train.max_steps=2", "generate.every_steps=2"]
    assert main(command) == 75
    assert (place / "generation" / "2" / "model").exists()
    monkeypatch.setattr(step_generation, "predict_step", failing(at=2))
    capsys.readouterr()
    assert main(command) == 0
    printed = capsys.readouterr().out
    assert "is already trained" in printed
    assert "predictions after step 2: generation failed: out of memory" in printed
    assert not (place / "generation" / "2" / "model").exists()


BEST = ["train.keep_best=true", "train.best_metric=predict_rouge-l"]


def check_best(run: Path, steps: list[int]) -> None:
    found = generations(run)
    assert sorted(found) == steps
    values = {step: record["predict_rouge-l"] for step, record in sorted(found.items())}
    best = max(values, key=lambda step: values[step])
    results = json.loads((run / "train_results.json").read_text())
    assert (results["best_step"], results["best_predict_rouge-l"]) == (best, values[best])


def test_the_best_model_is_that_of_the_best_predictions_on_all_workers(folder):
    best = run(folder, "best", "generate.every_steps=1", "train.max_steps=4", *BEST, *BETWEEN)
    check_best(best, [1, 2, 3, 4])
    step = json.loads((best / "train_results.json").read_text())["best_step"]
    predictions = (best / "generated_predictions.jsonl").read_text()
    assert predictions == (best / "generation" / str(step) / "generated_predictions.jsonl").read_text()


@ray.remote(num_cpus=1)
class Other:
    """Another job on the cluster."""

    def here(self) -> bool:
        return True


def test_engines_that_find_no_room_generate_while_the_training_pauses(folder, beside, capsys, monkeypatch):
    monkeypatch.setattr(step_generation, "ROOM_SECONDS", 1.0)
    other: Any = Other.remote()
    assert ray.get(other.here.remote(), timeout=60)
    try:
        paused = run(folder, "paused", "generate.every_steps=3", verb="train")
    finally:
        ray.kill(other)
    printed = capsys.readouterr().out
    assert "after every 3 steps, 2 times, by 1 engine alongside training" in printed
    assert "predictions after step 3: no engine found room next to the workers" in printed
    found = generations(paused)
    assert sorted(found) == [3, 6]
    assert scores(found[6]) == scores(generations(beside)[6])
