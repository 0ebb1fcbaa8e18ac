"""Scaling policies: how many workers a training run has, given the nodes that are alive and ``scaling.num_workers``.

Ray Train's controller asks a policy. Ray's own policies leave no CPU for the data tasks, retry forever when a node is gone for
good, and restart in the middle of work when a node is added.
"""

from __future__ import annotations

import socket
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, cast

import ray
from ray.train import ScalingConfig

from raysft.cluster.placement import Node, max_workers, selector_of, use_of
from raysft.cluster.ray_internals import draining_nodes
from raysft.config.scaling import ScalingSection
from raysft.errors import RunFailed, RunStopped
from raysft.storage.run_directory import RunDirectory
from raysft.telemetry.events import Waiting, WorkersResized, WorkersRestarting
from raysft.train.checkpoint.catalog import newest
from raysft.train.controller import ControllerStarted
from raysft.train.event_pump import Message
from raysft.train.process_group import ProcessGroupFailed
from raysft.train.ray_train_internals import (
    ElasticScalingPolicy,
    FixedScalingPolicy,
    NoopDecision,
    ReschedulingState,
    ResizeDecision,
    ScalingPolicy,
)
from raysft.train.restarts import cause

GROW_CHECK_SECONDS = 5.0
"""Minimum time between two checks whether more workers fit."""
ANSWER_SECONDS = 3.0
"""How long a node may take to answer."""
FEWER_SECONDS = 600.0
"""How long a policy asks for fewer workers after Ray could not place as many as should fit; another job may hold the rest."""
SETTLE_SECONDS = 25.0
"""How long Ray, which checks its nodes every 20 seconds, may take to offer all of their resources."""
NOTIFY_SECONDS = 60.0
"""Seconds between two messages about waiting for nodes."""


def workers_of(
    scaling: ScalingSection, run: RunDirectory, steps: int, emit: Callable[[Message], None]
) -> tuple[ScalingConfig, ScalingPolicy]:
    """Make Ray Train's scaling config and the policy that decides on the number of workers.

    Args:
        scaling: the section of the config.
        run: the run directory; its checkpoints show when growing loses no work.
        steps: total steps of the training.
        emit: receives ``ControllerStarted``, ``WorkersRestarting``, ``Waiting`` and ``WorkersResized``.
    """
    resources = {"CPU": scaling.cpus_per_worker, **({"GPU": 1.0} if scaling.use_gpu else {})}
    config = ScalingConfig(
        num_workers=(scaling.fewest_workers, scaling.most_workers) if scaling.is_elastic else scaling.most_workers,
        use_gpu=scaling.use_gpu,
        resources_per_worker=resources,
        placement_strategy=scaling.placement.upper(),
        label_selector=selector_of(scaling.data_label, workers=True) or None,
    )
    return config, (_Elastic if scaling.is_elastic else _Fixed)(config, scaling, run, steps, emit)


def live_nodes(data_label: str | None) -> list[Node]:
    """Return the nodes that respond now and are not being drained.

    Args:
        data_label: of the nodes for data, as in ``scaling.data_label``.

    Ray notices a node's death 15 seconds late, and would wait a full minute for workers that it placed there.
    """
    draining = draining_nodes()
    nodes = [node for node in ray.nodes() if node["Alive"] and node["NodeID"] not in draining]
    with ThreadPoolExecutor(min(64, max(1, len(nodes)))) as pool:
        answers = list(pool.map(_answers, nodes))
    return [
        Node.of(node["Resources"], use=use_of(node["Labels"], data_label))
        for node, answer in zip(nodes, answers, strict=True)
        if answer
    ]


def _answers(node: dict[str, Any]) -> bool:
    try:
        with socket.create_connection((node["NodeManagerAddress"], node["NodeManagerPort"]), ANSWER_SECONDS):
            return True
    except OSError:
        return False


class _BoundedWait:
    """Base of both policies: waits a bounded time for nodes, and emits events."""

    def __init__(
        self,
        config: ScalingConfig,
        scaling: ScalingSection,
        run: RunDirectory,
        steps: int,
        emit: Callable[[Message], None],
    ) -> None:
        super().__init__(config)  # pyright: ignore
        self.scaling, self.run, self.steps, self.emit = scaling, run, steps, emit
        self._waiting_since: float | None = None
        self._notified = float("-inf")
        self._restarting = False
        """True once workers have failed or lost their node: a training run that waits for others continues from its checkpoint."""

    def max_workers(self) -> int:
        """Number of workers, in whole groups, that fit on the live nodes alongside the data tasks."""
        scaling = self.scaling
        return scaling.whole_groups(
            max_workers(live_nodes(scaling.data_label), scaling.cpus_per_worker, scaling.use_gpu)
        )

    def after_controller_start(self, train_run_context: Any) -> None:
        """Tell the driver the controller's actor handle; a policy runs inside the controller."""
        super().after_controller_start(train_run_context)  # pyright: ignore
        self.emit(ControllerStarted(ray.get_runtime_context().current_actor))

    def after_controller_state_update(self, previous_state: Any, current_state: Any) -> None:
        """Report why the workers are restarted."""
        error = getattr(current_state, "training_failed_error", None)
        reported = getattr(previous_state, "training_failed_error", None)
        if error is not None and error is not reported and not current_state.is_terminal():
            self._restarting = True
            self.emit(WorkersRestarting(str(cause(error))))

    def wait(self, available: int) -> NoopDecision:
        """Sleep for a moment.

        Args:
            available: number of workers that fit now.

        Raises:
            RunFailed: ``scaling.wait_minutes`` have passed.
            RunStopped: they have, and the training has already begun.
        """
        now, needed = time.monotonic(), self.scaling.fewest_workers
        self._waiting_since = now if self._waiting_since is None else self._waiting_since
        left = self._waiting_since + 60 * self.scaling.wait_minutes - now
        if left < 0 and self._restarting:
            raise RunStopped(
                f"stopped: the cluster could place only {available} of at least {needed} workers for "
                f"scaling.wait_minutes={self.scaling.wait_minutes:g}; add nodes"
            )
        if left < 0:
            raise RunFailed(
                f"scaling.num_workers needs at least {needed} workers, but the cluster could place only {available} for "
                f"scaling.wait_minutes={self.scaling.wait_minutes:g}; add nodes and run the same command again, or lower "
                "scaling.num_workers"
            )
        if now - self._notified > NOTIFY_SECONDS:
            self._notified = now
            self.emit(
                Waiting(
                    f"waiting for nodes: the cluster can place {available} of at least {needed} workers "
                    f"(giving up in {left / 60:.0f} minutes, scaling.wait_minutes)"
                )
            )
        time.sleep(min(1.0, max(0.1, left)))
        return NoopDecision()


class _Fixed(_BoundedWait, FixedScalingPolicy):
    """A fixed number of workers."""

    def make_decision_for_non_running_worker_group(self) -> Any:
        """Start the workers once they fit."""
        available = self.max_workers()
        if available < self.scaling.fewest_workers:
            self._maybe_send_resource_request()  # an autoscaler may add nodes
            return self.wait(available)
        self._waiting_since = None
        return super().make_decision_for_non_running_worker_group()


class _Elastic(_BoundedWait, ElasticScalingPolicy):
    """As many workers as fit. Grows only right after a checkpoint, so that no work is lost."""

    _checked = float("-inf")
    """Time of the last check whether more workers fit."""
    _growing_since: int | None = None
    """Step of the newest checkpoint when the policy found that more workers fit."""
    _short_since: float | None = None
    """Time since which Ray has offered less than should fit."""
    _requested = 0
    """Number of workers of the last start."""
    _limit: tuple[float, int] = (float("-inf"), 0)
    """(time, workers): until that time the policy asks for at most this many workers."""

    def after_controller_state_update(self, previous_state: Any, current_state: Any) -> None:
        """Ask for one worker or group fewer if Ray could not place them all."""
        super().after_controller_state_update(previous_state, current_state)
        error = getattr(current_state, "training_failed_error", None)
        placed = isinstance(getattr(error, "controller_failure", None), ProcessGroupFailed)
        if isinstance(current_state, ReschedulingState) and not placed:
            fewer = self.scaling.whole_groups(self._requested - 1)
            self._limit = time.monotonic() + FEWER_SECONDS, max(fewer, self.scaling.fewest_workers)

    def _count_possible_workers(self, reserved_resources: Any) -> int:
        cpus, gpus = self.scaling.cpus_per_worker, float(self.scaling.use_gpu)
        reserved = sum(Node.of(resources).capacity(cpus, gpus) for resources in reserved_resources.values())
        # Ray may count a dead node for a few seconds more, and leaves nothing for data tasks.
        return min(self.scaling.whole_groups(reserved), self._most_now())

    def _most_now(self) -> int:
        """Number of workers that should fit on the cluster now."""
        until, limit = self._limit
        return min(self.max_workers(), limit if time.monotonic() < until else self.scaling.most_workers)

    def make_decision_for_non_running_worker_group(self) -> Any:
        """Start as many workers as fit, but at least ``fewest_workers``."""
        self._growing_since = None
        decision: Any = super().make_decision_for_non_running_worker_group()
        if isinstance(decision, NoopDecision):
            return self.wait(self.max_workers())
        now = time.monotonic()
        self._short_since = now if self._short_since is None else self._short_since
        if decision.num_workers < self._most_now() and now - self._short_since < SETTLE_SECONDS:
            time.sleep(1.0)
            return NoopDecision()
        self._waiting_since, self._short_since, self._requested = None, None, decision.num_workers
        return decision

    def make_decision_for_running_worker_group(self, worker_group_state: Any, worker_group_status: Any) -> Any:
        """Grow after a checkpoint. Live workers are never removed."""
        self._maybe_send_resource_request()
        now = time.monotonic()
        # At the maximum there is nothing to check for, and a check queries each node.
        if now - self._checked < GROW_CHECK_SECONDS or worker_group_state.num_workers >= self.scaling.most_workers:
            return NoopDecision()
        self._checked = now
        reserved = self._get_reserved_resources()
        available = self._count_possible_workers(reserved) if reserved else 0
        if available <= worker_group_state.num_workers:
            self._growing_since = None
            return NoopDecision()
        checkpoint = newest(self.run.checkpoints)
        step = checkpoint.cursor.step if checkpoint else 0
        if self._growing_since is None:
            self._growing_since = step
        if step <= self._growing_since or step >= self.steps:
            return NoopDecision()
        self._requested = available
        self.emit(WorkersResized(worker_group_state.num_workers, available))
        return ResizeDecision(available, cast(Any, self.scaling_config._resources_per_worker_not_none))
