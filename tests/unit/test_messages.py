"""Messages as users see them, whole; all other tests assert only what a message must hold."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from raysft.cli import main
from raysft.cluster.placement import Node
from raysft.config import Config, Source, parse, with_overrides
from raysft.data.sources.files import find_files
from raysft.data.tokenization.chat_template import chat_template
from raysft.errors import RequestError
from raysft.models.resolve import find_model
from raysft.run.ownership import check_ownership, ensure_writable
from raysft.run.resources import check_resources
from raysft.storage.path import StoragePath
from raysft.storage.run_directory import RunDirectory

CONFIG = "model: {path: m}\ndata:\n  train:\n    - name: a\n      path: a.json\n"


@pytest.fixture(autouse=True)
def _here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("c.yaml").write_text(CONFIG)
    Path("twice.yaml").write_text(CONFIG + "run: {seed: 1}\nrun: {seed: 2}\n")
    Path("broken.yaml").write_text("model: {path: m\n")
    Path("dataset_info.json").write_text(json.dumps({}))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("none.yaml", "none.yaml: config file not found; use the path of a YAML file"),
        ("twice.yaml", "twice.yaml:7: duplicate key run (first on line 6); remove one of them"),
        (
            "broken.yaml",
            "broken.yaml:1: invalid YAML (expected ',' or '}', but got '<stream end>'); correct this line",
        ),
        ("c.yaml train.epoch=2", "command line: unknown key train.epoch; did you mean train.epochs?"),
        (
            "c.yaml train.rows_per_step=2",
            "command line: unknown key train.rows_per_step; it is now called train.global_batch_size",
        ),
        (
            "c.yaml train.epochs=two",
            "command line: train.epochs='two': must be a valid number",
        ),
        (
            "c.yaml train.optimizer=alice train.zero_stage=0 scaling.num_workers=2",
            "train.optimizer=alice supports one worker (each would draw its own random numbers), but "
            "scaling.num_workers=2; use 1 worker or another optimizer",
        ),
        (
            "c.yaml model.attention=flash_attention_2",
            "model.attention=flash_attention_2 requires GPUs, but scaling.use_gpu=false; use sdpa or set scaling.use_gpu=true",
        ),
        (
            "c.yaml run.storage=s3://me:word@bucket/runs",
            "command line: run.storage contains a password in a URI, but configs are copied to run directories, logs and "
            "trackers; remove it (storage uses AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, a profile, or the machine's role)",
        ),
        (
            "c.yaml generate.sources=[b]",
            "generate.sources contains 'b', but neither data.eval nor data.train has such a source; use one of a",
        ),
    ],
)
def test_a_wrong_config(capsys, arguments, message):
    assert main(["check", *arguments.split()]) == 2
    assert capsys.readouterr().err == f"raysft: error: {message}\n"


def refusal(call: Callable[..., Any], *arguments: Any) -> str:
    with pytest.raises(RequestError) as caught:
        call(*arguments)
    return str(caught.value)


def configured(**run: Any) -> Config:
    raw = {"model": {"path": "m"}, "data": {"train": [{"name": "a", "path": "a.json"}]}}
    return parse({**raw, "run": {"storage": str(Path("runs").absolute()), "name": "r", **run}})


def test_a_chat_template_that_does_not_exist():
    config = with_overrides(configured(), {"model.chat_template": "chatlm"})
    assert refusal(lambda: config.chat_template) == (
        "model.chat_template=chatlm is neither a template's name nor a readable file (No such file or directory); did you mean "
        "chatglm3? use a name that configs/README.md lists, or the path of a Jinja template"
    )


def test_a_chat_template_with_a_wrong_block():
    assert refusal(chat_template, "{% for m in messages %}\n{{ m }", {}) == (
        "the chat template is not valid Jinja (line 2: unexpected '}'); fix it, or set model.chat_template"
    )


def test_data_that_do_not_exist():
    assert refusal(find_files, Source(name="chats", path="chats/*.jsonl")) == (
        "source 'chats': chats/*.jsonl matches no file; check the path and the working directory"
    )


def test_a_model_that_does_not_exist(tmp_path):
    assert refusal(find_model, f"{tmp_path}/none", StoragePath.of(tmp_path), print) == (
        f"model.path={tmp_path}/none: folder not found; check the path, or use a Hub id"
    )
    (tmp_path / "empty").mkdir()
    assert refusal(find_model, f"{tmp_path}/empty", StoragePath.of(tmp_path), print) == (
        f"model.path={tmp_path}/empty: the folder contains no config.json; use a model folder in Hugging Face format"
    )


def test_a_cluster_that_is_too_small():
    config = with_overrides(configured(), {"scaling.num_workers": 2, "scaling.use_gpu": True})
    assert refusal(check_resources, config, [Node(cpus=8, gpus=1)]) == (
        "scaling.num_workers=2 needs 2 GPUs and 1 CPU per worker, but the cluster can place only 1 worker "
        "(node 0: 8 CPUs, 1 GPU); use scaling.num_workers=1, or add nodes"
    )


def test_a_storage_that_cannot_be_written():
    config = configured(storage=str(Path("c.yaml").absolute() / "runs"))
    assert refusal(ensure_writable, config) == (
        f"run.storage: {config.run.storage} cannot be created (Not a directory); choose another folder"
    )


def test_a_run_directory_of_another_config():
    config = configured()
    (config.run_directory / "checkpoints").mkdir(parents=True)
    (config.run_directory / "config.yaml").write_text(config.to_yaml())
    directory = RunDirectory(config.run_directory)
    other = with_overrides(config, {"model.lora.rank": 4})
    assert refusal(check_ownership, directory, other) == (
        f"{directory.place}: belongs to another config: model.lora.rank=4 (the run has 8); model.lora.rank cannot change once a "
        "run has begun: restore the old value, or choose another run.name"
    )
