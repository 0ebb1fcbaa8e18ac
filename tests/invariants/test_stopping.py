"""A training that is asked to stop, in a step or in an evaluation, and goes on: together it is the training left alone."""

from pathlib import Path

import numpy as np
import pytest

from raysft.telemetry.events import EvaluationDone, PreemptionNotice, TrainingEnded, TrainingStopped
from tests.training import STEPS, Case, Result, make_config, prepare, rows_of, timeless, train_all

WORLDS = (1, 2)
SAVED_EVERY = 2
BEFORE_THE_MODEL = "before the model is written"


def questions(batches: int) -> dict[str, tuple[int, int]]:
    """Name of a moment → the question with which it begins, and the steps done then.

    Args:
        batches: of an evaluation; each begins with a question, and so ends each step, and one comes before the model is written.
    """
    return {
        "in the first evaluation": (batches, 0),
        "in the first step": (batches + 1, 1),
        "in an evaluation": (2 * batches + 3, 2),
        "in a step with a checkpoint": (2 * batches + 2, 2),
        "in the last step": (STEPS * (batches + 1), STEPS),
        "in the last evaluation": (STEPS * (batches + 1) + 1, STEPS),
        BEFORE_THE_MODEL: (STEPS * (batches + 1) + batches + 1, STEPS),
    }


MOMENTS = list(questions(1))


WITHOUT_ROWS = {
    "asked while it waits": {"asked": (4, 0)},
    "asked once its machine is to go": {"leaves_in": 4, "asked_once_saved": 2},
    "asked after a checkpoint": {"asked": (4, 0), "save_every_steps": 2},
}
"""What asks a training to stop that has done two steps, and whose rows of the third never come to the last worker."""


@pytest.fixture(scope="module", params=WORLDS, ids="{} workers".format)
def trained(request, tmp_path_factory) -> tuple[dict[str, Result], dict[str, Result], Path]:
    """What came of trainings that were stopped at each moment and of one left alone, of their sequels, and all checkpoints."""
    folder, model, manifest = prepare(tmp_path_factory.mktemp("stopping"))
    kept, world = folder / "kept", request.param

    def case(name: str, **options) -> Case:
        # Early stopping remembers the best evaluation, and wants to see that there is something to evaluate.
        settings = {"data.holdout": 0.1, "train.early_stopping.patience": 9, "train.save_every_steps": SAVED_EVERY}
        config = make_config(folder / name, model, settings, eval_every_steps=1, finetuning="lora", zero_stage=2)
        return Case(config, rows_of(manifest), keep=kept / name, **options)

    moments = questions(sum(1 for _ in rows_of(manifest).steps(0, 0, world)))
    firsts = {"alone": case("alone")}
    firsts |= {name: case(name, asked=(question, 1)) for name, (question, _) in moments.items()}
    sequels = {
        name: case(f"{name}, later", resume=kept / name / f"checkpoint_{steps}")
        for name, (_, steps) in moments.items()
        if steps
    }
    for name, options in WITHOUT_ROWS.items():
        every = options.get("save_every_steps")
        plain = make_config(
            folder / name, model, eval_at_start=False, save_every_steps=every, finetuning="lora", zero_stage=2
        )
        asks = {key: value for key, value in options.items() if key != "save_every_steps"}
        firsts[name] = Case(plain, rows_of(manifest), keep=kept / name, steps_with_rows=2, **asks)
    for name, resume in (("first rows", None), ("first rows, later", kept / "in an evaluation" / "checkpoint_2")):
        config = make_config(folder / name, model, save_every_steps=2, finetuning="lora", zero_stage=2)
        firsts[name] = Case(
            config, rows_of(manifest), resume=resume, keep=kept / name, steps_with_rows=0, asked=(3, 0), leaves_in=1
        )
    results = train_all([*firsts.values(), *sequels.values()], world)
    return dict(zip(firsts, results, strict=False)), dict(zip(sequels, results[len(firsts) :], strict=True)), kept


def evaluations(*results: Result) -> list[dict]:
    return [
        timeless(event.record) for result in results for event in result.events if isinstance(event, EvaluationDone)
    ]


@pytest.mark.parametrize("name", MOMENTS)
def test_it_ends_after_that_step_with_a_checkpoint_and_without_a_model(trained, name):
    firsts, _, kept = trained
    step = questions(1)[name][1]
    alone, stopped = firsts["alone"], firsts[name]
    assert stopped.losses == alone.losses[:step]
    last = stopped.events[-1]
    assert isinstance(last, TrainingStopped)
    assert (last.step, last.reason) == (step, "asked to")
    assert not stopped.weights
    assert not any(isinstance(event, TrainingEnded) for event in stopped.events)
    assert (kept / name / f"checkpoint_{step}").exists() == (step > 0)
    # The evaluation that was under way is dropped; no other begins.
    assert evaluations(stopped) == evaluations(alone)[: len(evaluations(stopped))]
    assert len(evaluations(stopped)) == step + (name == BEFORE_THE_MODEL)


@pytest.mark.parametrize("name", WITHOUT_ROWS)
def test_it_ends_with_a_checkpoint_while_a_worker_waits_for_rows_that_never_come(trained, name):
    firsts, _, kept = trained
    *_, last = firsts[name].events
    assert last == TrainingStopped(2, "asked to", {})
    assert firsts[name].losses == firsts["alone"].losses[:2]
    assert (kept / name / "checkpoint_2").exists()
    noticed = [event.step for event in firsts[name].events if isinstance(event, PreemptionNotice)]
    assert noticed == [2] * ("leaves_in" in WITHOUT_ROWS[name])


@pytest.mark.parametrize("name", WITHOUT_ROWS)
def test_only_a_worker_that_lacks_its_rows_is_said_to_wait_for_them(trained, name, request):
    firsts, _, _ = trained
    # Of two workers the first one has its rows, and waits for the other one in a sum.
    expected = "reading the rows of step 3" if request.node.callspec.params["trained"] == 1 else "step 3"
    # When it was asked first, its own rows may have been on their way.
    assert firsts[name].asked_in[-1] == expected


@pytest.mark.parametrize(("name", "step"), [("first rows", 0), ("first rows, later", 2)])
def test_it_ends_as_it_began_while_its_first_rows_never_come(trained, name, step):
    firsts, _, kept = trained
    *_, last = firsts[name].events
    assert isinstance(last, TrainingStopped)
    assert (last.step, last.reason) == (step, "asked to")
    assert not firsts[name].losses
    assert not evaluations(firsts[name])
    assert not (kept / name).exists()
    assert set(firsts[name].asked_in) == {"the setup"}
    assert not any(isinstance(event, PreemptionNotice) for event in firsts[name].events), "there is nothing to save"


@pytest.mark.parametrize("name", MOMENTS[1:])
def test_with_its_sequel_it_is_the_training_left_alone(trained, name):
    firsts, sequels, _ = trained
    alone, first, later = firsts["alone"], firsts[name], sequels[name]
    assert first.losses + later.losses == alone.losses
    assert first.norms + later.norms == alone.norms
    assert evaluations(first, later) == evaluations(alone)
    assert all(np.array_equal(later.weights[key], alone.weights[key]) for key in alone.weights)
    ends = [next(event for event in result.events if isinstance(event, TrainingEnded)) for result in (alone, later)]
    assert ends[0].train == ends[1].train, "the best evaluation is known, too"
    assert timeless(ends[0].eval) == timeless(ends[1].eval)
