"""The evaluation before the first step: nothing is taken or kept if one worker cannot tell what it computes with."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist

from raysft.config import parse
from raysft.storage.path import StoragePath
from raysft.telemetry.results import Evaluation
from raysft.train import first_evaluation
from raysft.train.first_evaluation import FirstEvaluation, _write
from tests.tiny import tiny_model

CPU = torch.device("cpu")


@pytest.fixture
def job(tmp_path) -> Any:
    model = str(tiny_model(tmp_path / "model"))
    config = parse({"model": {"path": model}, "data": {"train": [{"name": "a", "path": "a"}]}})
    rows = {"e": SimpleNamespace(content=lambda: "rows")}
    evaluations = StoragePath.of(tmp_path / "evaluations")
    return SimpleNamespace(config=config, model=model, adapter=None, eval_rows=rows, evaluations=evaluations)


@pytest.fixture
def group(monkeypatch):
    """The first of two workers; returns what the second one sends, by default the same, and what was sent and broadcast."""
    state = SimpleNamespace(other=lambda sent: sent, sent=[], broadcast=0)

    def gather(found: list[Any], sent: Any) -> None:
        state.sent.append(sent)
        found[:] = [sent, state.other(sent)]

    def broadcast(found: list[Any], src: int) -> None:
        state.broadcast += 1

    monkeypatch.setattr(dist, "get_world_size", lambda: 2)
    monkeypatch.setattr(dist, "get_rank", lambda: 0)
    monkeypatch.setattr(dist, "all_gather_object", gather)
    monkeypatch.setattr(dist, "broadcast_object_list", broadcast)
    return state


@pytest.fixture
def kept(job, group) -> Evaluation:
    """An evaluation that the cache has for this job and these workers."""
    evaluation = Evaluation("e", 0, 7.25, 0.5, 9)
    _write(evaluation, FirstEvaluation.find(job, CPU).files["e"])
    assert FirstEvaluation.find(job, CPU).known == {"e": evaluation}
    return evaluation


def denied(device: torch.device) -> dict[str, Any]:
    raise PermissionError("/private")


def broken(device: torch.device) -> dict[str, Any]:
    raise RuntimeError("driver")


@pytest.mark.parametrize("description", [denied, broken, lambda device: None])
def test_a_worker_that_does_not_know_its_code_or_machine_says_so_to_the_others(
    job, group, kept, monkeypatch, description
):
    monkeypatch.setattr(first_evaluation, "describe_machine", description)
    assert FirstEvaluation.find(job, CPU) == FirstEvaluation({}, {})
    assert group.sent[-1] is None


def test_nothing_is_taken_or_kept_if_another_worker_does_not_know(job, group, kept, tmp_path):
    known = group.broadcast
    group.other = lambda sent: None
    found = FirstEvaluation.find(job, CPU)
    assert found == FirstEvaluation({}, {})
    assert group.broadcast == known, "the worker that does not know waits for no broadcast"
    assert not found.keep([kept])
    assert len(list((tmp_path / "evaluations").iterdir())) == 1


def test_a_worker_with_another_machine_has_another_evaluation(job, group, kept):
    group.other = lambda sent: (sent[0], "another")
    found = FirstEvaluation.find(job, CPU)
    assert not found.known
    assert found.files
