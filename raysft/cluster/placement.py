"""What finds room on a cluster's nodes beside the data tasks. Imports nothing of raysft."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

TASK_CPUS = 0.5
"""What reading and tokenizing ask of Ray together: data tasks must find room beside training workers on a small machine."""


def workers_per_node(node: Mapping[str, float], each: float, use_gpu: bool, taken: float = 0.0) -> int:
    """Workers that fit on a node of which something else takes some CPUs; a worker's CPUs and GPU are of one node.

    >>> places({"CPU": 8.0, "GPU": 2.0}, each=1.0, use_gpu=True), places({"CPU": 2.0}, each=1.0, use_gpu=False, taken=0.5)
    (2, 1)
    """
    count = max(0, int((node.get("CPU", 0.0) - taken) / each + 1e-9))
    return min(count, int(node.get("GPU", 0.0))) if use_gpu else count


def max_workers(nodes: Sequence[Mapping[str, float]], each: float, use_gpu: bool, reserved_cpus: float = 0.0) -> int:
    """Workers that fit on a cluster beside one data task, which needs its CPUs on one node too.

    Args:
        nodes: resources of each node, as ``{"CPU": 2.0, "GPU": 1.0}``.
        each: CPUs of a worker.
        use_gpu: whether each worker takes a GPU.
        reserved_cpus: CPUs that something else keeps.

    >>> room([{"CPU": 2.0}, {"CPU": 1.0}], each=1.0, use_gpu=False)
    2
    """
    fitting = [workers_per_node(node, each, use_gpu) for node in nodes]
    beside = [
        sum(fitting) - here + workers_per_node(node, each, use_gpu, TASK_CPUS)
        for node, here in zip(nodes, fitting, strict=True)
        if node.get("CPU", 0.0) >= TASK_CPUS
    ]
    cpus = sum(node.get("CPU", 0.0) for node in nodes) - TASK_CPUS - reserved_cpus
    return max(0, min(max(beside, default=0), int(cpus / each + 1e-9)))
