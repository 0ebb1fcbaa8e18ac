"""Ray Train: its scaling and failure policies, its controller, and what a worker knows of machines that are taken away."""

from __future__ import annotations

import inspect
from pathlib import Path

import ray.train
from ray.train.torch import TorchTrainer
from ray.train.torch import config as torch_config
from ray.train.v2._internal import constants
from ray.train.v2._internal import exceptions as train_exceptions
from ray.train.v2._internal.callbacks import placement_group_callback
from ray.train.v2._internal.exceptions import WorkerHealthCheckFailedError
from ray.train.v2._internal.execution import context, failure_handling, preemption, scaling_policy
from ray.train.v2._internal.execution.controller import state
from ray.train.v2._internal.execution.failure_handling import default
from ray.train.v2._internal.execution.worker_group import worker_group
from ray.train.v2.api import exceptions

from raysft.train import launch
from tests.contracts.contract import ROOT, Contract

INTERNALS = Contract("ray", "raysft/train/ray_train_internals.py")
ELASTIC = Contract("ray", "raysft/train/elastic.py")
LAUNCH = Contract("ray", "raysft/train/launch.py")
PROCESS_GROUP = Contract("ray", "raysft/train/process_group.py")
RESTARTS = Contract("ray", "raysft/train/restarts.py")


def where_used(text: str) -> Contract:
    """The module of raysft/train that uses a name."""
    users = (path for path in sorted(Path(ROOT, "raysft/train").glob("*.py")) if text in path.read_text())
    return Contract("ray", str(next(users).relative_to(ROOT)))


def test_policies_decide_how_many_workers_there_are():
    for name in ("ElasticScalingPolicy", "FixedScalingPolicy", "ScalingPolicy"):
        policy = INTERNALS.name(scaling_policy, name)
        ELASTIC.positional(policy.__init__, 2, "super().__init__(config)")
    for name in ("NoopDecision", "ResizeDecision"):
        INTERNALS.name(scaling_policy, name)
    ELASTIC.positional(scaling_policy.ResizeDecision, 2)
    elastic = scaling_policy.ElasticScalingPolicy
    for name, count in (
        ("make_decision_for_non_running_worker_group", 1),
        ("make_decision_for_running_worker_group", 3),
        ("after_controller_start", 2),
        ("after_controller_state_update", 3),
        ("_count_possible_workers", 2),
        ("_maybe_send_resource_request", 1),
        ("_get_reserved_resources", 1),
    ):
        ELASTIC.positional(ELASTIC.name(elastic, name), count)
    ELASTIC.name(scaling_policy.FixedScalingPolicy, "_maybe_send_resource_request")
    ELASTIC.name(ray.train.ScalingConfig, "_resources_per_worker_not_none")
    # The elastic policy asks the method that is overridden.
    ELASTIC.source(elastic, "self._count_possible_workers(", "_count_possible_workers")


def test_a_controller_gets_its_settings_from_the_environment_of_the_driver():
    assert {*launch.NOTICE, *launch.SHORT} <= set(constants.ENV_VARS_TO_PROPAGATE)


def test_a_controller_says_why_workers_are_started_again():
    INTERNALS.name(state, "ReschedulingState")
    source = inspect.getsource(state)
    assert "training_failed_error" in source, f"look at {ELASTIC.line('training_failed_error')}"
    for name in ("worker_failures", "controller_failure"):
        assert name in inspect.getsource(exceptions), f"look at {RESTARTS.line(name)}"
    RESTARTS.source(
        worker_group.WorkerGroup, "WorkerHealthCheckFailedError(error_msg, failure=e)", "health_check_failure"
    )
    RESTARTS.source(WorkerHealthCheckFailedError, "self.health_check_failure = failure", "health_check_failure")


def test_a_policy_decides_whether_workers_are_started_again():
    policy = INTERNALS.name(failure_handling, "DefaultFailurePolicy")
    INTERNALS.name(failure_handling, "FailureDecision")
    RESTARTS.positional(policy, 1, "super().__init__(failure_config)")
    RESTARTS.positional(RESTARTS.name(policy, "make_decision"), 2)
    RESTARTS.name(failure_handling.FailureDecision, "RAISE", "FailureDecision.RAISE")


def test_a_process_group_that_does_not_start_is_started_again():
    backend = INTERNALS.name(torch_config, "_TorchBackend", "TorchBackend")
    PROCESS_GROUP.positional(PROCESS_GROUP.name(backend, "on_start"), 3)
    PROCESS_GROUP.name(torch_config.TorchConfig, "backend_cls")
    PROCESS_GROUP.positional(PROCESS_GROUP.name(worker_group.WorkerGroup, "abort"), 1)
    PROCESS_GROUP.positional(PROCESS_GROUP.name(worker_group.WorkerGroup, "execute"), 2)
    error = INTERNALS.name(train_exceptions, "WorkerGroupStartupFailedError")
    assert error in default.RETRYABLE_CONTROLLER_ERRORS, f"look at {PROCESS_GROUP.line('ProcessGroupFailed')}"


def test_a_trainer_takes_policies_and_leaves_its_signal_handler_out():
    initialize = LAUNCH.name(TorchTrainer, "_initialize_and_run_controller")
    LAUNCH.name(TorchTrainer, "_register_sigint_handler")
    parameters = inspect.signature(initialize).parameters
    assert any(each.kind is inspect.Parameter.VAR_KEYWORD for each in parameters.values()), (
        f"look at {LAUNCH.line('_initialize_and_run_controller')}"
    )
    fit = inspect.getsource(inspect.getmodule(initialize))
    for name in ("scaling_policy=", "failure_policy=", "_register_sigint_handler(", "abort.remote("):
        assert name in fit, f"{name}; look at {LAUNCH.line(name.rstrip('=('))}"


def test_what_removes_placement_groups_is_one_of_the_callbacks():
    INTERNALS.name(placement_group_callback, "PlacementGroupCleanerCallback")
    LAUNCH.source(TorchTrainer._create_default_callbacks, "PlacementGroupCleanerCallback()", 'options["callbacks"]')
    LAUNCH.source(TorchTrainer.fit, "callbacks=", 'options["callbacks"]')


def test_a_worker_knows_which_machines_are_taken_away():
    INTERNALS.name(context, "get_train_context")
    user = where_used("preemption_context")
    assert "preemption_context" in context.TrainContext.__annotations__, f"look at {user.line('preemption_context')}"
    user.name(preemption.PreemptionContext, "preemption_info")
    notice = preemption.PreemptionInfo(deadline_ms=None, preempted_node_to_ranks={"node": [0]})
    assert user.name(notice, "deadline_ms") is None
    assert list(user.name(notice, "preempted_node_ids")) == ["node"]
