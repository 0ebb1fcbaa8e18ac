"""The layout of a run directory."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from raysft.storage.json_files import write_json
from raysft.storage.local_cache import working_copy
from raysft.storage.path import StoragePath

MODEL_MARKS = ("adapter_config.json", "config.json")
"""A complete model folder has one of these; they are written last."""
GENERATION = "generation"
"""The folder of the predictions that are made during the training."""
STOP_FILE = "stop"
"""The file that asks a run to end; who starts the run removes it."""


def is_complete(model: StoragePath) -> bool:
    """Return True if a model folder is complete."""
    return any((model / mark).exists() for mark in MODEL_MARKS)


@dataclass(frozen=True)
class RunDirectory:
    """The files of a run, named as LLaMA-Factory names them where it has them."""

    path: Path
    """Local folder of the small files: the run directory, or the working copy of a remote one."""
    remote: StoragePath | None = None
    """The run directory if it is in an object store."""

    @classmethod
    def of(cls, place: StoragePath) -> RunDirectory:
        """Return the run directory at a path or URI."""
        return cls(place.local) if place.local else cls(working_copy(place), place)

    @property
    def place(self) -> StoragePath:
        """The run directory, local or remote."""
        return self.remote or StoragePath.of(self.path)

    @property
    def config(self) -> Path:
        """The resolved config."""
        return self.path / "config.yaml"

    @property
    def plan(self) -> Path:
        """Rows, steps, tokens, padding, resources and resolved settings, as planned before the start."""
        return self.path / "plan.json"

    @property
    def trainer_log(self) -> Path:
        """One record per step (``StepRecord``) and per evaluation."""
        return self.path / "trainer_log.jsonl"

    @property
    def trainer_state(self) -> Path:
        """The log history in Hugging Face's format."""
        return self.path / "trainer_state.json"

    @property
    def changes(self) -> Path:
        """Settings and data that changed when the run resumed."""
        return self.path / "changes.jsonl"

    @property
    def diagnosis(self) -> Path:
        """Workers that were slow or made no progress: a line each, with the step. Stacks are in the folder ``diagnosis``."""
        return self.path / "diagnosis.jsonl"

    @property
    def stacks(self) -> StoragePath:
        """Stacks of workers that made no progress."""
        return self.place / "diagnosis"

    @property
    def rejected(self) -> Path:
        """Records that could not be used."""
        return self.path / "rejected.jsonl"

    @property
    def prompts(self) -> Path:
        """Prompts and references of the evaluation sets, tokenized."""
        return self.path / "prompts.parquet"

    @property
    def predictions(self) -> Path:
        """Predictions of the trained model, a line each: ``{"prompt", "predict", "label", "id", "source"}``."""
        return self.path / "generated_predictions.jsonl"

    @property
    def base_predictions(self) -> Path:
        """Predictions of the model before training, in the same format."""
        return self.path / "generated_predictions_base.jsonl"

    @property
    def metrics(self) -> Path:
        """Metrics of the predictions: one line for each metric, source and model."""
        return self.path / "metrics.jsonl"

    @property
    def trials(self) -> Path:
        """What became of each trial; only a sweep's run directory has it."""
        return self.path / "trials.jsonl"

    @property
    def checkpoints(self) -> StoragePath:
        """Checkpoints to resume from."""
        return self.place / "checkpoints"

    @property
    def model(self) -> StoragePath:
        """The trained model or adapter; loads with transformers or peft."""
        return self.place / "model"

    @property
    def best(self) -> StoragePath:
        """The model of the best evaluation so far, during training."""
        return self.place / ".best"

    def generation(self, step: int) -> RunDirectory:
        """Return the folder of a step's predictions, whose files have the names of a run's."""
        remote = self.remote / GENERATION / str(step) if self.remote else None
        return RunDirectory(self.path / GENERATION / str(step), remote)

    def step_model(self, step: int) -> StoragePath:
        """Return the folder of a step's model, which exists until its predictions are scored."""
        return self.generation(step).model

    def is_trained(self) -> bool:
        """Return True if there is a trained model."""
        return is_complete(self.model)

    def is_done(self) -> bool:
        """Return True if the training ended, and its model and results are written."""
        return self.results("train").exists() and self.is_trained()

    @property
    def model_card(self) -> Path:
        """The model card."""
        return self.path / "README.md"

    @property
    def page(self) -> Path:
        """The report as one HTML page."""
        return self.path / "report.html"

    def results(self, stage: Literal["train", "eval", "predict", "all"]) -> Path:
        """``train_results.json`` and its like."""
        return self.path / f"{stage}_results.json"

    def read_results(self, stage: Literal["train", "eval", "predict", "all"]) -> dict[str, Any]:
        """Return the results of a stage; empty if it has not run."""
        path = self.results(stage)
        return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}

    def write_results(self, stage: Literal["train", "eval", "predict"], results: Mapping[str, Any]) -> None:
        """Write a stage's results, and the union of all stages' results (``all_results.json``)."""
        write_json(self.results(stage), results)
        union: dict[str, Any] = {}
        for other in ("train", "eval", "predict"):
            union.update(self.read_results(other))
        write_json(self.results("all"), union)
