"""The private parts of Ray Train that raysft uses, in one place; another version of Ray may change them without notice.

Besides these names, ``elastic``, ``restarts`` and ``launch`` override or call other private methods: of the scaling
policies ``_get_reserved_resources``, ``_count_possible_workers`` and ``_maybe_send_resource_request``, of ``ScalingConfig``
``_resources_per_worker_not_none``, and of ``TorchTrainer`` ``_initialize_and_run_controller`` and ``_register_sigint_handler``.
``process_group`` calls ``abort`` and ``execute`` of a worker group.
"""

from __future__ import annotations

# Starts the process group; TorchConfig names it in a public property.
from ray.train.torch.config import _TorchBackend as TorchBackend

# Starts an actor that removes the workers' placement group once the controller is dead. It asks the dashboard of any cluster that
# it finds on the machine, and takes the controller for dead if that is another one: two training runs end each other.
from ray.train.v2._internal.callbacks.placement_group_callback import PlacementGroupCleanerCallback

# The start failures after which Ray Train starts the workers again.
from ray.train.v2._internal.exceptions import WorkerGroupStartupFailedError

# A worker's context: the only access to preemption notices that is not a collective call.
from ray.train.v2._internal.execution.context import get_train_context

# The controller's state after workers could not be placed: the next start asks for fewer.
from ray.train.v2._internal.execution.controller.state import ReschedulingState

# Decides whether workers that failed are restarted; TorchTrainer takes no failure policy in its public arguments.
from ray.train.v2._internal.execution.failure_handling import DefaultFailurePolicy, FailureDecision

# Decide how many workers there are; TorchTrainer takes no scaling policy in its public arguments.
from ray.train.v2._internal.execution.scaling_policy import (
    ElasticScalingPolicy,
    FixedScalingPolicy,
    NoopDecision,
    ResizeDecision,
    ScalingPolicy,
)

__all__ = [
    "DefaultFailurePolicy",
    "ElasticScalingPolicy",
    "FailureDecision",
    "FixedScalingPolicy",
    "NoopDecision",
    "PlacementGroupCleanerCallback",
    "ReschedulingState",
    "ResizeDecision",
    "ScalingPolicy",
    "TorchBackend",
    "WorkerGroupStartupFailedError",
    "get_train_context",
]
