"""The nouns that stages hand to each other, and the layout of a run directory."""

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
"""What a model's folder holds one of, once it is whole."""


def is_whole(model: StoragePath) -> bool:
    """Whether a model's folder is there as it was written."""
    return any((model / mark).exists() for mark in MODEL_MARKS)


@dataclass(frozen=True)
class RunDirectory:
    """The files of a run, by the names that LLaMA-Factory's users know."""

    path: Path
    """Where the small ones are read and written: the folder itself, or the working copy of one elsewhere."""
    remote: StoragePath | None = None
    """The folder itself where it is in an object store."""

    @classmethod
    def of(cls, place: StoragePath) -> RunDirectory:
        """The run directory at a place."""
        return cls(place.local) if place.local else cls(working_copy(place), place)

    @property
    def place(self) -> StoragePath:
        """The folder itself, with checkpoints and model."""
        return self.remote or StoragePath.of(self.path)

    @property
    def config(self) -> Path:
        """The resolved config."""
        return self.path / "config.yaml"

    @property
    def plan(self) -> Path:
        """Rows, steps, tokens, padding and resources, as planned before the start."""
        return self.path / "plan.json"

    @property
    def trainer_log(self) -> Path:
        """One record for each step (``StepRecord``) and each evaluation."""
        return self.path / "trainer_log.jsonl"

    @property
    def trainer_state(self) -> Path:
        """The log history in Hugging Face's form."""
        return self.path / "trainer_state.json"

    @property
    def changes(self) -> Path:
        """What the run went on with although it was begun with something else, each time."""
        return self.path / "changes.jsonl"

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
        """``{"prompt", "predict", "label", "id", "source"}`` a line, of the trained model."""
        return self.path / "generated_predictions.jsonl"

    @property
    def base_predictions(self) -> Path:
        """The same of the model before training."""
        return self.path / "generated_predictions_base.jsonl"

    @property
    def metrics(self) -> Path:
        """Metrics of the predictions: one line for each metric, source and model."""
        return self.path / "metrics.jsonl"

    @property
    def checkpoints(self) -> StoragePath:
        """Checkpoints to resume from."""
        return self.place / "checkpoints"

    @property
    def model(self) -> StoragePath:
        """The trained model or adapter, loads with transformers or peft."""
        return self.place / "model"

    @property
    def best(self) -> StoragePath:
        """The model of the best evaluation so far, while the training goes on."""
        return self.place / ".best"

    def is_trained(self) -> bool:
        """Whether there is a trained model."""
        return is_whole(self.model)

    def is_done(self) -> bool:
        """Whether the training came to its end, with its model and its results written."""
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
        """The results of a stage; empty where it has not run."""
        path = self.results(stage)
        return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}

    def write_results(self, stage: Literal["train", "eval", "predict"], results: Mapping[str, Any]) -> None:
        """Write a stage's results and the union of all stages' (``all_results.json``)."""
        write_json(self.results(stage), results)
        whole: dict[str, Any] = {}
        for each in ("train", "eval", "predict"):
            whole.update(self.read_results(each))
        write_json(self.results("all"), whole)
