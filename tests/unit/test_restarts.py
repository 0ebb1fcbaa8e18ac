"""Which failures restart the workers, and what the messages say."""

from __future__ import annotations

import pickle
import socket
from typing import Any

import pytest
from ray.exceptions import RayActorError
from ray.train import FailureConfig
from ray.train.v2._internal.exceptions import WorkerGroupStartupFailedError, WorkerHealthCheckFailedError
from ray.train.v2.api.exceptions import ControllerError, WorkerGroupError

from raysft.errors import RunFailed, StorageFailed
from raysft.train.checkpoint.catalog import CorruptCheckpoint
from raysft.train.faults import Fault, faults_of
from raysft.train.ray_train_internals import FailureDecision
from raysft.train.restarts import Restarts, cause


def raised(error: Exception, moment: str = "step 4", rank: int = 1) -> Exception:
    """The exception that reaches the driver when a worker's code raises an error."""
    try:
        with faults_of(rank, lambda: moment, lambda: "its rows 8 hold chat: a.jsonl:3"):
            raise error
    except Exception as caught:
        return pickle.loads(pickle.dumps(caught))


def decisions(*failures: dict[int, Exception]) -> list[str]:
    policy = Restarts(FailureConfig(max_failures=3))
    return [policy.make_decision(WorkerGroupError("", workers)).value for workers in failures]


def test_an_error_that_comes_again_at_the_same_step_ends_the_run():
    policy, errors = Restarts(FailureConfig(max_failures=3)), []
    for message in ("index 412 is out of range", "index 987 is out of range"):
        errors.append(
            WorkerGroupError("", {0: RuntimeError("connection closed by peer"), 1: raised(IndexError(message))})
        )
    assert policy.make_decision(errors[0]) is FailureDecision.RETRY
    assert str(cause(errors[0])).endswith("; its rows 8 hold chat: a.jsonl:3")
    assert policy.make_decision(errors[1]) is FailureDecision.RAISE
    found = cause(pickle.loads(pickle.dumps(errors[1])))
    assert isinstance(found, RunFailed)
    assert str(found).startswith(
        f"worker 1 ({socket.gethostname()}) failed in step 4: IndexError: index 987 is out of range (tests/unit/test_restarts.py:"
    )
    assert str(found).endswith(
        "; its rows 8 hold chat: a.jsonl:3; not retried, because it failed the same way before: "
        "fix the cause, or remove these records"
    )


def test_another_step_or_another_error_is_another_failure():
    first, later, other = raised(ValueError("x")), raised(ValueError("x"), "step 5"), raised(KeyError("x"))
    assert decisions({0: first}, {0: later}, {0: other}) == ["RETRY"] * 3
    assert decisions({0: first}, {0: later}, {0: raised(ValueError("x"))}) == ["RETRY", "RETRY", "RAISE"]


@pytest.mark.parametrize(
    "error",
    [
        ConnectionResetError("x"),
        OSError(5, "Input/output error"),
        StorageFailed("s3://b: no answer"),
        RuntimeError("[../gloo/transport/tcp/pair.cc:553] Connection closed by peer [127.0.0.1]:3"),
        RuntimeError("NCCL error: unhandled system error"),
        CorruptCheckpoint("part_0.safetensors is not what was written"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_infrastructure_failures_are_retried_up_to_max_failures(error):
    found: Any = raised(error)
    assert type(found) is type(error)
    assert decisions(*[{0: found}] * 4) == ["RETRY"] * 3 + ["RAISE"]


def test_a_worker_that_dies_is_the_cause_of_what_others_raise():
    fault = raised(ValueError("half a tensor"))
    assert isinstance(fault, Fault)
    died = WorkerHealthCheckFailedError("A worker health check failed.", RayActorError(error_msg="the actor died"))
    both: dict[int, Exception] = {0: fault, 1: died}
    assert decisions(both, both, both, both) == ["RETRY"] * 3 + ["RAISE"]
    assert str(cause(WorkerGroupError("", both))) == "worker 1 died: the actor died"


def test_a_worker_that_dies_is_named_with_the_address_of_its_node():
    error = RayActorError(error_msg="The actor died unexpectedly.\n\tpid: 17\n\tip: 10.0.0.3\nThe actor is dead.")
    assert str(cause(WorkerGroupError("", {2: error}))) == "worker 2 (10.0.0.3) died: The actor died unexpectedly"


def test_workers_that_do_not_start_say_why():
    found = cause(ControllerError(WorkerGroupStartupFailedError("OSError: port 4321: address already in use\n…")))
    assert str(found) == "the workers did not start: OSError: port 4321: address already in use"
