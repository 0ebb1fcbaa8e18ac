"""Size the pool of generation engines, and keep Ray Data quiet."""

from __future__ import annotations

import contextlib
import logging
import math
import os
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import ray
import ray.data
from ray.util.annotations import RayDeprecationWarning

from raysft.cluster.placement import Node, listed
from raysft.config import Config
from raysft.errors import RequestError


@dataclass(frozen=True)
class Pool:
    """Number of engines, and the resources that each one reserves."""

    engines: int
    cpus: float
    gpus: float
    engines_per_node: int
    """Most engines that a node gets when they are spread evenly."""


def size_pool(config: Config, cluster: Sequence[Node], batches: int, shrinks: bool = False) -> Pool:
    """Decide how many engines to start: ``generate.num_actors``, else as many as the GPUs hold, else one per CPU node.

    The prompts are blocks in the object store, so the pipeline places nothing but engines: an engine with one CPU fits a
    cluster with one CPU, and no read task can starve behind it.

    Args:
        cluster: nodes that are alive.
        batches: number of batches; no more engines than this are started.
        shrinks: nodes have died, so fewer engines than ``generate.num_actors`` are accepted.

    Raises:
        RequestError: the cluster cannot place that many.

    >>> config = Config.model_validate({"model": {"path": "m"}, "data": {"train": [{"name": "a", "path": "a"}]}})
    >>> size_pool(config, [Node(0), Node(8), Node(8)], batches=100).engines
    2
    """
    use_gpu = config.scaling.use_gpu
    gpus_per_engine = config.generate.gpus_per_engine if use_gpu else 1
    unit = "GPU" if use_gpu else "CPU"
    if not sum(node.capacity(gpus=1.0) if use_gpu else node.capacity(cpus=1.0) for node in cluster):
        remedy = "set scaling.use_gpu=false, or add a GPU node" if use_gpu else "add a node with a CPU"
        raise RequestError(
            f"generation needs 1 {unit}, but the cluster has none ({listed(cluster, use_gpu)}); {remedy}"
        )
    # A CPU reserved beside the GPU could only prevent an engine from being placed.
    cpus, gpus = (0.0, float(gpus_per_engine)) if use_gpu else (1.0, 0.0)
    per_node = [node.capacity(cpus, gpus) for node in cluster]
    most = sum(per_node)
    if not most:
        raise RequestError(
            f"generate.gpus_per_engine={gpus_per_engine} needs {gpus_per_engine} GPUs on one node, but no node has that many "
            f"({listed(cluster, use_gpu)}); lower it, or add such a node"
        )
    nodes_used = sum(1 for capacity in per_node if capacity)
    requested = config.generate.num_actors or (most if use_gpu else nodes_used)
    if requested > most and not shrinks:
        needs = (
            f"{requested} times {gpus_per_engine} GPUs, but the cluster can place"
            if gpus_per_engine > 1
            else f"{requested} {unit}s, but the cluster has"
        )
        raise RequestError(
            f"generate.num_actors={requested} needs {needs} {most} ({listed(cluster, use_gpu)}); use {most}, or add nodes"
        )
    engines = max(1, min(requested, most, batches))
    return Pool(
        engines=engines,
        cpus=cpus,
        gpus=gpus,
        engines_per_node=math.ceil(engines / nodes_used),
    )


def threads(config: Config, engines_per_node: int) -> int:
    """Number of threads that an engine on this node computes with: as configured, else an equal part of the node's cores."""
    if config.scaling.threads_per_worker:
        return config.scaling.threads_per_worker
    here = ray.get_runtime_context().get_node_id()
    cores = float(len(os.sched_getaffinity(0)))
    # In a container the process sees the cores of the host; Ray knows how many it may use.
    cpus = next((node["Resources"].get("CPU", cores) for node in ray.nodes() if node["NodeID"] == here), cores)
    return max(1, int(min(cores, cpus)) // engines_per_node)


def free_now(use_gpu: bool) -> str:
    """Describe the resources that are free at the moment, for somebody who waits."""
    unit = "GPU" if use_gpu else "CPU"
    total, free = ray.cluster_resources().get(unit, 0.0), ray.available_resources().get(unit, 0.0)
    return f"{free:g} of {total:g} {unit}s free"


@contextlib.contextmanager
def quiet_ray_data() -> Iterator[Any]:
    """Silence Ray Data's progress bars and plan log inside the block; yields the context to adjust."""
    context = ray.data.DataContext.get_current().copy()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    logger = logging.getLogger("ray.data")
    level = logger.level
    logger.setLevel(logging.CRITICAL)  # failures are raised, and reported once by the caller
    try:
        with ray.data.DataContext.current(context), warnings.catch_warnings():
            # Ray 2.60 takes max_restarts only through arguments that it deprecates for 2.64.
            warnings.simplefilter("ignore", RayDeprecationWarning)
            yield context
    finally:
        logger.setLevel(level)
