"""Messages as users see them, whole; all other tests assert only what a message must hold."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from raysft.cli import main

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
            "command line: train.epochs='two': must be a valid integer",
        ),
        (
            "c.yaml train.optimizer=apollo train.zero_stage=0 model.finetuning=full scaling.num_workers=2",
            "train.optimizer=apollo supports one worker (each would draw its own random projections), but "
            "scaling.num_workers=2; use 1 worker or another optimizer",
        ),
        (
            "c.yaml model.attention=flash_attention_2",
            "model.attention=flash_attention_2 requires GPUs, but scaling.use_gpu=False; use sdpa or set scaling.use_gpu=true",
        ),
        (
            "c.yaml run.storage=s3://me:word@bucket/runs",
            "command line: run.storage contains a password in a URI, but configs are copied to run directories, logs and "
            "trackers; remove it (storage uses AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, a profile, or the machine's role)",
        ),
        (
            "c.yaml generate.sources=[b]",
            "generate.sources contains 'b', but neither data.eval nor data.train has such a source; use names of a",
        ),
    ],
)
def test_a_wrong_config(capsys, arguments, message):
    assert main(["check", *arguments.split()]) == 2
    assert capsys.readouterr().err == f"raysft: error: {message}\n"
