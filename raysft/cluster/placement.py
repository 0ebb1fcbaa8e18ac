"""How many workers, engines and trials fit on a cluster's nodes. Imports nothing of raysft."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

TASK_CPUS = 0.5
"""CPUs that the tasks which read and tokenize data reserve; on a small machine they must fit alongside the training workers."""
LISTED_NODES = 8
"""Most nodes that a message lists."""
Use = Literal["anything", "data", "training"]
ANYTHING: Use = "anything"
"""Data tasks and training workers."""


@dataclass(frozen=True)
class Node:
    """The resources of a node, as Ray hands them out."""

    cpus: float = 0.0
    gpus: float = 0.0
    name: str = ""
    """Its address, for messages."""
    id: str = ""
    """Ray's id of it."""
    use: Use = ANYTHING
    """What a run starts there."""

    @property
    def takes_data(self) -> bool:
        """True if data tasks run there."""
        return self.use != "training"

    @property
    def takes_workers(self) -> bool:
        """True if training workers run there."""
        return self.use != "data"

    @classmethod
    def of(cls, resources: Mapping[str, float], name: str = "", id: str = "", use: Use = ANYTHING) -> Node:
        """Return the node with Ray's resources, ``{"CPU": 2.0, "GPU": 1.0, …}``."""
        return cls(resources.get("CPU", 0.0), resources.get("GPU", 0.0), name, id, use)

    def capacity(self, cpus: float = 0.0, gpus: float = 0.0, reserved_cpus: float = 0.0) -> int:
        """Return the number of processes that fit on the node; all resources of a process come from one node.

        Args:
            cpus: CPUs of one process.
            gpus: GPUs of one process.
            reserved_cpus: CPUs of this node that something else holds.

        >>> Node(cpus=8.0, gpus=2.0).capacity(cpus=1.0, gpus=1.0), Node(cpus=2.0).capacity(cpus=1.0, reserved_cpus=0.5)
        (2, 1)
        """
        # Ray counts in units of 1e-4; the small number keeps 0.3 / 0.1 from being 2.
        counts = [int((self.cpus - reserved_cpus) / cpus + 1e-9)] if cpus else []
        counts += [int(self.gpus / gpus + 1e-9)] if gpus else []
        return max(0, min(counts))


@dataclass(frozen=True)
class Workers:
    """Training workers, as they are placed on a cluster's nodes."""

    number: int
    cpus: float
    """CPUs that each reserves."""
    gpu: bool
    """True if each reserves a GPU."""
    spread: bool
    """True if they are spread over the nodes, False if they are packed."""


def total(nodes: Sequence[Node]) -> Node:
    """Return the sum of all nodes' resources."""
    return Node(sum(node.cpus for node in nodes), sum(node.gpus for node in nodes))


def max_workers(nodes: Sequence[Node], cpus_per_worker: float, use_gpu: bool, reserved_cpus: float = 0.0) -> int:
    """Return the number of training workers that fit on a cluster alongside one data task, which also needs one node.

    Args:
        nodes: the cluster's nodes.
        cpus_per_worker: CPUs that a worker reserves.
        use_gpu: True if each worker reserves a GPU.
        reserved_cpus: CPUs of the cluster that something else holds.

    >>> max_workers([Node(2.0), Node(1.0)], cpus_per_worker=1.0, use_gpu=False)
    2
    >>> max_workers([Node(2.0, use="training"), Node(1.0, use="data")], cpus_per_worker=1.0, use_gpu=False)
    2
    """
    capacities = _capacities(nodes, cpus_per_worker, use_gpu)
    beside_task = [
        sum(capacities) - capacity + min(capacity, node.capacity(cpus_per_worker, float(use_gpu), TASK_CPUS))
        for node, capacity in zip(nodes, capacities, strict=True)
        if node.takes_data and node.cpus >= TASK_CPUS
    ]
    return min(max(beside_task, default=0), total(nodes).capacity(cpus_per_worker, 0.0, TASK_CPUS + reserved_cpus))


def _capacities(nodes: Sequence[Node], cpus_per_worker: float, use_gpu: bool) -> list[int]:
    return [node.capacity(cpus_per_worker, float(use_gpu)) if node.takes_workers else 0 for node in nodes]


def workers_on_a_node(nodes: Sequence[Node], workers: Workers) -> int:
    """Return the most workers that stand on one node; at least 1.

    >>> nodes = [Node(4.0), Node(4.0), Node(1.0)]
    >>> [workers_on_a_node(nodes, Workers(5, cpus=1.0, gpu=False, spread=spread)) for spread in (False, True)]
    [4, 2]
    """
    room = _capacities(nodes, workers.cpus, workers.gpu)
    counts = range(1, max(room, default=0) + 1)
    if workers.spread and (
        even := next((count for count in counts if sum(min(count, each) for each in room) >= workers.number), None)
    ):
        return even
    return max(1, min(workers.number, max(room, default=0)))


def room_beside(nodes: Sequence[Node], workers: Workers) -> list[Node]:
    """Return what is left of each node besides the training workers and their data task, if no one else uses the cluster.

    >>> [node.cpus for node in room_beside([Node(4.0), Node(2.0)], Workers(2, cpus=1.0, gpu=False, spread=False))]
    [1.5, 2.0]
    """
    capacities = _capacities(nodes, workers.cpus, workers.gpu)
    order = sorted(range(len(nodes)), key=lambda index: -capacities[index])
    placed = [0] * len(nodes)
    while sum(placed) < min(workers.number, sum(capacities)):
        for index in order:
            left = min(workers.number - sum(placed), capacities[index] - placed[index])
            placed[index] += min(1, left) if workers.spread else left
    free = [
        replace(node, cpus=node.cpus - count * workers.cpus, gpus=node.gpus - count * workers.gpu)
        for node, count in zip(nodes, placed, strict=True)
    ]
    # The data task goes where it costs no engine, if it can.
    takes = [index for index, node in enumerate(free) if node.takes_data and node.cpus >= TASK_CPUS]
    if takes:
        chosen = max(takes, key=lambda index: (free[index].cpus % 1.0 >= TASK_CPUS, free[index].cpus))
        free[chosen] = replace(free[chosen], cpus=free[chosen].cpus - TASK_CPUS)
    return free


def use_of(labels: Mapping[str, str], data_label: str | None) -> Use:
    """Return what a node is used for.

    Args:
        labels: of the node.
        data_label: KEY=VALUE of the nodes for data; None if there are none.

    >>> use_of({"role": "data"}, "role=data"), use_of({}, "role=data"), use_of({}, None)
    ('data', 'training', 'anything')
    """
    if data_label is None:
        return ANYTHING
    key, _, value = data_label.partition("=")
    return "data" if labels.get(key) == value else "training"


def selector_of(data_label: str | None, workers: bool = False) -> dict[str, str]:
    """Return Ray's label selector of the nodes for data; with ``workers`` that of all others.

    >>> selector_of("role=data"), selector_of("role=data", workers=True), selector_of(None)
    ({'role': 'data'}, {'role': '!data'}, {})
    """
    if data_label is None:
        return {}
    key, _, value = data_label.partition("=")
    return {key: f"!{value}" if workers else value}


def listed(nodes: Sequence[Node], use_gpu: bool) -> str:
    """Return the resources of the first nodes as text, for messages.

    >>> listed([Node(2.0), Node(4.0, name="10.0.0.8")], use_gpu=False)
    'node 0: 2 CPUs; 10.0.0.8: 4 CPUs'
    """
    lines = [
        f"{node.name or f'node {index}'}: {counted(node.cpus, 'CPU')}"
        + (f", {counted(node.gpus, 'GPU')}" if use_gpu else "")
        for index, node in enumerate(nodes[:LISTED_NODES])
    ]
    if len(nodes) > LISTED_NODES:
        lines.append(f"and {len(nodes) - LISTED_NODES} more")
    return "; ".join(lines) or "no nodes"


def counted(number: float, noun: str) -> str:
    """Return a number with its noun, for messages.

    >>> counted(1, "worker"), counted(0.5, "CPU")
    ('1 worker', '0.5 CPUs')
    """
    return f"{number:g} {noun}{'' if number == 1 else 's'}"
