"""Folders with a model, data and a config for sweeps of a tiny model."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from tests.tiny import tiny_model
from tests.training import conversations


def write_sweep(
    folder: Path, rates: Sequence[float], examples: int, train: Mapping[str, Any], generate: Mapping[str, Any]
) -> None:
    """Write ``sweep.yaml``, and the model and the data that it names.

    Args:
        folder: the folder, which relative paths in the config start from.
        rates: learning rates of the trials.
        examples: number of conversations to train on.
        train: settings of ``train`` beside those that all have.
        generate: the section.
    """
    tiny_model(folder / "base")
    for name, count in (("chat", examples), ("held", 8)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(record) + "\n" for record in conversations(count)))
    config = {
        "run": {"storage": f"{folder}/runs", "seed": 1},
        "model": {"path": f"{folder}/base", "finetuning": "full"},
        "data": {
            "train": [{"name": "chat", "path": "chat.jsonl"}],
            "eval": [{"name": "held", "path": "held.jsonl"}],
            "sequence_length": 128,
        },
        "train": {
            "epochs": 10,
            "global_batch_size": 2,
            "zero_stage": 0,
            "schedule": "constant",
            "warmup_ratio": 0,
            "trackers": [],
            **train,
        },
        "scaling": {"threads_per_worker": 1},
        "generate": dict(generate),
        "tune": {"space": {"train.learning_rate": list(rates)}, "max_concurrent": 1},
    }
    (folder / "sweep.yaml").write_text(yaml.safe_dump(config))
