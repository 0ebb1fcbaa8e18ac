"""Memory of GPUs and of nodes: asked on living nodes, and from a table for nodes that do not exist yet."""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from raysft.cluster.placement import Node
from raysft.estimate.sizes import GIB

GPU_GIB = {
    "MI300X": 191.5, "B200": 178.3, "GB200": 184.0, "H200": 139.8, "GH200": 94.5, "H100-NVL": 93.1, "H100": 79.2,
    "H800": 79.2, "H20": 95.1, "A100-80G": 79.2, "A100-40G": 39.5, "A800": 79.2, "A100": 39.5, "RTX-6000-ADA": 47.4,
    "A6000": 47.4, "L40S": 44.4, "L40": 44.4, "A40": 44.4, "A10G": 22.1, "A10": 22.1, "L4": 22.0, "RTX-5090": 31.3,
    "RTX-4090": 23.5, "RTX-3090": 23.6, "V100-32G": 31.7, "V100": 15.8, "T4": 14.6,
}  # fmt: skip
"""Type of a GPU → GiB that its driver leaves to programs; where a type has several sizes, the name without one has the smallest."""
ASK_SECONDS = 60.0
"""How long all nodes together may take to answer; a node that is busy, or new, first starts a process for that."""
CGROUPS = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")


@dataclass(frozen=True)
class NodeMemory:
    """Memory of a node in bytes; None where it is not known."""

    total: float | None
    swap: float = 0.0
    gpu: float | None = None
    """Of its smallest GPU."""


def gpu_memory(kind: str) -> float | None:
    """Return the bytes of a type of GPU, as Ray, Kubernetes' labels and data sheets name it; None if it is unknown.

    >>> gpu_memory("nvidia-h100-80gb") / (1 << 30), gpu_memory("NVIDIA_L4") / (1 << 30), gpu_memory("none")
    (79.2, 22.0, None)
    >>> gpu_memory("nvidia-tesla-a100-80gb") / (1 << 30), gpu_memory("NVIDIA-A100-SXM4-40GB") / (1 << 30)
    (79.2, 39.5)
    """
    words = re.sub(r"(\d)GB", r"\1G", re.sub("[_ ]", "-", kind.upper())).split("-")
    for name, gib in GPU_GIB.items():
        model, *others = name.split("-")
        if model in words and all(other in words for other in others):
            return gib * GIB
    return None


def this_node(use_gpu: bool = False) -> NodeMemory:
    """Return the memory of this node, or of this container if it has a limit."""
    total = float(psutil.virtual_memory().total)
    limit = min((bytes_ for path in CGROUPS if (bytes_ := _limit(Path(path)))), default=None)
    swap = 0.0 if limit is not None and limit < total else float(psutil.swap_memory().total)
    return NodeMemory(min(total, limit or total), swap, _smallest_gpu() if use_gpu else None)


def _limit(path: Path) -> float | None:
    try:
        return float(path.read_text())
    except (OSError, ValueError):  # "max"
        return None


def _smallest_gpu() -> float | None:
    """Bytes of the smallest GPU of this node as its driver counts them; this opens no context on it."""
    command = shutil.which("nvidia-smi")
    if command is None:
        return None
    asked = [command, "--query-gpu=memory.total", "--format=csv,noheader,nounits"]
    try:
        answer = subprocess.run(asked, capture_output=True, text=True, timeout=20, check=True).stdout
        return min(float(line) for line in answer.split()) * (1 << 20)
    except (OSError, ValueError, subprocess.SubprocessError):
        return None


def smallest_node(nodes: Sequence[Node], use_gpu: bool) -> tuple[Node, NodeMemory] | None:
    """Return the node that can place workers and has the least memory for each; None if no node answers.

    On several nodes, one of each kind is asked, in a task that takes no resources.
    """
    if len(nodes) < 2:
        return (nodes[0] if nodes else Node(1.0), this_node(use_gpu))
    kinds: dict[tuple[float, float], Node] = {}
    for node in nodes:
        if node.takes_workers and (node.gpus or not use_gpu):
            kinds.setdefault((node.cpus, node.gpus), node)
    answers = ask(list(kinds.values()), this_node, use_gpu)
    found = [(node, answer) for node, answer in zip(kinds.values(), answers, strict=True) if answer is not None]
    return min(found, key=lambda each: _key(each, use_gpu), default=None)


def _key(found: tuple[Node, NodeMemory], use_gpu: bool) -> float:
    node, answer = found
    return (answer.gpu or float("inf")) if use_gpu else (answer.total or float("inf")) / max(1.0, node.cpus)


def ask(nodes: Sequence[Node], function: Any, *arguments: Any) -> list[Any]:
    """Call a function on each node, in tasks that take no resources; None for nodes that do not answer in time or fail."""
    import ray
    from ray.exceptions import RayError
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    remote = ray.remote(num_cpus=0, max_retries=0)(function)
    tasks = [
        remote.options(scheduling_strategy=NodeAffinitySchedulingStrategy(node.id, soft=False)).remote(*arguments)
        for node in nodes
    ]
    done, late = ray.wait(tasks, num_returns=len(tasks), timeout=ASK_SECONDS)
    for task in late:
        ray.cancel(task, force=True)
    answers = []
    for task in tasks:
        try:
            answers.append(ray.get(task) if task in done else None)
        except RayError:
            answers.append(None)
    return answers
