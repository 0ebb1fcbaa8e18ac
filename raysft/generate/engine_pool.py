"""What generation asks of a Ray cluster: engines that it can place, threads that share a node, and quiet."""

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
    """Engines to start, and what each of them reserves."""

    engines: int
    cpus: float
    gpus: float
    engines_per_node: int
    """Most engines that one node gets when they are spread."""


def size_pool(config: Config, cluster: Sequence[Node], batches: int, shrinks: bool = False) -> Pool:
    """How many engines to start: ``generate.num_actors``, or as many as the GPUs hold, or one per node without GPU.

    The prompts come as blocks that are in the object store already, so the engines are all that the pipeline places: an
    engine of one CPU fits a cluster of one CPU, and no read task can starve behind it.

    Args:
        cluster: living nodes.
        batches: batches that there are; more engines than that are not started.
        shrinks: nodes died meanwhile: as many of ``generate.num_actors`` as those that live have room for will do.

    Raises:
        RequestError: the cluster can never place that many.

    >>> config = Config.model_validate({"model": {"path": "m"}, "data": {"train": [{"name": "a", "path": "a"}]}})
    >>> size_pool(config, [Node(0), Node(8), Node(8)], batches=100).engines
    2
    """
    use_gpu, share = config.scaling.use_gpu, config.generate.gpus_per_engine if config.scaling.use_gpu else 1
    unit = "GPU" if use_gpu else "CPU"
    if not sum(node.capacity(gpus=1.0) if use_gpu else node.capacity(cpus=1.0) for node in cluster):
        remedy = "set scaling.use_gpu=false, or add a GPU node" if use_gpu else "add a node with a CPU"
        raise RequestError(f"generation wants 1 {unit} and the cluster has none ({listed(cluster, use_gpu)}); {remedy}")
    # Beside a GPU, a reserved CPU could only keep an engine from its place.
    cpus, gpus = (0.0, float(share)) if use_gpu else (1.0, 0.0)
    room = [node.capacity(cpus, gpus) for node in cluster]
    places = sum(room)
    if not places:
        raise RequestError(
            f"generate.gpus_per_engine={share} wants {share} GPUs on one node and none has as many ({listed(cluster, use_gpu)}); "
            "lower it, or add such a node"
        )
    wanted = config.generate.num_actors or (places if use_gpu else sum(1 for free in room if free))
    if wanted > places and not shrinks:
        what = (
            f"{wanted} times {share} GPUs and the cluster has room for"
            if share > 1
            else f"{wanted} {unit}s and the cluster has"
        )
        raise RequestError(
            f"generate.num_actors={wanted} wants {what} {places} ({listed(cluster, use_gpu)}); use {places}, or add nodes"
        )
    engines = max(1, min(wanted, places, batches))
    return Pool(
        engines=engines,
        cpus=cpus,
        gpus=gpus,
        engines_per_node=math.ceil(engines / sum(1 for free in room if free)),
    )


def threads(config: Config, engines_per_node: int) -> int:
    """Threads that an engine of this process's node computes with: asked for, or its share of the node's cores."""
    if config.scaling.threads_per_worker:
        return config.scaling.threads_per_worker
    here = ray.get_runtime_context().get_node_id()
    cores = float(len(os.sched_getaffinity(0)))
    # In a container the process sees the host's cores; what Ray was told is what there is to use.
    cpus = next((node["Resources"].get("CPU", cores) for node in ray.nodes() if node["NodeID"] == here), cores)
    return max(1, int(min(cores, cpus)) // engines_per_node)


def free_now(use_gpu: bool) -> str:
    """What of the cluster nobody has reserved at this moment, for a person who waits."""
    unit = "GPU" if use_gpu else "CPU"
    total, free = ray.cluster_resources().get(unit, 0.0), ray.available_resources().get(unit, 0.0)
    return f"{free:g} of {total:g} {unit}s free"


@contextlib.contextmanager
def quiet_ray_data() -> Iterator[Any]:
    """Ray Data without its progress bars and its log of plans, inside this block only; gives the context to adjust."""
    context = ray.data.DataContext.get_current().copy()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    logger = logging.getLogger("ray.data")
    level = logger.level
    logger.setLevel(logging.CRITICAL)  # what fails is raised, and said once by whoever catches it
    try:
        with ray.data.DataContext.current(context), warnings.catch_warnings():
            # max_restarts has no other place in Ray 2.60 than the arguments that it says will go in 2.64.
            warnings.simplefilter("ignore", RayDeprecationWarning)
            yield context
    finally:
        logger.setLevel(level)
