"""Learning-rate schedules over the exact number of steps, which weights an optimizer treats in which way, and what is refused."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, get_args

import pytest
import torch
from torch import nn

from raysft.config import TrainSection
from raysft.config.train import Schedule
from raysft.errors import RequestError
from raysft.train.optim import check_options, make_lr_scheduler, make_optimizer
from raysft.train.parameter_groups import by_place, trained
from tests.messages import holds

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


@pytest.mark.parametrize("name", ["muon", "adamuon", "normuon"])
@pytest.mark.parametrize(
    ("schedule", "options"), [("polynomial", {"lr_end": 1e-3}), ("cosine_with_min_lr", {"min_lr": 1e-3})]
)
def test_a_schedule_ends_at_the_rate_that_it_names_whatever_kinds_of_groups_there_are(name, schedule, options):
    train = TrainSection(
        optimizer=name, zero_stage=0, learning_rate=0.1, schedule=schedule, schedule_options=options, warmup_steps=2
    )
    optimizer = make_optimizer(nn.Linear(4, 4), train)
    scheduler, peaks = make_lr_scheduler(optimizer, train, STEPS), [0.0]
    for _ in range(STEPS):
        optimizer.step()
        scheduler.step()
        peaks.append(optimizer.param_groups[0]["lr"])
    assert max(peaks) == pytest.approx(0.1)
    assert [group["lr"] for group in optimizer.param_groups] == pytest.approx([1e-3] * 2)


class Layered(nn.Module):
    """A model of named layers, with the config that adam_mini reads."""

    def __init__(self) -> None:
        super().__init__()
        model: Any = nn.Module()
        model.layers = nn.ModuleList(nn.ModuleDict({"k_proj": nn.Linear(4, 4), "norm": nn.RMSNorm(4)}) for _ in "ab")
        text = SimpleNamespace(hidden_size=4, num_attention_heads=2, num_key_value_heads=2)
        model.config = SimpleNamespace(get_text_config=lambda: text)
        self.model = model


@pytest.mark.parametrize("name", ["adam_mini", "badam"])
def test_vectors_do_not_decay(name, capsys):
    """Without gradients, decay alone changes weights: by 0.1 · 0.5 of them in each step."""
    model = Layered()
    before = {name: weight.detach().clone() for name, weight in model.named_parameters()}
    options = {"switch_block_every": 1} if name == "badam" else {}
    train = TrainSection(
        optimizer=name, zero_stage=0, learning_rate=0.1, weight_decay=0.5, optimizer_options=options, max_grad_norm=0
    )
    optimizer = make_optimizer(model, train)
    for _ in range(2):  # with badam one for each layer
        for weight in model.parameters():
            weight.grad = torch.zeros_like(weight) if weight.requires_grad else None
        optimizer.step()
    factor = 0.95 if name == "badam" else 0.95**2
    for name, weight in model.named_parameters():
        torch.testing.assert_close(weight.detach(), before[name] * (factor if weight.dim() == 2 else 1.0))
    assert not capsys.readouterr().out


def test_embeddings_and_head_are_outside_the_layers_whatever_they_are_called():
    """Those of GPT-2 are ``wte`` and ``wpe``."""
    from transformers import GPT2Config, GPT2LMHeadModel

    model = GPT2LMHeadModel(
        GPT2Config(vocab_size=16, n_embd=8, n_layer=1, n_head=2, n_positions=16, tie_word_embeddings=False)
    )
    inner, others = by_place(model, trained(model))
    ends = ("c_attn.weight", "attn.c_proj.weight", "c_fc.weight", "mlp.c_proj.weight")
    assert len(inner) == 4
    assert all(name.endswith(ends) for name in inner)
    assert {name for name, weight in others.items() if weight.dim() == 2} == {
        "transformer.wte.weight", "transformer.wpe.weight", "lm_head.weight",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"optimizer": "galore", "optimizer_options": {"proj_type": "sideways"}},
            "train.optimizer=galore refuses … 'sideways' … fix the options",
        ),
        (
            {"optimizer": "galore", "optimizer_options": {"update_proj_gap": 0}},
            "train.optimizer_options.update_proj_gap … above 0 … is 0",
        ),
        ({"optimizer": "fira", "optimizer_options": {"rank": "8"}}, "train.optimizer_options.rank … is '8'"),
        ({"optimizer": "apollo", "optimizer_options": {"rank": 0}}, "train.optimizer_options.rank … is 0"),
        (
            {"optimizer": "apollo", "optimizer_options": {"proj": "sideways"}},
            "train.optimizer=apollo refuses … 'sideways' … fix the options",
        ),
        (
            {"optimizer": "sgd", "optimizer_options": {"momentum": 0.9, "dampening": "0.5"}},
            "train.optimizer=sgd refuses … '0.5' … fix the options",
        ),
        (
            {"schedule_options": {"num_cycles": "three"}, "warmup_steps": 5},
            "train.schedule=cosine refuses train.schedule_options … 'three' … fix the options",
        ),
        (
            {"optimizer": "shampoo", "optimizer_options": {"preconditioning_compute_steps": 0}},
            "train.optimizer=shampoo refuses … must be positive … fix the options",
        ),
        (
            {"optimizer": "paged_adamw", "optimizer_options": {"amsgrad": True}},
            "train.optimizer=paged_adamw has no option 'amsgrad'",
        ),
        (
            {"optimizer": "adamw_8bit", "optimizer_options": {"is_paged": True}},
            "train.optimizer=adamw_8bit has no option 'is_paged'",
        ),
        (
            {"optimizer": "schedulefree_adamw", "optimizer_options": {"cautious": True}, "schedule": "constant"},
            "train.optimizer=schedulefree_adamw has no option 'cautious'",
        ),
    ],
)
def test_an_option_that_would_fail_later_or_be_ignored_is_refused_before_there_is_a_model(settings, message):
    check_options(TrainSection(**{"zero_stage": 0, **settings, "optimizer_options": {}, "schedule_options": {}}))
    with pytest.raises(RequestError) as caught:
        check_options(TrainSection(**{"zero_stage": 0, **settings}))
    assert holds(str(caught.value), message)


def test_options_are_tried_without_a_trace():
    before = torch.get_rng_state()
    check_options(TrainSection(optimizer="apollo", zero_stage=0, optimizer_options={"rank": 512}))
    assert torch.equal(before, torch.get_rng_state())


def test_adam_mini_has_no_option_of_another_name():
    train = TrainSection(optimizer="adam_mini", zero_stage=0, optimizer_options={"model_shardin": True})
    with pytest.raises(RequestError, match="adam_mini has no option 'model_shardin'; did you mean model_sharding"):
        make_optimizer(Layered(), train)
