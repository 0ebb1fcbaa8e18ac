"""A generation during training that takes long, and one that hangs: told apart, in the driver and in an engine's process."""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from ray.exceptions import GetTimeoutError

from raysft.config import Config
from raysft.generate.signs_of_life import Listener, SignsOfLife, Work
from raysft.run import step_generation
from raysft.run.generation_guard import GenerationGuard
from raysft.run.generation_plan import GenerationPlan
from raysft.run.step_generation import StepGenerator
from raysft.stopping import current
from raysft.storage.run_directory import RunDirectory
from raysft.telemetry.events import GenerationDone, GenerationNotice
from raysft.train.generation_line import EngineAlive, GenerationDue, GenerationState, Status

HANG = 0.3
"""Seconds of ``train.hang_minutes``; a generation hangs after three times as long."""
DUE = GenerationDue(4, 77, (("node", ()),))
"""The workers wait."""


class Post:
    """A mailbox without Ray, whose driver takes events late if it is slow."""

    def __init__(self, slow: bool = False) -> None:
        self.events: list[Any] = []
        self.told: list[GenerationState] = []
        self.generator: StepGenerator | None = None
        self._slow = slow

    def put(self, message: Any, timeout: float) -> None:
        self.events.append(message)
        if self._slow:
            raise GetTimeoutError("not taken yet")

    def post(self, message: Any) -> None:
        assert isinstance(message, EngineAlive)
        assert self.generator is not None
        self.generator.heard(message.ticket)

    def tell(self, state: GenerationState) -> None:
        self.told.append(state)


def made(
    folder: Path, monkeypatch, predict: Callable[[Listener], dict], slow: bool = False
) -> tuple[StepGenerator, Post]:
    """What generates, and its mailbox; ``predict`` stands for engines and metrics."""
    settings = {
        "model": {"path": "m"},
        "data": {"train": [{"name": "a", "path": "a"}], "holdout": 0.1},
        "train": {"hang_minutes": HANG / 60},
        "generate": {"every_steps": 2},
    }
    directory = RunDirectory(folder)
    directory.step_model(4).ensure_writable()
    monkeypatch.setattr(
        step_generation, "predict_step", lambda config, directory, step, room, listener: predict(listener)
    )
    plan = GenerationPlan(2, 3, 0, None, "")
    generator = StepGenerator(Config.model_validate(settings), directory, plan, lambda step: {"current_steps": step})
    post = Post(slow)
    post.generator = generator
    return generator, post


def generation(folder: Path, monkeypatch, predict: Callable[[Listener], dict], slow: bool = False) -> Post:
    """Carry out one request."""
    generator, post = made(folder, monkeypatch, predict, slow)
    with generator.begin(post):
        generator.take(DUE)
        generator.complete()
    return post


def lasting(seconds: float, do: Callable[[], Any]) -> dict[str, float]:
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        current().check()
        do()
    return {"predict_rouge-l": 0.5}


def engines_work(listener: Listener) -> dict[str, float]:
    assert listener.engine is not None
    tell = listener.engine
    return lasting(5 * HANG, lambda: (time.sleep(HANG / 4), tell()))


def predictions_arrive(listener: Listener) -> dict[str, float]:
    return lasting(5 * HANG, lambda: (time.sleep(HANG / 4), listener.advanced(3)))


def scoring_computes(listener: Listener) -> dict[str, float]:
    listener.scoring()
    return lasting(5 * HANG, lambda: sum(range(10_000)))


def engines_hang(listener: Listener) -> dict[str, float]:
    return lasting(60, lambda: time.sleep(0.01))


def scoring_hangs(listener: Listener) -> dict[str, float]:
    listener.scoring()
    time.sleep(6 * HANG)  # as a metric of another author, which hears of no request to stop
    current().check()
    return {}


@pytest.mark.parametrize("predict", [engines_work, predictions_arrive, scoring_computes])
def test_a_generation_that_takes_long_goes_on_and_workers_see_it(tmp_path, monkeypatch, predict):
    post = generation(tmp_path, monkeypatch, predict)
    assert post.told[-1] == GenerationState(77, Status.DONE, results={"predict_rouge-l": 0.5})
    assert [event for event in post.events if isinstance(event, GenerationDone)]
    # Whatever a worker hears differs from what it heard before, so that it waits on.
    running = [(state.predictions, state.signs) for state in post.told if state.status is Status.RUNNING]
    assert len(set(running)) == len(running) >= 4


@pytest.mark.parametrize(
    ("predict", "named"),
    [(engines_hang, "no engine is responding"), (scoring_hangs, "scoring stands still")],
)
def test_a_generation_in_which_nothing_goes_on_is_ended_and_named(tmp_path, monkeypatch, predict, named):
    begun = time.monotonic()
    post = generation(tmp_path, monkeypatch, predict)
    assert time.monotonic() - begun < 20
    assert [state.status for state in post.told][-1] is Status.FAILED
    [notice] = [event for event in post.events if isinstance(event, GenerationNotice)]
    assert notice.step == 4
    assert named in notice.message
    assert "train.hang_minutes" in notice.message
    assert not RunDirectory(tmp_path).step_model(4).exists()


def test_workers_wait_neither_for_a_metric_that_hangs_nor_for_what_comes_after_it(tmp_path, monkeypatch):
    ends, begun = threading.Event(), 0

    def hang(listener: Listener) -> dict[str, float]:
        nonlocal begun
        begun += 1
        listener.scoring()
        assert begun > 1 or ends.wait(60)
        return {"predict_rouge-l": float(begun)}

    def until(told: GenerationState) -> None:
        limit = time.monotonic() + 20
        while not post.told or replace(post.told[-1], predictions=0, signs=0) != told:
            assert time.monotonic() < limit, post.told[-1:]
            time.sleep(0.02)

    generator, post = made(tmp_path, monkeypatch, hang)
    hung = "generation failed: scoring stands still for 0.015 minutes (3 × train.hang_minutes), and cannot be stopped"
    after = "skipped, because the generation after step 4 hangs and cannot be stopped"
    with generator.begin(post):
        generator.take(DUE)
        until(GenerationState(77, Status.FAILED, failure=hung))
        generator.take(replace(DUE, step=8, ticket=78))
        until(GenerationState(78, Status.FAILED, failure=after))
        ends.set()
        limit = time.monotonic() + 20
        while generator._given_up is not None:
            assert time.monotonic() < limit
            time.sleep(0.02)
        assert post.told[-1].ticket == 78, "who waits for the second is told nothing of the first any more"
        generator.take(replace(DUE, step=12, ticket=79))
        until(GenerationState(79, Status.DONE, results={"predict_rouge-l": 2.0}))


def test_a_sign_of_life_that_comes_late_does_not_follow_the_end():
    told: list[tuple[int, int]] = []
    with GenerationGuard(current(), None, lambda *numbers: told.append(numbers)) as guard:
        guard.advanced(3)
        guard.heard()
    guard.heard()  # sent by an engine before its last prediction
    assert told == [(3, 1), (3, 2)]


def test_predictions_that_the_driver_takes_late_are_done(tmp_path, monkeypatch):
    post = generation(tmp_path, monkeypatch, lambda listener: {"predict_rouge-l": 0.5}, slow=True)
    assert post.told[-1] == GenerationState(77, Status.DONE, results={"predict_rouge-l": 0.5})
    assert [type(event) for event in post.events] == [GenerationDone]


def signs(
    begin: Callable[[SignsOfLife], AbstractContextManager[None]], work: Callable[[], Any], enough: int = 0
) -> int:
    """How many signs of life follow the first one while a process works: until there are enough, or for half a second."""
    found: list[float] = []
    limit = time.monotonic() + (60 if enough else 0.5)
    with begin(SignsOfLife(lambda: found.append(time.monotonic()), 4 * 0.1 / 60)):
        while time.monotonic() < limit and not len(found) > enough > 0:
            work()
    return len(found) - 1


def test_an_engine_that_computes_shows_it_by_its_steps():
    done = 0

    def step() -> None:
        nonlocal done
        done += 1

    assert signs(lambda signs: signs.computing(lambda: done), step, enough=2) >= 2
    stands = signs(lambda signs: signs.computing(lambda: done), lambda: sum(range(1000)))
    assert stands == 0, "a process that waits for a GPU in vain keeps a CPU busy"


@pytest.mark.parametrize(
    ("each", "shown"),
    [(Work(0.1, 0, 0), True), (Work(0, 2 << 20, 0), True), (Work(0, 0, 1), True), (Work(0, 9, 0), False)],
)
def test_an_engine_that_loads_shows_it_by_what_its_process_does(monkeypatch, each, shown):
    looks = itertools.count()
    monkeypatch.setattr(Work, "now", lambda: Work(*(value and next(looks) * value for value in each)))

    assert (signs(SignsOfLife.loading, lambda: time.sleep(0.01), enough=int(shown)) > 0) == shown


def test_a_process_sees_what_it_has_done(tmp_path):
    before = Work.now()
    (tmp_path / "weights").write_bytes(bytes(4 << 20))
    (tmp_path / "weights").read_bytes()
    begun = time.process_time()
    while time.process_time() < begun + 0.1:
        sum(range(1000))
    now = Work.now()
    assert now.cpu_seconds - before.cpu_seconds > 0.05
    assert now.read - before.read >= 4 << 20
    assert now.goes_on(before, 1.0)


@pytest.mark.parametrize("batching", ["static", "continuous"])
def test_engines_count_their_steps(model, batching):
    from raysft.generate.engines import create_engine

    settings = {
        "model": {"path": str(model), "dtype": "float32"},
        "data": {"train": [{"name": "a", "path": "a"}], "holdout": 0.1},
        "generate": {"batching": batching, "max_new_tokens": 5, "do_sample": False},
    }
    torch.manual_seed(0)
    engine: Any = create_engine(Config.model_validate(settings), str(model), threads=1)
    seen, complete = [], engine._completion
    engine._completion = lambda *given: seen.append(engine.steps) or complete(*given)
    before = engine.steps
    engine.complete(["a", "b"], [[5, 6, 7], [8, 9]])
    engine.complete(["a"], [[5, 6, 7]])
    assert len({before, *seen}) >= 2
