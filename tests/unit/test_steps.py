"""As many steps, epochs and learning rates as transformers' Trainer has, and what is due after which step."""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from transformers import Trainer, TrainerControl, TrainerState, TrainingArguments, get_scheduler
from transformers.trainer_callback import DefaultFlowCallback

from raysft.config import TrainSection
from raysft.data.rows import row_plan as row_plans
from raysft.data.rows.row_plan import RowPlan, SourceLengths, plan_rows
from raysft.errors import RequestError
from raysft.train.intervals import Interval
from raysft.train.optim import make_lr_scheduler

ENDLESS = {"repeat": True}


def source(examples: int) -> SourceLengths:
    lengths = np.random.default_rng(1).integers(2, 33, examples).astype(np.int32)
    return SourceLengths(lengths, lengths - 1, np.unique([examples // 3 + 1, examples]))


def plan(examples: int, per_step: int | None = 4, **options: Any) -> RowPlan:
    defaults = {"capacity": 64, "global_batch_size": per_step, "layout": "single"}
    return plan_rows([source(examples)], **{**defaults, **options})


def examples_of(row_plan: RowPlan, first: int = 0, last: int | None = None) -> list[int]:
    """Examples of some steps, in order."""
    rows = np.minimum(
        np.array([first, row_plan.steps if last is None else last]) * row_plan.global_batch_size, row_plan.rows
    )
    return [example for row in range(*rows.tolist()) for example in row_plan.row(row).tolist()]


def trainer_of(folder: Any, examples: int, per_step: int, **arguments: Any) -> tuple[Trainer, Any]:
    """transformers' Trainer for examples of one row each, and its data loader."""
    settings = TrainingArguments(
        str(folder), per_device_train_batch_size=1, gradient_accumulation_steps=per_step, report_to=[], use_cpu=True,
        **arguments,
    )  # fmt: skip
    trainer = Trainer(
        torch.nn.Linear(1, 1), settings, train_dataset=torch.utils.data.TensorDataset(torch.zeros(examples))
    )
    return trainer, trainer.get_train_dataloader()


@pytest.mark.parametrize(
    ("examples", "per_step", "epochs", "max_steps"),
    [
        (10, 4, 1, None), (10, 4, 0.5, None), (10, 4, 2.5, None), (10, 4, 3.0, None), (10, 1, 1.1, None), (7, 2, 0.01, None),
        (30, 3, 0.7, None), (30, 3, 2.3, None), (10, 4, 1, 2), (10, 4, 1, 8), (10, 4, 3, 7), (3, 4, 1, 5), (10, 4, 0.5, 9),
    ],
)  # fmt: skip
def test_steps_and_epochs_are_those_of_transformers(tmp_path, examples, per_step, epochs, max_steps):
    trainer, loader = trainer_of(tmp_path, examples, per_step, num_train_epochs=epochs, max_steps=max_steps or -1)
    theirs = trainer.set_initial_training_values(trainer.args, loader)
    ours = plan(examples, per_step, epochs=epochs, max_steps=max_steps, repeat=max_steps is not None)
    assert ours.steps == theirs[-1]
    assert len(ours.epoch_ends) == theirs[0]
    assert ours.epoch_steps[0] == theirs[1]
    assert ours.epochs_after(ours.steps) == pytest.approx(ours.steps / theirs[1])


@pytest.mark.parametrize("epochs", [0.5, 1.5, 2.25])
@pytest.mark.parametrize("layout", ["packed", "single", "joined"])
def test_a_fraction_is_the_beginning_of_the_whole_epochs(epochs, layout):
    whole, cut = (plan(300, layout=layout, epochs=each) for each in (math.ceil(epochs), epochs))
    before = int(whole.epoch_steps[-2]) if epochs > 1 else 0
    of_last = int(whole.epoch_steps[-1]) - before
    assert cut.steps == before + math.ceil((epochs - math.floor(epochs)) * of_last)
    assert examples_of(cut) == examples_of(whole, 0, cut.steps)
    assert cut.epoch_ends.tolist() == whole.epoch_ends.tolist(), "progress counts in proportion to the whole epoch"
    assert cut.epoch_of(cut.consumed(cut.steps)) == pytest.approx(epochs, abs=1.0 / of_last)


@pytest.mark.parametrize("layout", ["packed", "single", "joined"])
@pytest.mark.parametrize("per_step", [4, 7])
def test_max_steps_repeat_the_epochs_each_in_an_order_of_its_own(layout, per_step):
    whole = plan(300, per_step, layout=layout, epochs=3)
    ours = plan(300, per_step, layout=layout, max_steps=whole.steps - 2, **ENDLESS)
    assert ours.steps == whole.steps - 2
    assert examples_of(ours) == examples_of(whole, 0, ours.steps)
    ends = [0, *ours.epoch_steps.tolist()]
    orders = [examples_of(ours, first, last) for first, last in pairwise(ends[:3])]
    assert [sorted(set(order)) for order in orders] == [list(range(300))] * 2
    assert orders[0] != orders[1], "the second epoch has another order"
    if layout != "joined":
        assert [len(order) for order in orders] == [300, 300], "each example once"


def test_a_mixture_repeats_too():
    given = [source(90), source(40)]
    for mixing in ("first_exhausted", "all_exhausted"):
        options = {"capacity": 64, "global_batch_size": 8, "mixing": mixing}
        assert plan_rows(given, **options, max_steps=77, repeat=True).steps == 77  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize(("epochs", "chosen"), [(1, 2), (0.5, 1), (2.5, 4), (10, 16)])
@pytest.mark.parametrize("max_steps", [None, 3, 900])
def test_an_automatic_batch_size_follows_from_the_epochs_alone(epochs, chosen, max_steps):
    """200 rows an epoch: the largest power of two that gives 100 steps."""
    ours = plan(200, None, epochs=epochs, max_steps=max_steps, repeat=max_steps is not None)
    assert ours.global_batch_size == chosen
    assert ours.steps == max_steps or (max_steps is None and ours.steps >= 100)


def test_steps_that_no_plan_can_hold_are_refused(monkeypatch):
    monkeypatch.setattr(row_plans, "MAX_PLANNED", 1000)
    assert plan(100, max_steps=250, **ENDLESS).steps == 250, "ten epochs of 25 steps"
    with pytest.raises(RequestError) as caught:
        plan(100, max_steps=275, **ENDLESS)
    assert str(caught.value) == (
        "train.max_steps=275 needs 1,100 examples, but a row plan holds at most 1,000; lower it"
    )


@pytest.mark.parametrize("schedule", ["linear", "cosine", "constant_with_warmup", "constant"])
@pytest.mark.parametrize(
    "warm_up", [{}, {"warmup_ratio": 0.3}, {"warmup_steps": 3}, {"warmup_steps": 0}, {"warmup_steps": 99}]
)
def test_learning_rates_are_those_of_transformers(tmp_path, schedule, warm_up):
    """The Trainer's own number of warm-up steps; its ``warmup_steps`` below 1 are a ratio."""
    steps = plan(10, 4, epochs=2.5).steps
    given = TrainSection(
        learning_rate=0.5, schedule=schedule, **{"warmup_ratio": 0.9 if "warmup_steps" in warm_up else 0, **warm_up}
    )
    theirs = TrainingArguments(
        str(tmp_path), use_cpu=True, warmup_steps=warm_up.get("warmup_steps", warm_up.get("warmup_ratio", 0))
    ).get_warmup_steps(steps)

    def rates(make: Any) -> list[float]:
        optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.5)
        scheduler, found = make(optimizer), []
        for _ in range(steps):
            found.append(scheduler.get_last_lr()[0])
            optimizer.step()
            scheduler.step()
        return found

    expected = rates(lambda optimizer: get_scheduler(schedule, optimizer, theirs, steps))
    assert rates(lambda optimizer: make_lr_scheduler(optimizer, given, steps)) == expected


@dataclass
class Asked:
    """What transformers would do after which step."""

    evaluated: list[int]
    saved: list[int]


def asked_of_transformers(folder: Any, steps_of_epoch: int, total: int, **settings: Any) -> Asked:
    """Ask the callback that decides for the Trainer, at the times when the Trainer does."""
    arguments = TrainingArguments(str(folder), use_cpu=True, report_to=[], **settings)
    flow, state, found = DefaultFlowCallback(), TrainerState(), Asked([], [])
    state.compute_steps(arguments, total)
    state.max_steps = total
    for step in range(1, total + 1):
        state.global_step, state.epoch = step, step / steps_of_epoch
        controls = [flow.on_step_end(arguments, state, TrainerControl())]
        if step % steps_of_epoch == 0:
            controls.append(flow.on_epoch_end(arguments, state, TrainerControl()))
        if step < total:  # ours come at the end in any case
            found.evaluated += [step] if any(control.should_evaluate for control in controls) else []
            found.saved += [step] if any(control.should_save for control in controls) else []
    return found


@pytest.mark.parametrize("delay", [0, 1, 2, 6])
@pytest.mark.parametrize("unit", ["steps", "epochs"])
def test_evaluations_and_checkpoints_come_when_those_of_transformers_do(tmp_path, unit, delay):
    ours = plan(10, 4, epochs=3.5)
    every = (
        {"eval_every_steps": 2, "save_every_steps": 3}
        if unit == "steps"
        else {"eval_every_epochs": 1, "save_every_epochs": 1}
    )
    train = TrainSection.model_validate({"eval_delay": delay, **every})
    strategy = {"eval_strategy": unit.removesuffix("s") if unit == "epochs" else unit, "eval_steps": 2}
    strategy |= {"save_strategy": strategy["eval_strategy"], "save_steps": 3}
    theirs = asked_of_transformers(tmp_path, 3, ours.steps, eval_delay=delay, **strategy)
    assert due(Interval.of_evaluations(train, ours)) == theirs.evaluated
    assert due(Interval.of_checkpoints(train, ours)) == theirs.saved
    assert theirs.saved == [3, 6, 9]


def due(interval: Interval) -> list[int]:
    return [step for step in range(1, interval.row_plan.steps) if interval.is_due(step)]


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"eval_every_epochs": 2}, [14, 28]),
        ({"eval_every_epochs": 0.5}, [4, 7, 11, 14, 18, 21, 25, 28]),
        ({"eval_every_epochs": 1.5}, [11, 21]),
        ({"eval_every_epochs": 0.1}, list(range(1, 31))),
        ({"eval_every_epochs": 1, "eval_every_steps": 10}, [7, 10, 14, 20, 21, 28, 30]),
        ({"eval_every_epochs": 1, "eval_every_steps": 10, "eval_delay": 3}, [10, 20, 21, 28, 30]),
        ({"eval_every_epochs": 1, "eval_delay": 1.5}, [14, 21, 28]),
        ({"eval_every_epochs": 50}, []),
        ({}, []),
    ],
)  # fmt: skip
def test_what_is_due_by_epochs_and_by_steps(settings, expected):
    """13 rows, 2 in a step: 7 steps an epoch, of which the fourth ends its first half, and 31 in all."""
    ours = Interval.of_evaluations(TrainSection.model_validate(settings), plan(13, 2, max_steps=31, **ENDLESS))
    assert due(ours) == expected
    assert ours.first() == (expected[0] if expected else 31)


@pytest.mark.parametrize("steps", [3, 7, 10, 49, 1000])
@pytest.mark.parametrize("every", [0.1, 0.2, 0.3, 0.7, 1.1, 1 / 3])
def test_a_multiple_of_a_fraction_is_not_missed(steps, every):
    """However it is rounded: as often as the fraction is in the epochs, or after each step if that is more often."""
    interval = Interval(plan(steps, 1, epochs=7), None, every)
    expected = {math.ceil(round(number * every * steps, 6)) for number in range(1, math.floor(7 / every + 1e-9) + 1)}
    assert due(interval) == sorted(expected - {7 * steps})


def test_epochs_of_other_sizes_end_at_their_own_steps():
    """Rows that are packed anew in each epoch may be more or fewer."""
    ours = plan(300, 1, layout="packed", epochs=6, seed=3)
    assert due(Interval(ours, None, 1)) == ours.epoch_steps.tolist()[:-1]
    assert [ours.epochs_after(step) for step in (0, *ours.epoch_steps.tolist())] == [float(each) for each in range(7)]
