"""Which settings belong to an evaluation of the untrained model."""

import pytest

from raysft.config import Config, documented_fields, parse, with_overrides
from raysft.config.evaluation_effects import BEARINGS, Bearing
from raysft.config.resume_effects import EFFECTS, Effect

BASE = {"model": {"path": "m"}, "data": {"train": [{"name": "a", "path": "a"}], "holdout": 0.1}}


def config(**settings) -> Config:
    return with_overrides(parse(BASE), settings) if settings else parse(BASE)


def test_every_key_of_the_config_is_decided_and_none_else():
    documented = [key for key, _, _ in documented_fields()]
    assert sorted(documented) == sorted(BEARINGS)


def test_what_fixes_a_run_is_excluded_only_for_a_reason():
    """Keys that cannot change at a resume decide what is computed; those that count as settings here are the rest."""
    fixed = {key for key, effect in EFFECTS.items() if effect is Effect.NEVER}
    assert {key for key in fixed if BEARINGS[key] is Bearing.NONE} == {"train.global_batch_size"}


CHANGED = {
    "stage": "pt",
    "model.dtype": "bfloat16",
    "model.finetuning": "full",
    "model.lora.target": ["q_proj"],
    "model.lora.dora": True,
    "model.lora.pissa": True,
    "model.quantization": "4bit",
    "model.attention": "eager",
    "data.sequence_length": 64,
    "data.packing": False,
    "train.micro_batch_size": 2,
    "train.zero_stage": 3,
    "train.optimizer": "adafactor",
    "train.gradient_checkpointing": True,
    "train.deepspeed": {"zero_allow_untested_optimizer": True},
    "scaling.use_gpu": True,
}
"""Settings with other values, each of which may change the evaluation."""


@pytest.mark.parametrize("key", CHANGED)
def test_a_setting_that_may_change_the_evaluation_is_part_of_it(key):
    settings = {key: CHANGED[key], **({"train.zero_stage": 0} if key == "train.optimizer" else {})}
    assert config(**settings).evaluation_keys() != config().evaluation_keys()


@pytest.mark.parametrize(
    ("settings", "part"),
    [
        ({}, False),
        ({"model.finetuning": "full"}, False),
        ({"model.finetuning": "freeze"}, False),
        ({"model.adapters": ["old"], "model.new_adapter": True}, False),
        ({"model.adapters": ["old"]}, True),
        ({"model.finetuning": "oft"}, True),
        ({"model.lora.dora": True}, True),
        ({"model.lora.pissa": True}, True),
        ({"model.dtype": "float16", "scaling.use_gpu": True}, True),
    ],
)
def test_the_seed_is_part_of_it_unless_the_model_starts_as_its_base(settings, part):
    keys = config(**settings).evaluation_keys()
    assert ("run.seed" in keys) == part
    assert (config(**settings, **{"run.seed": 5}).evaluation_keys() != keys) == part


def test_trials_of_a_search_for_rate_and_rank_share_it():
    trials = [
        config(**{"train.learning_rate": rate, "model.lora.rank": rank, "run.name": f"{rate}-{rank}"})
        for rate in (1e-5, 1e-4)
        for rank in (4, 8)
    ]
    assert all(trial.evaluation_keys() == trials[0].evaluation_keys() for trial in trials)
