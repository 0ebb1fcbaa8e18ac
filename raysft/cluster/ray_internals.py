"""The private parts of Ray and Ray Data that raysft uses, in one place; ``tests/contracts/test_ray.py`` checks that they exist.

Those of Ray Train are in ``train/ray_train_internals.py``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any


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


@contextmanager
def head_version(address: str) -> Iterator[Callable[[float], str]]:
    """Open a channel to a cluster's head; yield a function that asks it, for some seconds, for its version of Ray.

    ``ray.init`` would wait for minutes, or end the process, if the head does not answer. The function raises ``grpc.RpcError``.
    """
    from ray._private.grpc_utils import init_grpc_channel
    from ray._private.ray_constants import GLOBAL_GRPC_OPTIONS
    from ray.core.generated.gcs_service_pb2 import CheckAliveRequest  # pyright: ignore[reportAttributeAccessIssue]
    from ray.core.generated.gcs_service_pb2_grpc import NodeInfoGcsServiceStub

    channel: Any = init_grpc_channel(address, GLOBAL_GRPC_OPTIONS)
    service = NodeInfoGcsServiceStub(channel)
    try:
        yield lambda seconds: service.CheckAlive(CheckAliveRequest(), timeout=seconds).ray_version
    finally:
        channel.close()


def draining_nodes() -> set[str]:
    """Return the ids of the nodes that are being drained."""
    from ray._private.state import state

    return set(state.get_draining_nodes())


def split_coordinator(split: Any) -> Any:
    """Return the actor that runs the pipeline behind ``Dataset.streaming_split``; killing it ends a pipeline that hangs."""
    return split._coord_actor
