"""The Ray cluster that a run works on."""

from __future__ import annotations

import logging
import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from raysft.cluster.placement import Node
from raysft.cluster.ray_internals import cluster_address, head_version, load_token
from raysft.config import Config
from raysft.errors import RequestError, one_line

ANSWER_SECONDS = 20.0
"""How long a cluster may take to answer; one that has just started listens after a few seconds."""
ATTEMPT_SECONDS = 10.0
"""The timeout of one attempt."""
PAUSE_SECONDS = 1.0
ON_A_NODE = "raysft runs on a node of its cluster: ray job submit --address http://HOST:8265 -- raysft …"


@contextmanager
def cluster(config: Config) -> Iterator[list[Node]]:
    """Join or start the Ray cluster and yield its nodes; leave a cluster that was joined running."""
    import ray

    mine = not ray.is_initialized()
    if mine:
        for name in ("ray", "ray.data", "ray.train", "ray.tune"):
            logging.getLogger(name).setLevel(logging.ERROR)
        # A cluster of the run's own ends with it: nobody looks at its dashboard, and each of its processes takes a part of a
        # step's cores, before which its workers would have to step back (Ray starts them with niceness 15).
        os.environ.setdefault("RAY_worker_niceness", "0")
        _join(config.scaling.address)
    # Ray Data sets its own loggers up when it is imported.
    import ray.data

    for name in ("ray.data", "ray.train"):
        logging.getLogger(name).setLevel(logging.ERROR)
    if threading.current_thread() is threading.main_thread():
        # Kubernetes ends a pod with SIGTERM, at which Ray would dump its stack; it is to end like Ctrl-C.
        signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield alive_nodes()
    finally:
        if mine:
            ray.shutdown()


def alive_nodes() -> list[Node]:
    """Return the nodes of the joined cluster that are alive, as far as Ray knows."""
    import ray

    return [
        Node.of(node["Resources"], node["NodeManagerAddress"], node["NodeID"]) for node in ray.nodes() if node["Alive"]
    ]


def _join(address: str | None) -> None:
    """Connect to the cluster of an address, of RAY_ADDRESS or of this machine, or start one.

    Raises:
        RequestError: there is no such cluster, or it does not take this process.
    """
    import ray

    named, found = _named(address), _find(address)
    if found is not None:
        _ask(found, named)
    try:
        ray.init(address=address, include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR)
    except (ConnectionError, RuntimeError, ValueError) as error:
        reason = one_line(error.__cause__ or error)
        what = f"cannot be joined ({reason}); {ON_A_NODE}" if found else f"cannot be started ({reason})"
        raise RequestError(f"{named}: {what}") from None


_TOKEN = "set RAY_AUTH_MODE=token, and RAY_AUTH_TOKEN (or the file ~/.ray/auth_token) to the cluster's token"


def _named(address: str | None) -> str:
    """Where an address comes from, for messages."""
    if address not in (None, "auto"):
        return f"scaling.address={address}"
    elsewhere = os.environ.get("RAY_ADDRESS")
    return f"RAY_ADDRESS={elsewhere}" if elsewhere else "the Ray cluster of this machine"


def _find(address: str | None) -> str | None:
    """HOST:PORT of the cluster to join, found as ``ray.init`` finds it; None to start one."""
    from ray.exceptions import AuthenticationError

    named, given = _named(address), os.environ.get("RAY_ADDRESS") if address in (None, "auto") else address
    if given and "://" in given:
        raise RequestError(f"{named}: is the address of a Ray Client or a dashboard, which no run can use; {ON_A_NODE}")
    try:
        found = cluster_address(address)
        if found is not None:
            load_token(discover=address in (None, "auto"))
    except AuthenticationError:
        raise RequestError(f"{named}: RAY_AUTH_MODE is token and there is no token; {_TOKEN}") from None
    except ConnectionError:  # of auto
        raise RequestError(f"{named}: no Ray cluster runs on this machine; start one, or name its HOST:PORT") from None
    except (ValueError, OSError) as error:
        raise RequestError(
            f"{named}: is no address of a Ray cluster ({error}); give HOST:PORT of its head, or local for a cluster of "
            "this run's own"
        ) from None
    return found


def _ask(found: str, named: str) -> None:
    """Ask a cluster's head whether it lives: ``ray.init`` would wait for minutes, or end the process, where it does not."""
    import grpc
    import ray

    passing = (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED)
    limit, version = time.monotonic() + ANSWER_SECONDS, None
    with head_version(found) as ask:
        while version is None:
            left = limit - time.monotonic()
            try:
                version = ask(max(0.1, min(ATTEMPT_SECONDS, left)))
            except grpc.RpcError as error:
                failed: Any = error
                if failed.code() == grpc.StatusCode.UNAUTHENTICATED:
                    raise RequestError(f"{named}: the cluster wants another access token; {_TOKEN}") from None
                if failed.code() not in passing or left < PAUSE_SECONDS:
                    reason = one_line(failed.details() or "", 160)
                    raise RequestError(
                        f"{named}: no Ray cluster answers at {found} ({reason}); {_remedy(named)}"
                    ) from None
                time.sleep(PAUSE_SECONDS)
    if version != ray.__version__:
        raise RequestError(
            f"{named}: the cluster has Ray {version} and this process {ray.__version__}; use one image for both"
        )


def _remedy(named: str) -> str:
    if named.startswith("the"):
        return "`ray stop` forgets it, or set scaling.address=local for one of this run's own"
    return "check the address, or set scaling.address=local for a cluster of this run's own"
