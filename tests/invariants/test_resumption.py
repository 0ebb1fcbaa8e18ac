"""Settings that may change on resume take effect in the first step after the checkpoint, and not before."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from raysft.config import TrainSection
from raysft.config.resume_effects import EFFECTS, Effect
from raysft.telemetry.events import StepRecord
from raysft.train.checkpoint import catalog
from raysft.train.checkpoint.cursor import EVALUATION, Best, Cursor
from raysft.train.early_stopping import EarlyStopper, known_best, should_stop
from tests.training import STEPS, Case, Result, make_config, plain_loss, plain_model, prepare, rows_of, train_all

HALF = STEPS // 2
BEFORE: dict[str, Any] = {"schedule": "linear", "save_every_steps": HALF}
KINDS = ("adafactor", "muon", "galore")
"""Optimizers whose state dict is saved as it is, with its settings."""
TINY = 1e-12


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    return prepare(tmp_path_factory.mktemp("resumption"))


@pytest.fixture(scope="module")
def begun(prepared) -> dict[str, tuple[Result, Path]]:
    """Optimizer → an uninterrupted training, and its checkpoint after half of the steps."""
    folder, model, manifest = prepared
    names = ("adamw", *KINDS)
    cases = [
        Case(
            make_config(folder / name, model, **BEFORE, optimizer=name, **options(name)),
            rows_of(manifest),
            keep=folder / "kept" / name,
        )
        for name in names
    ]
    results = train_all(cases)
    kept = [folder / "kept" / name / f"checkpoint_{HALF}" for name in names]
    return dict(zip(names, zip(results, kept, strict=True), strict=True))


def options(optimizer: str) -> dict[str, Any]:
    return {"optimizer_options": {"rank": 4, "update_proj_gap": 3}} if optimizer == "galore" else {}


CHANGES: dict[str, dict[str, Any]] = {
    "nothing": {},
    "learning_rate": {"learning_rate": 5e-3},
    "max_steps": {"max_steps": 5},
    "schedule": {"schedule": "constant"},
    "warmup_ratio": {"warmup_ratio": 0.75},
    "warmup_steps": {"warmup_steps": 3},
    "adam": {"weight_decay": 0.5, "betas": (0.5, 0.9), "epsilon": 1e-3},
    "max_grad_norm": {"max_grad_norm": 0.05},
    "micro_batch_size": {"micro_batch_size": 2},
    "zero_stage": {"zero_stage": 2},
    "offload": {"zero_stage": 2, "offload": {"optimizer": "cpu"}},
    "loss": {"loss": "dft"},
    "label_smoothing": {"label_smoothing": 0.2},
    "z_loss": {"z_loss": 0.1},
    "neftune_alpha": {"neftune_alpha": 5.0},
}


@pytest.fixture(scope="module")
def resumed(prepared, begun) -> dict[str, Result]:
    """Name of a change → the second half trained with it."""
    folder, model, manifest = prepared
    cases = {
        name: Case(
            make_config(folder / f"then-{name}", model, **{**BEFORE, **change}),
            rows_of(manifest, steps=change.get("max_steps", STEPS)),
            resume=begun["adamw"][1],
        )
        for name, change in CHANGES.items()
    }
    for kind in KINDS:
        config = make_config(
            folder / f"then-{kind}", model, **{**BEFORE, "learning_rate": TINY}, optimizer=kind, **options(kind)
        )
        cases[kind] = Case(config, rows_of(manifest), resume=begun[kind][1])
    found = dict(zip(cases, train_all(list(cases.values())), strict=True))
    assert not [name for name, result in found.items() if result.failure], [result.failure for result in found.values()]
    return found


def rates(result: Result) -> list[float]:
    return [event.lr for event in result.events if isinstance(event, StepRecord)]


def test_the_learning_rate_is_that_of_the_new_schedule_from_the_first_step_on(resumed):
    left = range(HALF, STEPS)
    assert rates(resumed["nothing"]) == pytest.approx([1e-2 * (STEPS - step) / STEPS for step in left])
    assert rates(resumed["learning_rate"]) == pytest.approx([5e-3 * (STEPS - step) / STEPS for step in left])
    assert rates(resumed["max_steps"]) == pytest.approx([1e-2 * (5 - step) / 5 for step in range(HALF, 5)])
    assert rates(resumed["schedule"]) == pytest.approx([1e-2, 1e-2])
    assert rates(resumed["warmup_steps"]) == rates(resumed["warmup_ratio"])
    assert rates(resumed["warmup_ratio"]) == pytest.approx([1e-2 * step / 3 for step in left])


def test_no_step_is_repeated(begun, resumed):
    whole = begun["adamw"][0]
    assert (resumed["nothing"].losses, resumed["nothing"].norms) == (whole.losses[HALF:], whole.norms[HALF:])
    for name, result in resumed.items():
        rows = [event.rows for event in result.events if isinstance(event, StepRecord)]
        steps = CHANGES.get(name, {}).get("max_steps", STEPS)
        assert rows == [min(4 * (step + 1), 18) for step in range(HALF, steps)], name


@pytest.mark.parametrize("name", ["adam", "max_grad_norm"])
def test_the_optimizer_has_new_settings_and_its_old_state(prepared, resumed, name):
    losses, weights = plain_change(prepared, CHANGES[name])
    np.testing.assert_allclose(resumed[name].losses, losses[HALF:], rtol=1e-4)
    for key, value in weights.items():
        np.testing.assert_allclose(resumed[name].weights[key], value, rtol=1e-3, atol=1e-5, err_msg=key)


def plain_change(prepared, change: dict[str, Any]):
    """Train with a plain loop in which the optimizer's settings change half-way."""
    model, rows = plain_model(prepared[1]), rows_of(prepared[2])
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, eps=1e-4, weight_decay=0.0)
    losses, clip = [], 1.0
    for step in range(STEPS):
        if step == HALF:
            clip = change.get("max_grad_norm", clip)
            names = {"weight_decay": "weight_decay", "betas": "betas", "epsilon": "eps"}
            settings = {ours: change[key] for key, ours in names.items() if key in change}
            decay = settings.pop("weight_decay", 0.0)
            vectors = [parameter for parameter in model.parameters() if parameter.dim() < 2]
            group = optimizer.param_groups[0]
            group["params"] = [parameter for parameter in model.parameters() if parameter.dim() >= 2]
            group.update(settings, weight_decay=decay)
            optimizer.param_groups.append({**group, "params": vectors, "weight_decay": 0.0})
        for group in optimizer.param_groups:
            group["lr"] = 1e-2 * (STEPS - step) / STEPS
        batch = rows.batch(range(step * 4, step * 4 + 4))
        loss = plain_loss(model, batch)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), clip)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses, {name: parameter.detach().numpy() for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("name", ["micro_batch_size", "zero_stage", "offload"])
def test_settings_of_the_computation_do_not_change_its_results(begun, resumed, name):
    np.testing.assert_allclose(resumed[name].losses, begun["adamw"][0].losses[HALF:], rtol=1e-4)
    for key, value in begun["adamw"][0].weights.items():
        np.testing.assert_allclose(resumed[name].weights[key], value, rtol=1e-3, atol=1e-4, err_msg=key)


def test_a_new_loss_counts_from_the_first_step_on(resumed):
    plain = resumed["nothing"].losses[0]
    assert 0 < resumed["loss"].losses[0] < plain, "DFT weights each token with its probability, which is below 1"
    assert resumed["z_loss"].losses[0] > plain
    for name in ("label_smoothing", "neftune_alpha"):
        assert abs(resumed[name].losses[0] - plain) > 1e-3, name


@pytest.mark.parametrize("kind", KINDS)
def test_a_saved_state_dict_does_not_restore_the_old_learning_rate(begun, resumed, kind):
    whole, kept = begun[kind]
    assert resumed[kind].losses[0] == pytest.approx(whole.losses[HALF], rel=1e-5)
    then = load_file(kept / "part_0.safetensors")
    for name, value in resumed[kind].weights.items():
        before = then.get(f"weight:0:model.{name}")
        if before is not None:
            np.testing.assert_allclose(value, before.numpy().reshape(value.shape), atol=1e-7, err_msg=name)
    assert any(not np.allclose(whole.weights[name], value) for name, value in resumed[kind].weights.items())


def test_every_key_that_takes_effect_at_once_is_tested():
    tried = {key for change in CHANGES.values() for key in change} | {"learning_rate"}
    elsewhere = {
        "epochs": "in the test of whole runs",
        "schedule_options": "with schedule",
        "eaft_alpha": "with loss",
        "asft_alpha": "with loss",
        "reference_model": "in the tests of its loss",
        "router_aux_loss_coef": "in the tests of mixtures of experts",
        "deepspeed": "like zero_stage: a new engine is made",
        "fp8": "needs a GPU",
        "compile": "in the tests of compiled layers",
        "nonfinite": "is read in each step",
        "eval_every_steps": "is read after each step",
        "eval_every_epochs": "is read after each step",
        "eval_delay": "is read after each step",
        "early_stopping": "below",
        "keep_best": "below",
        "best_metric": "in the test of early stopping",
        "best_mode": "in the test of early stopping",
    }
    keys = {key.split(".")[1] for key, effect in EFFECTS.items() if effect is Effect.NOW and key.startswith("train.")}
    assert keys == tried | elsewhere.keys()


def test_the_best_evaluation_counts_only_if_it_is_comparable_and_its_model_was_kept():
    stops = TrainSection(early_stopping={"patience": 2})
    keeps = TrainSection(keep_best=True)
    best = Best(step=3, since=2, results={"eval_loss": 1.0}, kept=False)
    cursor = Cursor(5, 20, 100, {EVALUATION: "a"}, best)
    assert known_best(stops, cursor, {EVALUATION: "a"}) == best
    assert should_stop(stops, best)
    assert not should_stop(TrainSection(early_stopping={"patience": 3}), best)
    assert known_best(stops, cursor, {EVALUATION: "b"}) is None
    assert known_best(keeps, cursor, {EVALUATION: "a"}) is None, "its model was not kept"
    kept = replace(cursor, best=replace(best, kept=True))
    assert known_best(keeps, kept, {EVALUATION: "a"}) == kept.best
    assert known_best(stops, kept, {EVALUATION: "a"}) == best, "its model is no longer kept"
    assert known_best(TrainSection(), kept, {EVALUATION: "a"}) is None, "nothing is compared with it"


def test_an_evaluation_that_is_in_the_checkpoint_counts_once():
    early_stopper = EarlyStopper(TrainSection(early_stopping={"patience": 2}), lambda: None)
    for step, loss in ((1, 1.0), (2, 1.5), (2, 1.5)):
        early_stopper.update({"eval_loss": loss}, step)
    assert early_stopper.best
    assert (early_stopper.best.since, early_stopper.best.seen) == (1, 2)


def test_a_checkpoint_at_the_end_has_the_last_evaluation(prepared, tmp_path):
    config = make_config(
        tmp_path / "run", prepared[1], {"data.holdout": 0.1, "train.early_stopping.patience": 3}, eval_every_steps=2,
        **BEFORE,
    )  # fmt: skip
    train_all([Case(config, rows_of(prepared[2]), keep=tmp_path / "kept")])
    cursor = Cursor.read(next(catalog.complete(tmp_path / "kept")))
    assert cursor.step == STEPS
    assert cursor.best
    assert cursor.best.seen == STEPS
    assert (
        json.loads((next(catalog.complete(tmp_path / "kept")).local / "cursor.json").read_text())["best"]["seen"]
        == STEPS
    )
