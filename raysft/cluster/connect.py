"""Join the Ray cluster that a run uses, or start one."""

from __future__ import annotations

import logging
import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from raysft.cluster import workers
from raysft.cluster.placement import Node, use_of
from raysft.cluster.ray_internals import (
    Head,
    cluster_address,
    drop_advice_on_processes,
    head_at,
    head_without_services,
    is_submitted,
    load_token,
    local_resources,
)
from raysft.config import Config
from raysft.errors import NotNow, RequestError, one_line

ANSWER_SECONDS = 20.0
"""How long a cluster may take to answer; one that has just started listens after a few seconds."""
ATTEMPT_SECONDS = 10.0
"""The timeout of one attempt."""
PAUSE_SECONDS = 1.0
ON_A_NODE = "run raysft on a node of the cluster: ray job submit --address http://HOST:8265 -- raysft …"


_deferred: list[str | None] = []
"""Address of the cluster that ``ensure_cluster`` is to start; empty if there is none to start."""


@contextmanager
def cluster(config: Config, deferred: bool = False) -> Iterator[list[Node]]:
    """Join or start the Ray cluster and yield its nodes; leave a cluster that was joined running.

    Args:
        config: the run's config.
        deferred: do not start a cluster before ``ensure_cluster`` is called; yield the resources of this machine.
    """
    import ray

    mine = not ray.is_initialized()
    with _sigterm_interrupts():
        yield from _cluster(config, deferred, mine)


def _cluster(config: Config, deferred: bool, mine: bool) -> Iterator[list[Node]]:
    import ray

    if mine:
        for name in ("ray", "ray.data", "ray.train", "ray.tune"):
            logging.getLogger(name).setLevel(logging.ERROR)
        # A cluster that the run starts ends with it, and its workers should not yield the cores to Ray's own processes (Ray starts
        # workers with niceness 15).
        os.environ.setdefault("RAY_worker_niceness", "0")
    try:
        if mine and deferred and _find(config.scaling.address) is None:
            _deferred[:] = [config.scaling.address]
            yield [Node.of(local_resources(), use=use_of({}, config.scaling.data_label))]
            return
        if mine:
            _join(config.scaling.address, config.scaling.use_gpu, trials=bool(config.tune.space))
        _quiet()
        yield alive_nodes(config.scaling.data_label)
    finally:
        _deferred.clear()
        if mine:
            ray.shutdown()
            workers.stop()


def ensure_cluster() -> None:
    """Start the cluster that ``cluster`` has deferred, if it has not started yet."""
    if _deferred:
        _join(_deferred.pop())
        _quiet()


def _quiet() -> None:
    """Keep Ray's logs out of a command's output."""
    import ray.data  # noqa: F401 - configures its loggers when it is imported

    for name in ("ray.data", "ray.train"):
        logging.getLogger(name).setLevel(logging.ERROR)


@contextmanager
def _sigterm_interrupts() -> Iterator[None]:
    """Handle SIGTERM, with which Kubernetes stops a pod, like Ctrl-C in the block, unless the caller handles it."""
    with _sigterm_kept():
        if threading.current_thread() is threading.main_thread() and signal.getsignal(signal.SIGTERM) is signal.SIG_DFL:
            signal.signal(signal.SIGTERM, signal.default_int_handler)
        yield


@contextmanager
def _sigterm_kept() -> Iterator[None]:
    """Leave the handler of SIGTERM as it was; Ray's, which ``ray.init`` installs, would dump its stack.

    Ray's own one of the meantime ends the process with exit code 15: then it is the turn of the handler that was there.
    """
    main = threading.current_thread() is threading.main_thread()
    before = signal.getsignal(signal.SIGTERM) if main else None
    try:
        yield
    except SystemExit as ended:
        if before is not None and ended.code == signal.SIGTERM:
            signal.signal(signal.SIGTERM, before)
            signal.raise_signal(signal.SIGTERM)
        raise
    finally:
        if before is not None:  # None: not installed from Python
            signal.signal(signal.SIGTERM, before)


def alive_nodes(data_label: str | None = None) -> list[Node]:
    """Return the nodes of the joined cluster that are alive, as far as Ray knows.

    Args:
        data_label: of the nodes for data, as ``scaling.data_label``.
    """
    import ray

    return [
        Node.of(
            node["Resources"],
            node["NodeManagerAddress"],
            node["NodeID"],
            use_of(node["Labels"], data_label),
        )
        for node in ray.nodes()
        if node["Alive"]
    ]


def _join(address: str | None, use_gpu: bool | None = None, trials: bool = False) -> None:
    """Connect to the cluster at an address, at RAY_ADDRESS or on this machine, or start one.

    Args:
        address: as ``scaling.address`` has it.
        use_gpu: True if workers that train use GPUs; None if nothing is trained, and forks would not pay.
        trials: True for a sweep.

    Raises:
        RequestError: the cluster does not exist, or refuses this process.
    """
    import ray

    named, found = _named(address), _find(address)
    if found is not None and not _ask(found, named):
        workers.stop()
    elif use_gpu is not None and not (found and workers.are_forks()):
        workers.start(use_gpu, trials)
    drop_advice_on_processes()
    try:
        with _sigterm_kept(), head_without_services(), workers.forked_workers(joins=found is not None) as options:
            ray.init(
                address=address, include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR, **options
            )
    except (OSError, RuntimeError, ValueError) as error:
        reason = one_line(error.__cause__ or error)
        what = f"cannot be joined ({reason}); {ON_A_NODE}" if found else f"cannot be started ({reason})"
        raise RequestError(f"{named}: {what}") from None


_TOKEN = "set RAY_AUTH_MODE=token, and RAY_AUTH_TOKEN (or the file ~/.ray/auth_token) to the cluster's token"


def prepare_workers(config: Config) -> None:
    """Start to import what workers need, in a process that they will be forks of, if a run will probably start its own cluster."""
    if config.scaling.address in (None, "local") and "RAY_ADDRESS" not in os.environ:
        workers.start(config.scaling.use_gpu, trials=bool(config.tune.space))


def _named(address: str | None) -> str:
    """Name the setting that an address comes from, for messages."""
    if address not in (None, "auto"):
        return f"scaling.address={address}"
    elsewhere = os.environ.get("RAY_ADDRESS")
    return f"RAY_ADDRESS={elsewhere}" if elsewhere else "the Ray cluster on this machine"


def _find(address: str | None) -> str | None:
    """Find HOST:PORT of the cluster to join in the way of ``ray.init``; None to start one."""
    from ray.exceptions import AuthenticationError

    named, given = _named(address), os.environ.get("RAY_ADDRESS") if address in (None, "auto") else address
    if given and "://" in given:
        raise RequestError(
            f"{named}: raysft cannot join a cluster through a Ray Client or dashboard address; {ON_A_NODE}"
        )
    try:
        found = cluster_address(address)
        if found is not None:
            load_token(discover=address in (None, "auto"))
    except AuthenticationError:
        raise RequestError(f"{named}: RAY_AUTH_MODE=token, but no token is set; {_TOKEN}") from None
    except ConnectionError:  # of auto
        raise RequestError(
            f"{named}: no Ray cluster is running on this machine; start one, or set HOST:PORT of a cluster"
        ) from None
    except (ValueError, OSError) as error:
        raise RequestError(
            f"{named}: not a valid Ray cluster address ({error}); set HOST:PORT of its head, or local to start one for this run"
        ) from None
    return found


def _ask(found: str, named: str) -> bool:
    """Check that a cluster's head is alive; otherwise ``ray.init`` would wait for minutes, or end the process.

    Returns:
        True if workers can be forks of a process of this node. Ray has one command for the workers of all nodes, so there must
        be no other node, and none that an autoscaler may add: a job, or a head without CPUs, is taken for a part of a larger
        cluster, whose workers have their own environment.
    """
    import grpc
    import ray

    with head_at(found) as head:
        version = _version(head, found, named)
        if version != ray.__version__:
            raise RequestError(
                f"{named}: the cluster runs Ray {version}, but this process has {ray.__version__}; use one image for both"
            )
        try:
            cpus = head.cpus_of_nodes(ATTEMPT_SECONDS)
        except grpc.RpcError:
            return False
        return len(cpus) == 1 and cpus[0] > 0 and not is_submitted()


def _version(head: Head, found: str, named: str) -> str:
    import grpc

    passing = (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED)
    limit = time.monotonic() + ANSWER_SECONDS
    while True:
        left = limit - time.monotonic()
        try:
            return head.version(max(0.1, min(ATTEMPT_SECONDS, left)))
        except grpc.RpcError as error:
            failed: Any = error
            if failed.code() == grpc.StatusCode.UNAUTHENTICATED:
                raise RequestError(f"{named}: the cluster requires a different access token; {_TOKEN}") from None
            if failed.code() not in passing or left < PAUSE_SECONDS:
                reason = one_line(failed.details() or "", 160)
                raise NotNow(f"{named}: no Ray cluster answers at {found} ({reason}); {_remedy(named)}") from None
            time.sleep(PAUSE_SECONDS)


def _remedy(named: str) -> str:
    if named.startswith("the"):
        return "run `ray stop` to forget it, or set scaling.address=local to start one for this run"
    return "check the address, or set scaling.address=local to start one for this run"
