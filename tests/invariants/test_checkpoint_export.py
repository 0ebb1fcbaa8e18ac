"""The model of a checkpoint is the one that a run which ends after that step writes, byte for byte."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from raysft.storage.run_directory import RunDirectory
from raysft.train.checkpoint.resume import ResumePoint
from raysft.train.job import TrainJob
from raysft.train.restore import for_reading, write_model
from tests.training import Case, Result, make_config, prepare, rows_of, train_all

STEP = 2
"""The step whose checkpoint is exported."""
LORA = {"model.finetuning": "lora"}
HALF = {"model.dtype": "bfloat16"}
CASES: dict[str, dict[str, Any]] = {
    "full": {},
    "full, ZeRO 3": {"train.zero_stage": 3},
    "full in bfloat16, ZeRO 1": HALF,
    "full in bfloat16, ZeRO 2": {**HALF, "train.zero_stage": 2},
    "full in bfloat16, ZeRO 3": {**HALF, "train.zero_stage": 3},
    "full, float32 weights for bfloat16": {**HALF, "train.optimizer": "muon"},
    "schedule-free": {"train.optimizer": "schedulefree_adamw"},
    "schedule-free in bfloat16, ZeRO 2": {**HALF, "train.optimizer": "schedulefree_adamw", "train.zero_stage": 2},
    "schedule-free lora in bfloat16, ZeRO 3": {
        **LORA, **HALF, "train.optimizer": "schedulefree_sgd", "train.zero_stage": 3,
    },
    "schedule-free, all in bfloat16": {**HALF, "train.optimizer": "schedulefree_radam", "train.pure_bf16": True},
    "splus": {"train.optimizer": "splus"},
    "freeze": {"model.finetuning": "freeze", "model.freeze.layers": 1, "model.freeze.extra_modules": ["embed_tokens"]},
    "lora": LORA,
    "lora in bfloat16": {**LORA, **HALF},
    "lora in bfloat16, ZeRO 3": {**LORA, **HALF, "train.zero_stage": 3},
    "lora and a whole module": {**LORA, "model.lora.target": ["q_proj"], "model.lora.extra_modules": ["norm"]},
    "dora": {**LORA, "model.lora.dora": True},
    "pissa": {**LORA, "model.lora.pissa": True, "train.learning_rate": 1e-3},
    "oft": {"model.finetuning": "oft", "model.oft.block_size": 16},
    "lora on 4 bits": {**LORA, "model.quantization": "4bit"},
}  # fmt: skip
WORKERS = (1, 2)


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    return prepare(tmp_path_factory.mktemp("checkpoints"))


def config_of(prepared, name: str, steps: int):
    folder, model, _ = prepared
    settings = {**CASES[name], "train.max_steps": steps, "train.save_every_steps": STEP}
    return make_config(folder, model, settings, schedule="constant")


@pytest.fixture(scope="module")
def trained(prepared) -> dict[tuple[str, int], tuple[Path, Result]]:
    """(case, workers) → a checkpoint of a longer run, and the run that ended after its step."""
    folder, _, manifest = prepared
    found, few = {}, rows_of(manifest, steps=1)
    for world in WORKERS:
        names = [name for name in CASES if world == 1 or "bits" not in name]
        cases = []
        for name in names:
            kept = folder / f"{name} {world}"
            cases += [
                Case(config_of(prepared, name, STEP + 1), rows_of(manifest, steps=STEP + 1), keep=kept, eval_rows=few),
                Case(config_of(prepared, name, STEP), rows_of(manifest, steps=STEP), eval_rows=few),
            ]
        results = train_all(cases, world)
        for name, ended in zip(names, results[1::2], strict=True):
            found[name, world] = (folder / f"{name} {world}" / f"checkpoint_{STEP}", ended)
    return found


def job_of(prepared, name: str, folder: Path) -> TrainJob:
    config = for_reading(config_of(prepared, name, STEP + 1))
    return TrainJob(config, str(prepared[1]), RunDirectory(folder), None, {})


@pytest.mark.parametrize("world", WORKERS)
@pytest.mark.parametrize("name", CASES)
def test_the_model_of_a_checkpoint_is_that_of_a_run_which_ended_there(prepared, trained, tmp_path, name, world):
    if (name, world) not in trained:
        pytest.skip("quantized weights are trained by one worker here")
    checkpoint, ended = trained[name, world]
    write_model(job_of(prepared, name, tmp_path), ResumePoint.of(checkpoint), tmp_path / "model")
    (file,) = (tmp_path / "model").glob("*model.safetensors")
    written, wanted = load_file(file), load_file(ended.model / file.name)
    assert written.keys() == wanted.keys()
    for key, weight in wanted.items():
        assert written[key].dtype == weight.dtype, key
        assert torch.equal(written[key], weight), key
    assert described(tmp_path / "model") == described(ended.model)


def described(folder: Path) -> dict[str, Any]:
    """Everything beside the weights; peft writes sets of modules in any order."""
    found: dict[str, Any] = {path.name: path.read_text() for path in folder.iterdir() if path.suffix != ".safetensors"}
    if adapter := found.pop("adapter_config.json", None):
        values = json.loads(adapter)
        found["adapter"] = {**values, "target_modules": sorted(values["target_modules"])}
    return found
