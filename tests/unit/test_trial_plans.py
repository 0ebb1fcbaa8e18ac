"""The trials of a sweep before the first of them starts: which of them are estimated, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from raysft.cluster.placement import Node
from raysft.config import Config, parse, with_overrides
from raysft.estimate.hardware import NodeMemory
from raysft.estimate.measure import Microbatch, measure
from raysft.estimate.setup import setup_of
from raysft.run import needs
from raysft.run.trial_plans import UNRELATED, memory_key, plan_trials
from raysft.tune.trials import combinations
from tests.messages import holds, refusal
from tests.tiny import tiny_model, write_chats

MIB = 1 << 20


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("plans")
    tiny_model(folder / "model")
    write_chats(folder / "chats.jsonl", 60)
    return folder


def config_of(folder: Path, space: dict[str, Any], **settings: Any) -> Config:
    config = parse(
        {
            "run": {"name": "s", "storage": str(folder / "runs")},
            "model": {"path": str(folder / "model"), "finetuning": "lora"},
            "data": {"train": [{"name": "chats", "path": str(folder / "chats.jsonl")}], "sequence_length": 64},
            "train": {"global_batch_size": 16, "micro_batch_size": 1, "zero_stage": 0},
            "scaling": {"address": "local", "num_workers": 1},
            "generate": {"enabled": False},
            "tune": {"space": space},
        }
    )
    return with_overrides(config, {key.replace("__", "."): value for key, value in settings.items()})


def plans(config: Config):
    return plan_trials(
        [trial.config for trial in combinations(config)], [Node(2.0)], tuple(config.tune.space), lambda _: None
    )


@pytest.fixture
def estimated(monkeypatch) -> list[tuple[int, int, int]]:
    """Rows of a microbatch, rank and ZeRO stage of every training that is estimated, on a node of 64 GiB."""
    found: list[tuple[int, int, int]] = []
    estimate = needs.estimate

    def counted(training, place):
        config = training.config
        found.append((training.rows, config.model.lora.rank, config.train.zero_stage))
        return estimate(training, place)

    monkeypatch.setattr(needs, "estimate", counted)
    monkeypatch.setattr(needs, "surely_small", lambda *_: False)
    monkeypatch.setattr(needs, "smallest_node", lambda *_: (Node(2.0), NodeMemory(64 << 30)))
    return found


def test_only_the_trials_that_need_the_most_are_estimated(folder, estimated):
    space = {
        "train.learning_rate": [1e-5, 1e-4, 1e-3],
        "train.micro_batch_size": [4, 1, 2],
        "model.lora.rank": [2, 8, 4],
    }
    (run,) = plans(config_of(folder, space))
    # Four rows need the most and accumulate gradients, as one and two do.
    assert estimated == [(4, 8, 0)]
    assert [
        line for line in run.plan.needs if line.startswith("train.micro_batch_size=4, model.lora.rank=8: memory: about")
    ]
    estimated.clear()
    plans(config_of(folder, {**space, "train.micro_batch_size": [8, 16]}))
    assert sorted(estimated) == [(8, 8, 0), (16, 8, 0)], "16 rows need no gradients of an earlier microbatch"


def test_trials_that_differ_otherwise_are_estimated_apart(folder, estimated):
    (run,) = plans(config_of(folder, {"train.zero_stage": [0, 2], "train.learning_rate": [1e-5, 1e-4]}))
    assert estimated == [(1, 8, 0), (1, 8, 2)]
    assert [line.partition(": ")[0] for line in run.plan.needs if "memory" in line] == [
        "train.zero_stage=0",
        "train.zero_stage=2",
    ]
    estimated.clear()
    (run,) = plans(config_of(folder, {"train.learning_rate": [1e-5, 1e-4]}))
    assert len(estimated) == 1
    assert run.plan.needs[0].startswith("memory: about"), "what all trials need has no values"


def test_a_trial_that_surely_cannot_fit_is_refused_with_its_values(folder, monkeypatch):
    """Weights and states of the tiny model take 0.4 MB with LoRA, and a row keeps about as much."""
    monkeypatch.setattr(needs, "smallest_node", lambda *_: (Node(2.0), NodeMemory(4 * MIB)))
    monkeypatch.setattr("raysft.estimate.memory.PROCESS", 0)
    plans(config_of(folder, {"train.micro_batch_size": [1, 2]}))
    space = {"train.learning_rate": [1e-5, 1e-4], "train.micro_batch_size": [1, 16]}
    message = refusal(plans, config_of(folder, space))
    assert holds(
        message,
        "tune.space: train.micro_batch_size=16: a microbatch of 16 rows needs at least … MiB of memory for each worker … "
        "use train.micro_batch_size= … , or leave such values out",
    )


def test_every_number_of_steps_is_planned(folder):
    """A scheduler must know the most steps of any trial."""
    runs = plans(
        config_of(folder, {"train.epochs": [1, 3], "train.global_batch_size": [4, 16], "train.learning_rate": [1, 2]})
    )
    steps = [run.plan.steps for run in runs]
    assert len(steps) == 4
    assert steps[2] == pytest.approx(3 * steps[0], abs=2)
    assert steps[0] > steps[1]


OTHER_VALUES = {
    "train.learning_rate": 0.5, "train.weight_decay": 0.5, "train.betas": [0.5, 0.5], "train.epsilon": 1e-3,
    "train.max_grad_norm": 9.0, "train.schedule": "constant", "train.warmup_ratio": 0.5, "train.neftune_alpha": 5.0,
    "train.warmup_steps": 3, "train.eval_every_epochs": 1, "train.eval_delay": 2,
    "train.eval_every_steps": 7, "train.max_failures": 9, "train.trackers": [], "model.lora.alpha": 99.0,
    "model.lora.rslora": True, "model.lora.loraplus_ratio": 4.0, "run.seed": 9,
    "train.compile": True,
}  # fmt: skip


def test_settings_that_count_as_unrelated_change_no_estimate(folder, tmp_path):
    from transformers import AutoConfig

    config = config_of(folder, {})
    hf_config = AutoConfig.from_pretrained(folder / "model")
    other = with_overrides(config, OTHER_VALUES)
    assert memory_key(config) == memory_key(other)
    assert {key for key in OTHER_VALUES if key not in UNRELATED} == {"run.seed"}
    apart = with_overrides(other, {"data.cache": str(tmp_path)})  # where nothing is known of the model
    expected, found = (measure(one, hf_config, None, Microbatch(64, 0.5)) for one in (config, apart))
    assert expected == found
    assert setup_of(config, 1, 16) == setup_of(other, 1, 16)
    assert memory_key(config) != memory_key(with_overrides(config, {"train.optimizer": "adafactor"}))


def test_a_trial_whose_best_model_would_never_have_a_score_is_refused(folder):
    settings = {
        "generate__enabled": True, "data__holdout": 0.2, "train__max_steps": 4, "train__keep_best": True,
        "train__best_metric": "predict_rouge-l", "generate__every_steps": 2, "tune__metric": "predict_rouge-l",
    }  # fmt: skip
    assert plans(config_of(folder, {"generate.every_steps": [1, 4]}, **settings))
    refused = refusal(plans, config_of(folder, {"generate.every_steps": [4, 5]}, **settings))
    assert holds(refused, "train.best_metric=predict_rouge-l … 5 steps … 4 in all … generate.every_steps=5")
