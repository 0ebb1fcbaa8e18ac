"""Scaling policies: the number of workers that a cluster's nodes allow, and bounded waits for nodes."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from ray.exceptions import RayActorError
from ray.train.v2.api.exceptions import ControllerError, WorkerGroupError

from raysft.cluster.placement import Node
from raysft.config.scaling import ScalingSection
from raysft.errors import RunFailed, RunStopped
from raysft.storage.run_directory import RunDirectory
from raysft.train import elastic
from raysft.train.ray_train_internals import NoopDecision, ReschedulingState, ResizeDecision
from raysft.train.restarts import cause


class Cluster:
    """The nodes of a cluster, as Ray reports them."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.nodes: list[Node] = []
        patch.setattr(elastic, "live_nodes", lambda data_label: self.nodes)
        self.reserved: list[dict[str, float]] | None = None
        """What Ray offers, if that is less."""
        patch.setattr(
            elastic._Elastic,
            "_get_reserved_resources",
            lambda policy: dict(
                enumerate([{"CPU": node.cpus} for node in self.nodes] if self.reserved is None else self.reserved)
            ),
        )
        for kind in (elastic._Elastic, elastic._Fixed):
            patch.setattr(kind, "_maybe_send_resource_request", lambda policy: None)
        patch.setattr(elastic.time, "sleep", lambda seconds: None)
        patch.setattr(elastic, "GROW_CHECK_SECONDS", 0.0)


@pytest.fixture
def cluster(monkeypatch) -> Cluster:
    return Cluster(monkeypatch)


def policy_of(folder: Path, events: list[Any] | None = None, **settings) -> Any:
    events = events if events is not None else []
    section = ScalingSection(**settings)
    _, policy = elastic.workers_of(section, RunDirectory(folder), 100, events.append)
    return policy


@pytest.mark.parametrize("workers", [2, [1, 2]])
def test_ray_train_is_told_where_workers_stand(tmp_path, workers):
    plain, other = (
        elastic.workers_of(ScalingSection(num_workers=workers, **more), RunDirectory(tmp_path), 100, print)[0]
        for more in ({}, {"placement": "spread", "data_label": "role=data"})
    )
    assert (plain.placement_strategy, plain.label_selector) == ("PACK", None)
    assert (other.placement_strategy, other.label_selector) == ("SPREAD", {"role": "!data"})


def started(policy: Any) -> int:
    """Number of workers that are started now; 0 while the policy waits."""
    decision = policy.make_decision_for_non_running_worker_group()
    return decision.num_workers if isinstance(decision, ResizeDecision) else 0


def test_as_many_workers_start_as_fit_beside_the_data_tasks(cluster, tmp_path):
    policy = policy_of(tmp_path, num_workers=[1, 4])
    for cpus, workers in (((2,), 1), ((2, 1), 2), ((8, 8), 4), ((0.5,), 0)):
        cluster.nodes = [Node(float(count)) for count in cpus]
        assert started(policy) == workers, cpus


def test_workers_that_share_rows_start_in_whole_groups(cluster, tmp_path):
    policy = policy_of(tmp_path, num_workers=[2, 6], sequence_parallel=2)
    for cpus, workers in (((2,), 0), ((2, 1), 2), ((4,), 2), ((2, 2, 2), 4), ((8, 8), 6)):
        cluster.nodes = [Node(float(count)) for count in cpus]
        assert started(policy) == workers, cpus


def test_fractions_of_a_cpu_are_counted_right(cluster, tmp_path):
    cluster.nodes = [Node(2.0)]
    assert started(policy_of(tmp_path, num_workers=[1, 4], cpus_per_worker=0.7)) == 2


def test_a_wait_for_nodes_is_reported_and_bounded(cluster, tmp_path):
    events: list[Any] = []
    policy = policy_of(tmp_path, events, num_workers=2, wait_minutes=0.001)
    cluster.nodes = [Node(1.5)]
    assert started(policy) == 0
    assert "1 of at least 2 workers" in events[0].message
    assert "scaling.wait_minutes" in events[0].message
    policy._waiting_since -= 1
    with pytest.raises(RunFailed, match=r"2 workers, .* only 1 .*scaling.wait_minutes=0.001; add nodes") as caught:
        started(policy)
    assert "scaling.num_workers" in str(caught.value)
    cluster.nodes = [Node(4.0)]
    assert started(policy) == 2


def test_a_training_that_waited_in_vain_for_nodes_in_place_of_those_that_went_can_go_on(cluster, tmp_path):
    policy = policy_of(tmp_path, num_workers=2, wait_minutes=0.001)
    gone = SimpleNamespace(training_failed_error=WorkerGroupError("", {1: RayActorError()}), is_terminal=lambda: False)
    policy.after_controller_state_update(None, gone)
    cluster.nodes = [Node(1.5)]
    assert started(policy) == 0
    policy._waiting_since -= 1
    with pytest.raises(
        RunStopped, match=r"stopped: .* only 1 of at least 2 workers .*wait_minutes=0.001; add nodes"
    ) as caught:
        started(policy)
    assert cause(ControllerError(caught.value)) is caught.value


def test_ray_gets_some_time_to_see_all_nodes(cluster, tmp_path):
    policy = policy_of(tmp_path, num_workers=[1, 2])
    cluster.nodes, cluster.reserved = [Node(2.0), Node(2.0)], [{"CPU": 1.0}]
    assert started(policy) == 0
    policy._short_since -= elastic.SETTLE_SECONDS
    assert started(policy) == 1, "another job may hold the rest"
    cluster.reserved = None
    assert started(policy) == 2


def test_it_grows_right_after_a_checkpoint(cluster, tmp_path, monkeypatch):
    newest = [SimpleNamespace(step=10)]
    monkeypatch.setattr(elastic, "newest", lambda checkpoints: SimpleNamespace(cursor=newest[0]))
    policy = policy_of(tmp_path, num_workers=[1, 4])
    cluster.nodes = [Node(4.0)]
    running = SimpleNamespace(num_workers=1)

    def decide() -> Any:
        return policy.make_decision_for_running_worker_group(running, None)

    assert isinstance(decide(), NoopDecision), "the work since step 10 would be lost"
    newest[0] = SimpleNamespace(step=20)
    assert decide().num_workers == 3
    newest[0] = SimpleNamespace(step=100)
    assert isinstance(decide(), NoopDecision), "no step is left"
    cluster.nodes = [Node(0.5)]
    assert isinstance(decide(), NoopDecision), "live workers are never removed"


def test_after_a_failed_placement_fewer_workers_are_requested(cluster, tmp_path):
    policy = policy_of(tmp_path, num_workers=[2, 4])
    cluster.nodes = [Node(8.0)]
    assert started(policy) == 4
    for expected in (3, 2, 2):
        policy.after_controller_state_update(
            None, ReschedulingState(training_failed_error=ControllerError(OSError("x")))
        )
        assert started(policy) == expected
