"""Learning-rate schedules over the exact number of steps, and optimizers that cannot be made."""

from __future__ import annotations

from typing import get_args

import pytest
import torch

from raysft.config import TrainSection
from raysft.config.train import Schedule
from raysft.errors import RequestError
from raysft.train.optim import make_lr_scheduler, make_optimizer

STEPS = 40


def rates(**settings) -> list[float]:
    train = TrainSection(**{"learning_rate": 1.0, "warmup_ratio": 0.1, **settings})
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    schedule = make_lr_scheduler(optimizer, train, STEPS)
    found = []
    for _ in range(STEPS):
        found.append(schedule.get_last_lr()[0])
        optimizer.step()
        schedule.step()
    return found


@pytest.mark.parametrize("name", get_args(Schedule))
def test_every_schedule_warms_up_and_stays_within_its_rate(name):
    found = rates(schedule=name)
    if name != "constant":
        assert found[:4] == pytest.approx([0, 0.25, 0.5, 0.75])
    assert max(found) == pytest.approx(1.0)
    ends = {"constant": 1.0, "constant_with_warmup": 1.0, "cosine_with_min_lr": 0.1}
    low = {"inverse_sqrt": 0.33, "cosine_with_restarts": 0.01, "polynomial": 0.03}
    assert found[-1] == pytest.approx(ends[name], abs=0.01) if name in ends else found[-1] <= low.get(name, 0.3)


def test_warmup_stable_decay_is_flat_and_falls_in_its_last_tenth():
    found = rates(schedule="warmup_stable_decay")
    assert found[4:36] == [1.0] * 32
    assert found[36] > found[37] > found[38] > found[39]
    longer = rates(schedule="warmup_stable_decay", schedule_options={"num_decay_steps": 20})
    assert longer[20] == 1.0 > longer[22]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"schedule": "cosine", "schedule_options": {"nonsense": 1}},
            "train.schedule=cosine refuses train.schedule_options",
        ),
        ({"optimizer_options": {"nonsense": 1}}, "train.optimizer=adamw refuses train.optimizer_options"),
    ],
)
def test_an_option_that_does_not_exist_is_refused(settings, message):
    train = TrainSection(**settings)
    with pytest.raises(RequestError, match=message):
        make_lr_scheduler(make_optimizer(torch.nn.Linear(2, 2), train), train, 10)


def test_an_optimizer_without_its_library_says_what_to_install(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(RequestError, match=r"needs the package badam, .*; run pip install 'raysft\[optim\]'"):
        make_optimizer(torch.nn.Linear(2, 2), TrainSection(optimizer="badam", zero_stage=0))


def test_adafactor_moves_weights_of_zero_by_its_rate():
    """LoRA's B begins at 0. The first update is a gradient divided by its own size, so that all of it has the size 1."""
    layer = torch.nn.Linear(4, 3, bias=False)
    torch.nn.init.zeros_(layer.weight)
    layer.weight.grad = torch.full_like(layer.weight, 0.5)
    make_optimizer(layer, TrainSection(optimizer="adafactor", zero_stage=0, learning_rate=1e-2)).step()
    torch.testing.assert_close(layer.weight.detach(), torch.full((3, 4), -1e-2))
