"""Sweeps through the command line, on a local Ray cluster of 2 CPUs, with a tiny model."""

import json
import shutil
from pathlib import Path

import pytest

from raysft.cli import main
from raysft.config import load
from tests.tiny import SENTENCES, tiny_model

RATES = [1.0e-5, 1.0e-2]
CONFIG = """
run: {{storage: {folder}/runs, seed: 1}}
model: {{path: {folder}/base, finetuning: full}}
data:
  train: [{{name: chat, path: chat.jsonl}}]
  eval: [{{name: held, path: held.jsonl}}]
  sequence_length: 128
train: {{max_steps: 4, global_batch_size: 2, zero_stage: 0, schedule: constant, warmup_ratio: 0}}
scaling: {{threads_per_worker: 1}}
generate: {{compare_base: false, max_examples: 2, max_new_tokens: 4, do_sample: false}}
tune: {{space: {{train.learning_rate: {rates}}}}}
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A tiny model, and conversations that a config there names by relative paths."""
    folder = tmp_path_factory.mktemp("tune")
    tiny_model(folder / "base")
    words = " ".join(SENTENCES).split()
    for name, count in (("chat", 40), ("held", 4)):
        with (folder / f"{name}.jsonl").open("w") as file:
            for index in range(count):
                texts = (" ".join(words[index % 40 :][:4]), " ".join(words[index * 7 % 40 :][:5]))
                turns = [
                    {"role": role, "content": text} for role, text in zip(("user", "assistant"), texts, strict=True)
                ]
                file.write(json.dumps({"messages": turns}) + "\n")
    (folder / "sweep.yaml").write_text(CONFIG.format(folder=folder, rates=RATES))
    return folder


@pytest.fixture(autouse=True)
def _in_folder(folder, monkeypatch):
    monkeypatch.chdir(folder)


@pytest.fixture(scope="module")
def sweep(local_ray, folder) -> Path:
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        assert main(["tune", "sweep.yaml"]) == 0
    return folder / "runs" / "sweep"


def test_the_best_config_holds_the_better_rate(sweep):
    results = json.loads((sweep / "tune_results.json").read_text())
    assert (results["metric"], results["mode"]) == ("eval_loss", "min")
    losses = {trial["config"]["train.learning_rate"]: trial["eval_loss"] for trial in results["trials"]}
    assert set(losses) == set(RATES)
    best = load(sweep / "best.yaml")
    assert "best eval_loss" in (sweep / "sweep.html").read_text()
    assert best.train.learning_rate == min(RATES, key=losses.__getitem__) == 1e-2
    assert losses[1e-2] < losses[1e-5] - 0.1
    assert best.run.name == "sweep-best"
    assert best.tune.space == {}


def test_every_trial_is_a_whole_run_and_all_share_the_shards(sweep):
    trials = sorted((sweep / "trials").iterdir())
    assert len(trials) == 2
    for trial in trials:
        assert {"all_results.json", "generated_predictions.jsonl", "model", "README.md"} <= {
            p.name for p in trial.iterdir()
        }
        sources = json.loads((trial / "plan.json").read_text())["sources"]
        assert sources["chat"]["reused"]
    cache = sweep.parent / "cache" / "shards"
    assert sorted(path.name.partition("-")[0] for path in cache.iterdir()) == ["chat", "held"]
    assert len(list(cache.glob("*/*.parquet"))) == 4  # a manifest and a shard of each


def test_only_the_first_trial_evaluates_the_model_that_all_start_from(sweep):
    (kept,) = (sweep.parent / "cache" / "evaluations").iterdir()
    firsts = [json.loads(log.read_text().splitlines()[0]) for log in sweep.glob("trials/*/trainer_log.jsonl")]
    assert len(firsts) == 2
    for first in firsts:
        assert first["current_steps"] == 0
        assert first["eval_loss"] == json.loads(kept.read_text())["evaluation"]["loss"]
    begun = max(config.stat().st_mtime_ns for config in sweep.glob("trials/*/config.yaml"))
    assert kept.stat().st_mtime_ns < begun, "the second trial has computed it again"


def test_a_sweep_started_again_runs_only_what_is_missing(sweep, folder, capsys):
    logs = {log: log.stat().st_mtime_ns for log in sweep.glob("trials/*/trainer_log.jsonl")}
    before = (sweep / "tune_results.json").read_text()
    assert main(["tune", "sweep.yaml"]) == 0
    assert {log: log.stat().st_mtime_ns for log in sweep.glob("trials/*/trainer_log.jsonl")} == logs
    assert (sweep / "tune_results.json").read_text() == before
    shown = capsys.readouterr()
    assert shown.err == ""
    words = [line.split()[0] for line in shown.out.splitlines()]
    assert [word for word in words if word != "warning:"] == (
        ["train", "eval", "turns:", "rows:", "steps:", "resources:", "tune:", "eval_loss", "eval_loss", "best", "page:"]
    )


def refused(capsys, *overrides: str) -> str:
    """The one line that says why a sweep was not begun."""
    assert main(["tune", "sweep.yaml", "run.name=refused", *overrides]) == 2
    line, *more = capsys.readouterr().err.splitlines()
    assert not more
    assert not Path("runs/refused").exists()
    return line


@pytest.mark.parametrize(
    ("override", "reason"),
    [
        ("tune.space={train.learning_rat: [1]}", "tune.space: unknown key train.learning_rat; did you mean"),
        ("tune.space={train.learning_rate: [1, fast]}", "tune.space: train.learning_rate='fast': "),
        ("tune.space={run.name: [a, b]}", "run.name is the same for all trials"),
        ("tune.space={train.max_steps: [1, 1]}", "has train.max_steps=1 twice"),
        ("tune.space={}", "tune.space is empty"),
        ("tune.metric=eval_los", "tune.metric='eval_los' is not a result of these runs; use one of eval_loss, "),
    ],
)
def test_a_wrong_sweep_is_one_line(override, reason, capsys):
    assert reason in refused(capsys, override)


@pytest.mark.usefixtures("local_ray")
@pytest.mark.parametrize(
    ("override", "reason"),
    [
        ("scaling.num_workers=3", "scaling.num_workers=3 needs 1 CPU per worker"),
        ("tune.space={scaling.num_workers: [1, 3]}", "scaling.num_workers=3 needs 1 CPU per worker"),
        ("scaling.cpus_per_worker=1.45", "leave no CPU for data tasks"),
        ("generate.num_actors=2", "generation in a trial needs 2 whole CPUs"),
    ],
)
def test_a_trial_that_never_fits_is_refused(override, reason, capsys):
    assert reason in refused(capsys, override)


@pytest.mark.parametrize("recorded", [True, False])
def test_a_metric_that_no_run_gives_ends_the_sweep_with_the_first_trial(sweep, capsys, recorded):
    """Known from the record, or without one, when the first trial has ended."""
    shutil.copytree(sweep, sweep.with_name("metric"))
    if not recorded:
        (sweep.with_name("metric") / "trials.jsonl").unlink()
    assert main(["tune", "sweep.yaml", "run.name=metric", "tune.metric=train_los"]) == 2
    shown = capsys.readouterr()
    line, *more = shown.err.splitlines()
    assert not more
    assert line.startswith(
        "raysft: error: tune.metric='train_los' is not a result of these runs; use one of epoch, eval_accuracy, "
    )
    assert shown.out.count("started: ") == (0 if recorded else 1)
    shutil.rmtree(sweep.with_name("metric"))


def test_a_trial_that_fails_is_one_line_and_the_others_count(sweep, capsys):
    """With the rate of 1e30 the loss is not finite; the other trials are done already."""
    shutil.copytree(sweep, sweep.with_name("fails"))
    space = f"tune.space={{train.learning_rate: {[*RATES, 1.0e30]}}}"
    quick = ["generate.enabled=false", "scaling.cpus_per_worker=0.4", "train.max_failures=0"]
    assert main(["tune", "sweep.yaml", "run.name=fails", space, *quick]) == 1
    shown = capsys.readouterr()
    line, *more = shown.err.splitlines()
    assert not more
    assert line.startswith("raysft: failed: 1 of 3 trials failed (step ")
    assert "best.yaml is the best of the others" in line
    assert "3 trials, 2 at a time" in shown.out
    assert load(sweep.with_name("fails") / "best.yaml").train.learning_rate == 1e-2
