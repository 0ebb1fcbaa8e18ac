"""Nodes of a cluster that die, leave with notice and come back: several raylets on this machine."""

from __future__ import annotations

import json
import os
import random
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import psutil

from raysft.cluster.forkserver import ADDRESS, FILE
from raysft.cluster.ray_internals import head_without_services, setup_worker
from raysft.cluster.workers import ForkServer
from raysft.config import load
from raysft.storage.json_files import read_jsonl
from raysft.tune.trials import combinations
from tests.clusters import IDLE
from tests.faults.runs import Moment, Outcome, attempt, compared, said, steps_of

LONGER = ("train.epochs=60", "train.eval_every_steps=200", "train.learning_rate=1.0e-4")
"""Enough steps for what takes its time; at a high learning rate so many would make much of the last digit of a sum, which is
another one with other workers."""
ELASTIC = ("scaling.num_workers=[1, 2]", "scaling.cpus_per_worker=2")
"""Two workers, neither of which finds room on the head."""
GROUPS = (
    "scaling.sequence_parallel=2",
    "scaling.num_workers=[2, 4]",
    "scaling.cpus_per_worker=1",
    "scaling.placement=spread",
)
"""Two groups of two workers, at least one worker on each node."""


class Nodes:
    """A head, where the driver and the data tasks find room, and nodes for a worker each.

    Args:
        head: CPUs of the head.
        each: CPUs of the nodes.
        count: their number.
        others: options of further nodes.
    """

    def __init__(self, head: int = 1, each: int = 2, count: int = 2, others: Sequence[Mapping[str, Any]] = ()) -> None:
        from ray.cluster_utils import Cluster

        # Of its own in all: `ray.init()` of other programs is not to find it. The path of a Unix socket must be short.
        self._folder = tempfile.mkdtemp(prefix="raysft-", dir="/tmp")
        Path("/tmp/ray").mkdir(exist_ok=True)  # where Ray notes the address, in a folder that its first cluster makes
        all_have = {"object_store_memory": 150_000_000, "temp_dir": self._folder}
        first = {"num_cpus": head, "include_dashboard": False, **all_have}
        self._servers: list[ForkServer] = []
        with self._forks(), head_without_services():
            self._cluster = Cluster(initialize_head=True, head_node_args=first)
        self._more = {"num_cpus": each, **all_have}
        self._nodes = [self._add() for _ in range(count)]
        for options in others:
            self._add(**options)

    def _add(self, **options: Any) -> Any:
        with self._forks():
            return self._cluster.add_node(**{**self._more, **options})

    @contextmanager
    def _forks(self) -> Iterator[None]:
        """Let the workers of a node that starts in this block be forks of a server: each would import for seconds."""
        self._servers.append(ForkServer())
        variables = {**IDLE, ADDRESS: self._servers[-1].address}
        with setup_worker(FILE), patch.dict(os.environ, variables):
            yield

    @property
    def address(self) -> str:
        """Of the cluster, as a setting."""
        return f"scaling.address={self._cluster.address}"

    def kill(self) -> None:
        """The second node, without a word."""
        self._cluster.remove_node(self._nodes.pop(), allow_graceful=False)

    def kill_around(self, process: psutil.Process) -> None:
        """The node that a process is a worker of, without a word."""
        ours = {node.all_processes["raylet"][0].process.pid: node for node in self._nodes}
        (node,) = (ours[parent.pid] for parent in process.parents() if parent.pid in ours)
        self._nodes.remove(node)
        self._cluster.remove_node(node, allow_graceful=False)

    def drain(self, seconds: float) -> None:
        """Let the second node know that it will be taken away, as clouds do with spot machines."""
        from ray._raylet import GcsClient
        from ray.core.generated.autoscaler_pb2 import DrainNodeReason

        deadline = int(1000 * (time.time() + seconds))
        reason = DrainNodeReason.DRAIN_NODE_REASON_PREEMPTION
        GcsClient(address=self._cluster.address).drain_node(self._nodes[-1].node_id, reason, "spot", deadline)

    def add(self) -> None:
        """A node in place of the one that is gone."""
        self._nodes.append(self._add())

    def close(self) -> None:
        """All of them."""
        self._cluster.shutdown()
        for server in self._servers:
            server.stop()
        shutil.rmtree(self._folder, ignore_errors=True)


@contextmanager
def nodes(head: int = 1, each: int = 2, count: int = 2, others: Sequence[Mapping[str, Any]] = ()) -> Iterator[Nodes]:
    """A cluster for a while."""
    cluster = Nodes(head, each, count, others)
    try:
        yield cluster
    finally:
        cluster.close()


def once(due: Callable[[Path, float], bool], act: Callable[[], Any]) -> Moment:
    """Do something when its time has come; the command itself is left alone."""
    done: list[bool] = []

    def moment(run: Path, seconds: float) -> bool:
        if not done and due(run, seconds):
            done.append(True)
            act()
        return False

    return moment


def dies_in_training(folder: Path, reference: str, fault: str, draw: random.Random) -> Outcome:
    """A node is killed in the middle of a step; training goes on with one worker."""
    with nodes() as cluster:
        return dies_under(cluster, folder, reference, fault, draw, "node", ELASTIC)


def dies_under_groups(folder: Path, reference: str, fault: str, draw: random.Random) -> Outcome:
    """A node is killed, and with it workers that share rows with those of another node; training goes on with one group."""
    with nodes() as cluster:
        return dies_under(cluster, folder, reference, fault, draw, "groups", GROUPS)


def dies_under(
    cluster: Nodes, folder: Path, reference: str, fault: str, draw: random.Random, name: str, settings: Sequence[str]
) -> Outcome:
    """A node of a cluster is killed in the middle of a step of a training with some settings."""
    step = draw.randint(4, 12)
    moment = once(lambda run, seconds: len(steps_of(run)) >= step, cluster.kill)
    code = attempt(folder, name, moment, *settings, cluster.address)
    return compared(folder, reference, name, fault, 1, code, exact=False)


def dies_in_evaluation(folder: Path, reference: str, fault: str, draw: random.Random) -> Outcome:
    """A node is killed while the workers evaluate."""

    def due(run: Path, seconds: float) -> bool:
        return bool(steps := steps_of(run)) and steps[-1]["current_steps"] % 5 == 0

    with nodes() as cluster:
        code = attempt(folder, "evaluation", once(due, cluster.kill), *ELASTIC, cluster.address)
    return compared(folder, reference, "evaluation", fault, 1, code, exact=False)


def leaves_with_notice(folder: Path, reference: str, fault: str, draw: random.Random) -> Outcome:
    """A node is drained: the workers write a checkpoint, though none is due, and lose nothing when it is gone."""
    rare = ("train.save_every_steps=1000",)
    with nodes() as cluster:
        gone: list[float] = []

        def moment(run: Path, seconds: float) -> bool:
            if not gone and len(steps_of(run)) >= 3:
                cluster.drain(10)
                gone.append(seconds + 10)
            elif len(gone) == 1 and seconds > gone[0]:
                gone.append(seconds)
                cluster.kill()
            return False

        code = attempt(folder, "notice", moment, *ELASTIC, *LONGER, *rare, cluster.address)
    outcome = compared(folder, "longer", "notice", fault, 1, code, exact=False)
    outcome.survived &= "a machine will be preempted soon" in said(folder, "notice")
    return outcome


def comes_back(folder: Path, reference: str, fault: str, draw: random.Random) -> Outcome:
    """A node is killed and another one comes: training goes on with one worker, then with two again."""
    with nodes() as cluster:
        at: list[float] = []

        def moment(run: Path, seconds: float) -> bool:
            if not at and len(steps_of(run)) >= 30:  # there is a checkpoint
                cluster.kill()
                at.append(seconds)
            elif len(at) == 1 and "resuming after" in said(folder, "back"):
                cluster.add()
                at.append(seconds)
            return False

        code = attempt(folder, "back", moment, *ELASTIC, *LONGER, "train.save_every_steps=20", cluster.address)
    outcome = compared(folder, "longer", "back", fault, 2, code, exact=False)
    outcome.survived &= "with 2 workers" in said(folder, "back").partition("with 1 worker")[2]
    return outcome


def dies_in_preparation(folder: Path, reference: str, fault: str, draw: random.Random) -> Outcome:
    """A node is killed while the data is tokenized, into a cache of its own."""
    cache = folder / "cache-of-preparation"
    with nodes() as cluster:
        moment = once(lambda run, seconds: any(cache.glob("shards/*/*.parquet")), cluster.kill)
        code = attempt(folder, "preparation", moment, f"data.cache={cache}", cluster.address)
    return compared(folder, reference, "preparation", fault, 1, code)


def dies_in_generation(folder: Path, reference: str, fault: str, draw: random.Random) -> Outcome:
    """A node is killed when some predictions are there."""

    def due(run: Path, seconds: float) -> bool:
        partial = run / ".generated_predictions.jsonl.partial"
        return partial.exists() and partial.read_bytes().count(b"\n") > 10

    def predictions(name: str) -> list[dict[str, Any]]:
        file = folder / "runs" / name / "generated_predictions.jsonl"
        return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []

    settings = ("generate.enabled=true", "train.max_steps=2")
    attempt(folder, "generated", None, *settings, verb="run")
    with nodes() as cluster:
        code = attempt(folder, "generation", once(due, cluster.kill), *settings, cluster.address, verb="run")
    mine, theirs = predictions("generation"), predictions("generated")
    ids = [each["id"] for each in mine]
    lost = len({each["id"] for each in theirs} - set(ids))
    differing = sum(a != b for a, b in zip(mine, theirs, strict=False)) / max(1, len(theirs))
    return Outcome(fault, 1, code == 0, lost, len(ids) - len(set(ids)), 0.0, differing)


SWEEP = (
    *LONGER,
    "train.save_every_steps=20",
    "scaling.cpus_per_worker=0.4",
    "tune.space={train.learning_rate: [1.0e-4]}",
)
"""The trial trains as the longer training that was left alone. Each of two nodes with a CPU has room for it."""


def dies_under_a_trial(again: bool) -> Callable[[Path, str, str, random.Random], Outcome]:
    """A fault: the node of a trial's process is killed.

    Args:
        again: True if the trial fails, and goes on when the command is given again; False if the sweep tries it again by itself.
    """

    def fault(folder: Path, reference: str, fault: str, draw: random.Random) -> Outcome:
        name = "sweep-again" if again else "sweep"
        (only,) = combinations(load(folder / "faults.yaml", [f"run.name={name}", *SWEEP]))
        run, record, step = folder / "runs" / name / "trials" / only.name, folder / "runs" / name / "trials.jsonl", 30
        with nodes(head=0, each=1) as cluster:
            settings = (*SWEEP, f"tune.max_failures={0 if again else 1}", cluster.address)

            def kill() -> None:
                (trial,) = (one for one in psutil.process_iter() if one.name().startswith("ray::ResourceTrain"))
                cluster.kill_around(trial)

            code = attempt(
                folder, name, once(lambda _, seconds: len(steps_of(run)) >= step, kill), *settings, verb="tune"
            )
            failures = [line["reason"] for line in read_jsonl(record) if line["state"] == "failed"]
            if again:
                code = attempt(folder, name, None, *settings, verb="tune") if code == 1 else 1
        outcome = compared(folder, "longer", f"{name}/trials/{only.name}", fault, 1, code)
        *_, last = read_jsonl(record)
        outcome.survived &= last["state"] == "done" and len(failures) == int(again)
        return outcome

    return fault
