"""Run directories with results of ``evaluate.model`` and ``generate.model``: what may be written beside them or in their place."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from raysft.cli import main
from raysft.config import load
from raysft.errors import RequestError
from raysft.models.resolve import find_model
from raysft.run.other_model import refuse_directory
from raysft.storage.path import StoragePath
from raysft.storage.run_directory import RunDirectory

CONFIG = """
run: {{name: quiz, storage: {folder}/runs}}
model: {{path: {folder}/base}}
data: {{train: [{{name: chat, path: chat.jsonl}}], eval: [{{name: quiz, path: quiz.jsonl}}], cache: {folder}/cache}}
scaling: {{use_gpu: false}}
"""


@pytest.fixture
def folder(tmp_path) -> Path:
    (tmp_path / "c.yaml").write_text(CONFIG.format(folder=tmp_path))
    return tmp_path


def record(folder: Path, verb: str, *settings: str) -> dict[str, bytes]:
    """Write a run directory as a verb leaves it; return its files."""
    run = folder / "runs" / "quiz"
    run.mkdir(parents=True)
    (run / "config.yaml").write_text(
        load(str(folder / "c.yaml"), [f"{verb}.model={folder}/other", *settings]).to_yaml()
    )
    (run / "plan.json").write_text("{}")
    results = {"evaluate": "eval_results.json", "generate": "predict_results.json"}[verb]
    (run / results).write_text(json.dumps({"eval_loss": 1.0}))
    return files(folder)


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in (folder / "runs" / "quiz").iterdir()}


def may(folder: Path, verb: str, *settings: str) -> None:
    """Ask whether a verb may write into the directory."""
    config = load(str(folder / "c.yaml"), list(settings))
    refuse_directory(RunDirectory.of(StoragePath.of(folder / "runs" / "quiz")), config, verb)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("theirs", "had", "command", "said"),
    [
        ("evaluate", [], ["generate", "model.quantization=8bit"], "with other settings: model.quantization='8bit'"),
        ("evaluate", [], ["generate", "data.keep_prompt=tail"], "with other settings: data.keep_prompt='tail'"),
        ("generate", [], ["evaluate", "model.dtype=bfloat16"], "with other settings: model.dtype='bfloat16'"),
        ("evaluate", ["data.eval.0.num_samples=3"], ["evaluate", "run.seed=7"], "with other settings: run.seed=7"),
        ("evaluate", [], ["train"], "which a training would replace"),
        ("generate", [], ["run"], "which a training would replace"),
    ],
)
def test_results_are_not_replaced_by_others(folder, capsys, theirs, had, command, said):
    kept = record(folder, theirs, *had)
    verb, *settings = command
    model = [] if verb in ("train", "run") else [f"{verb}.model={folder}/other"]
    assert main([verb, str(folder / "c.yaml"), *model, *had, *settings]) == 2
    error = capsys.readouterr().err
    assert f"runs/quiz: has results of {theirs}.model={folder}/other" in error
    assert said in error
    assert "choose another run.name" in error
    assert error.count("\n") == 1
    assert files(folder) == kept


def test_what_changes_no_result_may_change(folder, monkeypatch):
    record(folder, "evaluate")
    monkeypatch.chdir(folder)
    may(folder, "evaluate", "evaluate.model=other/", "run.seed=7", "data.train=[{name: more, path: more.jsonl}]")
    may(folder, "generate", f"generate.model={folder}/./other", "generate.temperature=0.5", "data.shuffle=false")


@pytest.mark.parametrize(
    ("given", "remedy"),
    [
        ("", "contains no adapter_config.json or config.json; use the trained model of this run, {run}/model"),
        (
            "/checkpoints/2",
            "folder not found; export this checkpoint (raysft export {run}/checkpoints/2 --output DIR), and use",
        ),
        (
            "/checkpoints/checkpoint_00000002_abcd",
            "export this checkpoint (raysft export {run}/checkpoints/checkpoint_0000",
        ),
        ("/other", "folder not found; check the path, or use a Hub id"),
    ],
)
def test_a_run_in_place_of_a_model_says_what_to_use(folder, given, remedy):
    run = folder / "runs" / "trained"
    for name in ("model", "checkpoints/checkpoint_00000002_abcd"):
        (run / name).mkdir(parents=True)
    (run / "config.yaml").write_text("run: {name: trained}\n")
    for key in ("evaluate.model", "generate.model"):
        with pytest.raises(RequestError) as refused:
            find_model(f"{run}{given}", StoragePath.of(folder / "cache"), print, key, accept_adapter=True)
        assert str(refused.value).startswith(f"{key}={run}{given}: ")
        assert remedy.format(run=run) in str(refused.value)
