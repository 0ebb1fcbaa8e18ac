"""The end of a training that is stopped: all workers stop in the same step, and no number of the training changes."""

from pathlib import Path

import numpy as np
import pytest

from raysft.telemetry.events import TrainingEnded, TrainingStopped
from tests.training import STEPS, Case, Result, make_config, prepare, rows_of, train_all

HALF = STEPS // 2
WORLDS = (1, 2)


@pytest.fixture(scope="module", params=WORLDS, ids="{} workers".format)
def trained(request, tmp_path_factory) -> tuple[dict[str, Result], Path]:
    """Name of a course → what came of it, and the folder of the checkpoints."""
    folder, model, manifest = prepare(tmp_path_factory.mktemp("decisions"))
    kept = folder / "kept"

    def case(name: str, decisions: dict[int, tuple[str, ...]] | None, **options) -> Case:
        config = make_config(folder / name, model, eval_every_steps=1, finetuning="lora", zero_stage=2)
        return Case(config, rows_of(manifest), keep=kept / name, decisions=decisions, **options)

    cases = {
        "alone": case("alone", None),
        "watched": case("watched", {}),
        "saved": case("saved", {HALF: ("SAVE",)}),
        "stopped": case("stopped", {HALF: ("SAVE", "STOP")}),
        "stopped at once": case("stopped at once", {HALF: ("STOP",)}),
        "not asked": case("not asked", None, asked=(0, 1)),
        # The courses before have written these.
        "gone on": case("gone on", {}, resume=kept / "stopped at once" / f"checkpoint_{HALF}"),
    }
    return dict(zip(cases, train_all(list(cases.values()), request.param), strict=True)), kept


@pytest.mark.parametrize("name", ["watched", "saved", "not asked"])
def test_who_may_go_on_trains_as_if_alone(trained, name):
    results, _ = trained
    alone, other = results["alone"], results[name]
    assert len(alone.losses) == STEPS
    assert (other.losses, other.norms, other.evaluation) == (alone.losses, alone.norms, alone.evaluation)
    assert all(np.array_equal(other.weights[key], alone.weights[key]) for key in alone.weights)


@pytest.mark.parametrize(
    ("name", "steps"),
    [
        ("alone", []),
        ("watched", []),
        ("saved", [HALF]),
        ("stopped", [HALF]),
        ("stopped at once", [HALF]),
        ("not asked", []),
    ],
)
def test_a_checkpoint_is_saved_where_one_is_wanted(trained, name, steps):
    _, kept = trained
    found = sorted(path.name for path in (kept / name).iterdir()) if (kept / name).exists() else []
    assert found == [f"checkpoint_{step}" for step in steps]


@pytest.mark.parametrize(("name", "step"), [("stopped", HALF), ("stopped at once", HALF)])
def test_who_is_stopped_ends_there_without_a_model(trained, name, step):
    results, _ = trained
    stopped, last = results[name], results[name].events[-1]
    assert stopped.losses == results["alone"].losses[:step]
    assert isinstance(last, TrainingStopped)
    assert last.step == step
    assert last.eval["eval_loss"] > 0
    assert not any(isinstance(event, TrainingEnded) for event in stopped.events)
    assert not stopped.weights


def test_who_was_stopped_goes_on_where_it_was(trained):
    results, _ = trained
    alone, later = results["alone"], results["gone on"]
    assert later.losses == alone.losses[HALF:]
    assert all(np.array_equal(later.weights[key], alone.weights[key]) for key in alone.weights)
