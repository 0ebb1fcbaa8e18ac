"""The private parts of Ray and Ray Data that raysft uses, in one place; ``tests/contracts/test_ray.py`` checks that they exist.

Those of Ray Train are in ``train/ray_train_internals.py``.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from importlib import import_module
from types import SimpleNamespace
from typing import Any

SERVICES = ("start_monitor", "start_log_monitor", "start_api_server")
"""Methods of a head that start a process each."""


def cluster_address(address: str | None) -> str | None:
    """Return HOST:PORT of the cluster that ``ray.init(address)`` would join, or None if it would start one.

    Raises:
        ConnectionError: the address is ``auto``, and no cluster runs on this machine.
        ValueError: it is not the address of a Ray cluster.
    """
    from ray._private import services

    found = services.canonicalize_bootstrap_address(address)  # pyright: ignore[reportArgumentType]
    if found is not None:
        services.extract_ip_port(found)
    return found


def local_resources() -> dict[str, float]:
    """Return the resources of this machine, ``{"CPU": 2.0, "GPU": 0.0}``, as Ray would find them if it started here."""
    from ray._private.resource_and_label_spec import ResourceAndLabelSpec

    found = ResourceAndLabelSpec().resolve(is_head=True, node_ip_address="127.0.0.1")
    return {"CPU": float(found.num_cpus or 0), "GPU": float(found.num_gpus or 0)}


def load_token(discover: bool) -> None:
    """Load the cluster's access token, as ``ray.init`` does.

    Args:
        discover: use a token that lies on this machine, even if ``RAY_AUTH_MODE`` does not ask for one.

    Raises:
        ray.exceptions.AuthenticationError: ``RAY_AUTH_MODE`` asks for a token, but there is none.
    """
    from ray._private.authentication import authentication_token_setup

    if discover:
        authentication_token_setup.maybe_enable_token_auth_if_token_available(warn_if_disabled=False)
    authentication_token_setup.ensure_token_if_auth_enabled(create_token_if_missing=False)


class Head:
    """A cluster's head, which is asked without ``ray.init``: that waits for minutes, or ends the process, if it does not respond.

    The methods raise ``grpc.RpcError``; timeouts are in seconds.
    """

    def __init__(self, service: Any) -> None:
        self._service = service

    def version(self, timeout: float) -> str:
        """Return its version of Ray."""
        from ray.core.generated.gcs_service_pb2 import CheckAliveRequest  # pyright: ignore[reportAttributeAccessIssue]

        return self._service.CheckAlive(CheckAliveRequest(), timeout=timeout).ray_version

    def cpus_of_nodes(self, timeout: float) -> list[float]:
        """Return the CPUs of each node that is alive."""
        from ray.core.generated.gcs_pb2 import GcsNodeInfo  # pyright: ignore[reportAttributeAccessIssue]
        from ray.core.generated.gcs_service_pb2 import GetAllNodeInfoRequest  # pyright: ignore[reportAttributeAccessIssue]

        nodes = self._service.GetAllNodeInfo(GetAllNodeInfoRequest(), timeout=timeout).node_info_list
        return [node.resources_total.get("CPU", 0.0) for node in nodes if node.state == GcsNodeInfo.ALIVE]


@contextmanager
def head_at(address: str) -> Iterator[Head]:
    """Open a channel to a cluster's head at HOST:PORT."""
    from ray._private.grpc_utils import init_grpc_channel
    from ray._private.ray_constants import GLOBAL_GRPC_OPTIONS
    from ray.core.generated.gcs_service_pb2_grpc import NodeInfoGcsServiceStub

    channel: Any = init_grpc_channel(address, GLOBAL_GRPC_OPTIONS)
    try:
        yield Head(NodeInfoGcsServiceStub(channel))
    finally:
        channel.close()


def is_submitted() -> bool:
    """Return True if ``ray job submit`` started this process."""
    from ray._private.runtime_env.constants import RAY_JOB_CONFIG_JSON_ENV_VAR

    return RAY_JOB_CONFIG_JSON_ENV_VAR in os.environ


@contextmanager
def setup_worker(file: str) -> Iterator[None]:
    """Make a cluster that is started in this block start its workers with a file in place of Ray's ``setup_worker.py``."""
    from ray._private import ray_constants

    # Joined to the folder of Ray's, which an absolute path replaces.
    with _replaced(ray_constants, "SETUP_WORKER_FILENAME", file):
        yield


@contextmanager
def head_without_services() -> Iterator[None]:
    """Start a cluster in this block without what its head would serve to others: autoscaling, logs and an API.

    Of a cluster that ends with the run nobody asks for them, and ``ray.init`` would wait until the API's process has imported what
    it serves.
    """
    from ray._private.node import Node

    with ExitStack() as stack:
        for name in SERVICES:
            stack.enter_context(_replaced(Node, name, lambda node, **options: None))
        yield


@contextmanager
def _replaced(owner: Any, name: str, value: Any) -> Iterator[None]:
    """Give an attribute another value in this block."""
    original = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, original)


def draw_actor_ids_from_system() -> None:
    """Let the ids of actor classes come from the operating system, and not from a generator in Ray's core.

    Importing a class of actors draws one. Forks of this process would continue with the same numbers, which are also the ids of
    their objects: two that start at a time would crash, and Ray renews the lease of one that crashes while it starts only after
    a minute.
    """
    from ray import ActorClassID, actor

    drawn = SimpleNamespace(from_random=lambda: ActorClassID(os.urandom(ActorClassID.size())))
    setattr(actor, "ActorClassID", drawn)  # noqa: B010 - a name that it does not export


WORKER_MODULES = (
    # for the first value that it gets
    "pydantic.v1.fields",
    "starlette.datastructures",
    "ray._private.arrow_serialization",
    # to run a pipeline of Ray Data
    "ray.data._internal.execution.streaming_executor",
    "ray.data._internal.execution.callbacks",
    "ray.data._internal.issue_detection",
    "ray.data._internal.logical.optimizers",
    "ray.data._internal.operator_event_exporter",
    "ray.data._internal.planner.planner",
    # to look whether it is a trial
    "ray.tune.trainable.trainable_fn_utils",
    # to end
    "ray.dag.compiled_dag_node",
)
"""What Ray imports in each worker while that works: as many modules, and as much time, as a small actor needs for all else."""


def import_worker_modules() -> None:
    """Import them before there are workers."""
    for name in WORKER_MODULES:
        with suppress(ImportError):  # Ray does without starlette
            import_module(name)


ADVICE = "worker processes have been started on node"
"""Part of a warning that a node prints when it has many more processes than CPUs."""


def drop_advice_on_processes() -> None:
    """Do not print Ray's advice to start fewer actors: a training has a handful that reserve no CPU, and so has each trial."""
    from ray._private import worker

    original = worker.print_to_stdstream
    if getattr(original, "drops_advice", False):
        return

    def printed(data: dict[str, Any], ignore_prefix: bool) -> None:
        if lines := [line for line in data["lines"] if ADVICE not in line]:
            original({**data, "lines": lines}, ignore_prefix)

    setattr(printed, "drops_advice", True)  # noqa: B010 - a function has no such attribute for the type checker
    worker.print_to_stdstream = printed


def draining_nodes() -> dict[str, float | None]:
    """Return the nodes that are being drained: their ids, and when they go, in seconds since 1970; None if that is not known."""
    from ray._private.state import state

    return {node: moment / 1000 if moment else None for node, moment in state.get_draining_nodes().items()}


def split_coordinator(split: Any) -> Any:
    """Return the actor that runs the pipeline behind ``Dataset.streaming_split``; killing it ends a pipeline that hangs."""
    return split._coord_actor


def scheduled(executor: Any) -> tuple[int, ...]:
    """Return what each operator of a running Ray Data pipeline counts: tasks that began, tasks that ended, and their blocks."""
    counts = [operator.metrics for operator in executor._topology]
    return tuple(
        number
        for of in counts
        for number in (of.num_tasks_submitted, of.num_tasks_finished, of.num_task_outputs_generated)
    )
