"""Every verb refuses the same requests, in the same order, before anything starts."""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path

import pytest
import yaml

from raysft.cli import main
from raysft.cluster.placement import Node
from raysft.config import load
from raysft.errors import RequestError
from raysft.run import preflight, trial_plans
from raysft.tune.trials import combinations

CONFIG = {
    "run": {"name": "r", "storage": "runs"},
    "model": {"path": "./none"},
    "data": {"train": [{"name": "a", "path": "a.jsonl"}], "eval": [{"name": "b", "path": "b.jsonl"}]},
    "generate": {"metrics": ["similarity"]},
}
SWEEP = "tune.space={train.learning_rate: [1.0e-4, 1.0e-3]}"
TRAINING = ["run", "check", "prepare", "train", "tune"]
"""Verbs that need no trained model."""
EVERY = [*TRAINING, "evaluate", "generate"]


@pytest.fixture(autouse=True)
def _folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("c.yaml").write_text(yaml.safe_dump(CONFIG))


@pytest.fixture
def started(monkeypatch) -> list[str]:
    """A cluster of two CPUs that needs no Ray; holds a name for each time that it was joined."""
    started: list[str] = []

    @contextmanager
    def cluster(config, deferred=False):
        started.append(config.run.name)
        yield [Node(cpus=2.0)]

    monkeypatch.setattr(preflight, "cluster", cluster)
    return started


@pytest.fixture
def refusal(capsys) -> Callable[..., str]:
    def refusal(verb: str, *overrides: str) -> str:
        arguments = [verb, "c.yaml", *overrides, *([SWEEP] if verb == "tune" else [])]
        before = sorted(str(path) for path in Path("runs").rglob("*"))
        assert main(arguments) == 2
        line, *more = capsys.readouterr().err.splitlines()
        assert not more
        made = {str(path) for path in Path("runs").rglob("*")} - set(before)
        assert made <= {"runs/cache"}, "nothing but the cache is written to"
        return line.removeprefix("raysft: error: ")

    return refusal


def trained() -> None:
    """Leave what a training leaves."""
    folder = Path("runs/r/model")
    folder.mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    (folder.parent / "config.yaml").write_text(load("c.yaml").to_yaml())
    (folder.parent / "train_results.json").write_text(json.dumps({}))


@pytest.mark.parametrize(
    ("verb", "overrides", "remedy"),
    [
        *((verb, ["generate.model=m"], "remove generate.model, or use raysft generate") for verb in ("run", "tune")),
        *((verb, ["evaluate.model=m"], "remove evaluate.model, or use raysft evaluate")
          for verb in TRAINING if verb != "check"),
        ("check", ["evaluate.model=m", "generate.model=m"], "are both set; set one to null"),
        ("check", ["data.eval=[]", "evaluate.model=m"], "there is nothing to evaluate on; set data.eval"),
        ("check", ["data.eval=[]", "generate.model=m"], "there is nothing to generate for; set data.eval"),
        ("generate", ["evaluate.model=m"], "set generate.model, or use raysft evaluate"),
        ("evaluate", ["data.eval=[]"], "set data.eval, or data.holdout above 0"),
        ("evaluate", ["data.eval=[]", "evaluate.model=m"], "set data.eval, or data.holdout above 0"),
        ("generate", ["stage=pt"], "set stage=sft"),
        ("generate", ["generate.enabled=false"], "set it to true"),
        ("generate", ["data.eval=[]", "generate.model=m"], "set data.eval, data.holdout or generate.sources"),
        ("tune", ["tune.metric=eval_los"], "use one of eval_loss"),
    ],
)  # fmt: skip
def test_a_config_that_a_verb_can_do_nothing_with_is_refused_first(verb, overrides, remedy, refusal, started):
    assert remedy in refusal(verb, *overrides, "run.storage=c.yaml/runs")
    assert not started


@pytest.mark.parametrize("verb", ["evaluate", "generate"])
def test_what_needs_a_trained_model_is_refused_without_one(verb, refusal, started):
    assert "contains no trained model; train first" in refusal(verb, "train.trackers=[wandb]")
    assert not started


@pytest.mark.parametrize(
    ("verb", "remedy"),
    [
        ("train", "choose another run.name, or resume with --allow-changed"),
        *((verb, "restore the old value, or choose another run.name") for verb in ("evaluate", "generate")),
    ],
)
def test_a_remedy_is_an_option_that_the_verb_has(verb, remedy, refusal, started):
    trained()
    assert refusal(verb, "train.max_steps=9").endswith(f"train.max_steps=9 (the run has null); {remedy}")
    assert not started


@pytest.mark.parametrize("key", ["run.storage", "data.cache"])
@pytest.mark.parametrize("verb", TRAINING)
def test_a_folder_that_cannot_be_created_is_refused(verb, key, refusal, started):
    line = refusal(verb, f"{key}=c.yaml/x")
    assert line.startswith(f"{key}: ")
    assert line.endswith("choose another folder")
    assert not started


OTHERS = {"generate": ["generate.model=m"], "evaluate": ["evaluate.model=m"]}
"""Verb → what lets it do without a training."""


@pytest.mark.parametrize("verb", [*TRAINING, "generate", "evaluate"])
def test_a_folder_with_other_files_is_refused(verb, refusal, started):
    Path("runs/r").mkdir(parents=True)
    Path("runs/r/notes.txt").write_text("mine")
    line = refusal(verb, *OTHERS.get(verb, []))
    assert line.endswith("is not empty, but contains no config.yaml; choose another run.name")
    assert not started


@pytest.mark.parametrize("verb", [*TRAINING, "evaluate", "generate"])
def test_a_directory_of_another_config_is_refused(verb, refusal, started):
    trained()
    line = refusal(verb, "model.lora.rank=4", "generate.num_actors=9")
    assert "belongs to another config: model.lora.rank=4 (the run has 8)" in line
    assert not started


def test_the_directory_of_a_training_is_refused_for_another_model(refusal, started):
    trained()
    assert "belongs to a training run, but generate.model=m is a different model" in refusal(
        "generate", "generate.model=m"
    )
    assert "belongs to a training run, but evaluate.model=m is a different model" in refusal(
        "evaluate", "evaluate.model=m"
    )
    assert not started


@pytest.mark.parametrize("verb", ["generate", "evaluate"])
@pytest.mark.parametrize(("beside", "stage"), [("evaluate", "eval"), ("generate", "predict")])
def test_a_directory_has_results_of_one_model(verb, beside, stage, refusal, started):
    Path("runs/r").mkdir(parents=True)
    Path("runs/r/config.yaml").write_text(load("c.yaml", [f"{beside}.model=./m"]).to_yaml())
    other, same = ([f"{verb}.model={name}"] for name in ("./n", "./m"))
    assert "folder not found" in refusal(verb, *other), "it has no results yet"
    Path(f"runs/r/{stage}_results.json").write_text("{}")
    assert f"has results of {beside}.model=./m, but {verb}.model=./n is a different model" in refusal(verb, *other)
    assert "folder not found" in refusal(verb, *same)
    assert len(started) == 2


@pytest.mark.parametrize(
    ("key", "value", "lost"),
    [
        ("model.quantization", "4bit", True),
        ("model.dtype", "bfloat16", True),
        ("data.sequence_length", "99", True),
        ("data.eval", "[{name: c, path: c.jsonl}]", True),
        ("data.train", "[{name: c, path: c.jsonl}]", False),  # nothing is held out
        ("model.lora.rank", "2", False),
        ("train.learning_rate", "0.1", False),
        ("train.zero_stage", "3", False),
    ],
)
def test_results_of_other_settings_are_not_replaced(key, value, lost, refusal, started):
    Path("runs/r").mkdir(parents=True)
    Path("runs/r/config.yaml").write_text(load("c.yaml", ["evaluate.model=./m"]).to_yaml())
    Path("runs/r/eval_results.json").write_text("{}")
    line = refusal("evaluate", "evaluate.model=./m", f"{key}={value}")
    assert ("has results of evaluate.model=./m with other settings: " in line) == lost, line
    assert ("folder not found" in line) != lost


@pytest.mark.parametrize("verb", ["run", "train", "generate", "evaluate"])
def test_the_directory_of_a_sweep_is_refused_for_a_run(verb, refusal, started):
    Path("runs/r").mkdir(parents=True)
    Path("runs/r/trials.jsonl").write_text("{}\n")
    Path("runs/r/config.yaml").write_text(load("c.yaml", [SWEEP]).to_yaml())
    assert "belongs to a sweep" in refusal(verb, *OTHERS.get(verb, []))
    assert not started


def test_the_directory_of_a_training_is_refused_for_a_sweep(refusal, started):
    trained()
    assert refusal("tune").endswith("runs/r: belongs to a training; choose another run.name")
    assert not started


def test_a_trial_whose_directory_is_of_another_config_is_refused(refusal, started):
    last = Path("runs/r/trials") / combinations(load("c.yaml", [SWEEP]))[-1].name
    last.mkdir(parents=True)
    (last / "notes.txt").write_text("mine")
    Path("runs/r/config.yaml").write_text(load("c.yaml", [SWEEP]).to_yaml())
    assert "is not empty, but contains no config.yaml" in refusal("tune")
    assert not started


@pytest.mark.parametrize("verb", EVERY)
def test_packages_and_metrics_that_are_missing_are_refused(verb, refusal, started, monkeypatch):
    if verb in ("evaluate", "generate"):
        trained()
    monkeypatch.setattr(preflight, "missing_tracker", lambda names: "wandb" if "wandb" in names else None)
    line = refusal(verb, "train.trackers=[wandb]", "scaling.num_workers=9")
    assert "which is not installed; pip install 'raysft[wandb]'" in line
    Path("wrong.py").write_text("import a_package_that_is_not_there\n")
    line = refusal(verb, "generate.metrics=[wrong.py]", "scaling.num_workers=9")
    assert line.startswith("generate.metrics: 'wrong.py' cannot be loaded")
    assert not started


@pytest.mark.parametrize("verb", EVERY)
def test_workers_and_engines_that_fit_nowhere_are_refused_before_the_model_is_looked_for(verb, refusal, started):
    if verb in ("evaluate", "generate"):
        trained()
    assert "scaling.num_workers=9" in refusal(verb, "scaling.num_workers=9", "generate.num_actors=9")
    assert "generat" in refusal(verb, "generate.num_actors=9")
    assert started == ["r", "r"]


def test_generation_with_any_model_needs_engines_and_no_workers(refusal, started):
    assert "generate.num_actors=9" in refusal("generate", "generate.model=./m", "generate.num_actors=9")
    assert "generate.model=./m: folder not found" in refusal("generate", "generate.model=./m", "scaling.num_workers=9")
    assert len(started) == 2


def test_the_evaluation_of_any_model_needs_workers_and_no_engines_metrics_or_trackers(refusal, started):
    asked = ["evaluate.model=./m", "generate.num_actors=9", "generate.metrics=[wrong.py]", "train.trackers=[wandb]"]
    assert "scaling.num_workers=9" in refusal("evaluate", *asked, "scaling.num_workers=9")
    assert "evaluate.model=./m: folder not found" in refusal("evaluate", *asked)
    assert len(started) == 2


@pytest.mark.parametrize("verb", TRAINING)
def test_a_model_that_is_not_there_is_refused_before_data_is_read(verb, refusal, started):
    assert refusal(verb) == "model.path=./none: folder not found; check the path, or use a Hub id"
    assert started == ["r"]


def test_the_model_of_every_trial_is_checked_before_data_is_read(capsys, started, monkeypatch):
    checked: list[str] = []

    def check_model_files(config, notify):
        checked.append(config.model.path)
        if config.model.path == "./other":
            raise RequestError("model.path=./other: folder not found")

    monkeypatch.setattr(trial_plans, "check_model_files", check_model_files)
    assert main(["tune", "c.yaml", "tune.space={model.path: [./none, ./other]}"]) == 2
    assert checked == ["./none", "./other"]
    assert "model.path=./other" in capsys.readouterr().err
