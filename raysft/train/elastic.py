"""How many workers a training has at a moment: what the cluster's living nodes have room for, within what was asked for.

Ray Train asks these policies in its controller. Its own would start workers that leave no CPU to the data tasks, try for ever
where a node is gone for good, and begin again in the middle of the work when a node is added.
"""

from __future__ import annotations

import socket
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any, cast

import ray
from ray._private.state import state as cluster_state
from ray.train import ScalingConfig
from ray.train.v2._internal.execution.controller.state import ReschedulingState
from ray.train.v2._internal.execution.scaling_policy import (
    ElasticScalingPolicy,
    FixedScalingPolicy,
    NoopDecision,
    ResizeDecision,
    ScalingPolicy,
)

from raysft.cluster.placement import Node, max_workers
from raysft.config.scaling import ScalingSection
from raysft.errors import RunFailed
from raysft.storage.run_directory import RunDirectory
from raysft.telemetry.events import Emit, Waiting, WorkersResized, WorkersRestarting
from raysft.train.checkpoint.format import newest
from raysft.train.restarts import cause

LOOK_SECONDS = 5.0
"""How often it is looked whether there is room for more workers."""
ANSWER_SECONDS = 3.0
"""How long a node may take to answer."""
TAKEN_SECONDS = 600.0
"""How long fewer workers are asked for after those that there should be room for found none: others may hold it."""
SETTLE_SECONDS = 25.0
"""How long Ray, which looks at its nodes every 20 seconds, may take to give what they have."""
SAY_SECONDS = 60.0
"""How often it is said what is waited for."""


def workers_of(
    scaling: ScalingSection, run: RunDirectory, steps: int, emit: Emit
) -> tuple[ScalingConfig, ScalingPolicy]:
    """What Ray Train is asked for, and who decides how many workers there are.

    Args:
        scaling: what was asked for.
        run: whose checkpoints say when growing costs no work.
        steps: of the whole training.
        emit: takes ``WorkersRestarting``, ``Waiting`` and ``WorkersResized``.
    """
    resources = {"CPU": scaling.cpus_per_worker, **({"GPU": 1.0} if scaling.use_gpu else {})}
    config = ScalingConfig(
        num_workers=(scaling.fewest_workers, scaling.most_workers) if scaling.is_elastic else scaling.most_workers,
        use_gpu=scaling.use_gpu,
        resources_per_worker=resources,
    )
    return config, (_Elastic if scaling.is_elastic else _Fixed)(config, scaling, run, steps, emit)


def living_nodes() -> list[Node]:
    """Return the nodes that answer now and are not being drained.

    Ray knows of a node's death 15 seconds later; workers that were placed there would be waited for a whole minute.
    """
    leaving = cluster_state.get_draining_nodes()
    nodes = [node for node in ray.nodes() if node["Alive"] and node["NodeID"] not in leaving]
    with ThreadPoolExecutor(min(64, max(1, len(nodes)))) as pool:
        answers = list(pool.map(_answers, nodes))
    return [Node.of(node["Resources"]) for node, answer in zip(nodes, answers, strict=True) if answer]


def _answers(node: dict[str, Any]) -> bool:
    try:
        with socket.create_connection((node["NodeManagerAddress"], node["NodeManagerPort"]), ANSWER_SECONDS):
            return True
    except OSError:
        return False


class _Patience:
    """Waits a bounded time for nodes, and says so."""

    def __init__(
        self, config: ScalingConfig, scaling: ScalingSection, run: RunDirectory, steps: int, emit: Emit
    ) -> None:
        super().__init__(config)  # pyright: ignore
        self.wanted, self.run, self.steps, self.emit = scaling, run, steps, emit
        self._waits_since: float | None = None
        self._said = float("-inf")

    def max_workers(self) -> int:
        """Workers that the living nodes have room for beside the data tasks."""
        return max_workers(living_nodes(), self.wanted.cpus_per_worker, self.wanted.use_gpu)

    def after_controller_state_update(self, previous_state: Any, current_state: Any) -> None:
        """Say why workers are started again."""
        error = getattr(current_state, "training_failed_error", None)
        known = getattr(previous_state, "training_failed_error", None)
        if error is not None and error is not known and not current_state.is_terminal():
            self.emit(WorkersRestarting(str(cause(error))))

    def wait(self, there: int) -> NoopDecision:
        """Let some time go by.

        Raises:
            RunFailed: it was waited long enough.
        """
        now = time.monotonic()
        self._waits_since = now if self._waits_since is None else self._waits_since
        left = self._waits_since + 60 * self.wanted.wait_minutes - now
        fewest = self.wanted.fewest_workers
        if left < 0:
            raise RunFailed(
                f"the cluster has had room for {there} of {fewest} workers for scaling.wait_minutes="
                f"{self.wanted.wait_minutes:g}; add nodes and give the command again, or let scaling.num_workers begin lower"
            )
        if now - self._said > SAY_SECONDS:
            self._said = now
            self.emit(
                Waiting(
                    f"waiting for nodes: the cluster has room for {there} of at least {fewest} workers "
                    f"({left / 60:.0f} more minutes, scaling.wait_minutes)"
                )
            )
        time.sleep(min(1.0, max(0.1, left)))
        return NoopDecision()


class _Fixed(_Patience, FixedScalingPolicy):
    """One number of workers."""

    def make_decision_for_non_running_worker_group(self) -> Any:
        """Start them when there is room."""
        there = self.max_workers()
        if there < self.wanted.fewest_workers:
            self._maybe_send_resource_request()  # where nodes can be had for the asking
            return self.wait(there)
        self._waits_since = None
        return super().make_decision_for_non_running_worker_group()


class _Elastic(_Patience, ElasticScalingPolicy):
    """As many workers as there is room for; more of them only when a checkpoint was just written, so that no work is lost."""

    _looked = float("-inf")
    _growing_since: int | None = None
    """The newest checkpoint's step when room for more was found."""
    _short_since: float | None = None
    """When Ray gave less than there should be."""
    _asked = 0
    """Workers that were asked for last."""
    _taken: tuple[float, int] = (float("-inf"), 0)
    """Until when no more than so many workers are asked for."""

    def after_controller_state_update(self, previous_state: Any, current_state: Any) -> None:
        """Where workers found no place, ask for one fewer."""
        super().after_controller_state_update(previous_state, current_state)
        if isinstance(current_state, ReschedulingState):
            self._taken = time.monotonic() + TAKEN_SECONDS, max(self._asked - 1, self.wanted.fewest_workers)

    def _count_possible_workers(self, reserved_resources: Any) -> int:
        cpus, gpus = self.wanted.cpus_per_worker, float(self.wanted.use_gpu)
        reserved = sum(Node.of(resources).capacity(cpus, gpus) for resources in reserved_resources.values())
        # Ray may count a dead node for some seconds more, and leaves nothing to data tasks.
        return min(reserved, self._most_now())

    def _most_now(self) -> int:
        """Workers that the cluster should have room for."""
        until, most = self._taken
        return min(self.max_workers(), most if time.monotonic() < until else self.wanted.most_workers)

    def make_decision_for_non_running_worker_group(self) -> Any:
        """Start as many as there is room for, but not fewer than the fewest."""
        self._growing_since = None
        decision: Any = super().make_decision_for_non_running_worker_group()
        if isinstance(decision, NoopDecision):
            return self.wait(self.max_workers())
        now = time.monotonic()
        self._short_since = now if self._short_since is None else self._short_since
        if decision.num_workers < self._most_now() and now - self._short_since < SETTLE_SECONDS:
            time.sleep(1.0)
            return NoopDecision()
        self._waits_since, self._short_since, self._asked = None, None, decision.num_workers
        return decision

    def make_decision_for_running_worker_group(self, worker_group_state: Any, worker_group_status: Any) -> Any:
        """Grow after a checkpoint. Workers that are alive are never taken away."""
        self._maybe_send_resource_request()
        now = time.monotonic()
        # With all that were asked for there is nothing to look for: looking asks each node.
        if now - self._looked < LOOK_SECONDS or worker_group_state.num_workers >= self.wanted.most_workers:
            return NoopDecision()
        self._looked = now
        reserved = self._get_reserved_resources()
        there = self._count_possible_workers(reserved) if reserved else 0
        if there <= worker_group_state.num_workers:
            self._growing_since = None
            return NoopDecision()
        checkpoint = newest(self.run.checkpoints)
        step = checkpoint.cursor.step if checkpoint else 0
        if self._growing_since is None:
            self._growing_since = step
        if step <= self._growing_since or step >= self.steps:
            return NoopDecision()
        self._asked = there
        self.emit(WorkersResized(worker_group_state.num_workers, there))
        return ResizeDecision(there, cast(Any, self.scaling_config._resources_per_worker_not_none))
