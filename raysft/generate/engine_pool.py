"""Size the pool of generation engines, and keep Ray Data quiet."""

from __future__ import annotations

import contextlib
import itertools
import logging
import math
import os
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import ray
import ray.data
from ray.util.annotations import RayDeprecationWarning
from ray.util.placement_group import PlacementGroup
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy, PlacementGroupSchedulingStrategy

from raysft.cluster.placement import Node, listed
from raysft.cluster.scheduling_pace import pace
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
    threads: int | None = None
    """Threads of an engine without a GPU; None: an equal part of its node's cores."""
    options: Mapping[str, Any] = field(default_factory=dict)
    """Further options for Ray Data, which say where the engines run."""


@dataclass(frozen=True)
class Room:
    """What engines may use while a training holds resources of the cluster: either ``group`` or ``places``."""

    group: PlacementGroup | None = None
    """Resources that are reserved for them, a bundle for each engine."""
    threads: int | None = None
    """Threads of each of them without a GPU."""
    places: Sequence[tuple[str, tuple[str, ...]]] = ()
    """Nodes, by Ray's id, and their GPUs, which others have reserved and leave to the engines."""

    def pool(self, config: Config, batches: int) -> Pool:
        """Return a pool of at most this many engines."""
        if self.group is not None:
            [bundle, *_] = bundles = self.group.bundle_specs
            strategy = PlacementGroupSchedulingStrategy(self.group)
            return Pool(
                engines=min(len(bundles), batches),
                cpus=bundle.get("CPU", 0.0),
                gpus=bundle.get("GPU", 0.0),
                engines_per_node=1,
                threads=self.threads,
                options={"scheduling_strategy": strategy},
            )
        devices = engine_devices(self.places, config.generate.gpus_per_engine if config.scaling.use_gpu else 0)
        turn = itertools.cycle(devices)
        engines = min(config.generate.num_actors or len(devices), len(devices), batches)
        nodes = [node for node, _ in devices]
        most = max(map(nodes.count, nodes), default=1)
        return Pool(engines, 0.0, 0.0, most, options={"ray_remote_args_fn": lambda: _at(*next(turn))})


def engine_devices(
    places: Sequence[tuple[str, tuple[str, ...]]], gpus_per_engine: int
) -> list[tuple[str, tuple[str, ...]]]:
    """Return the node and the GPUs of each engine that fits on the devices of workers; without GPUs one for each node.

    >>> engine_devices([("a", ("0",)), ("b", ("0",)), ("a", ("1",))], 2), engine_devices([("a", ()), ("a", ()), ("b", ())], 0)
    ([('a', ('0', '1'))], [('a', ()), ('b', ())])
    """
    gpus: dict[str, list[str]] = {}
    for node, of_worker in places:
        gpus.setdefault(node, []).extend(of_worker)
    if not gpus_per_engine:
        return [(node, ()) for node in gpus]
    return [
        (node, tuple(found[start : start + gpus_per_engine]))
        for node, found in gpus.items()
        for start in range(0, len(found) - gpus_per_engine + 1, gpus_per_engine)
    ]


def _at(node: str, gpus: tuple[str, ...]) -> dict[str, Any]:
    """Options of an actor that runs on a node without reserving anything there."""
    options: dict[str, Any] = {"scheduling_strategy": NodeAffinitySchedulingStrategy(node, soft=False)}
    if gpus:
        options["runtime_env"] = {"env_vars": {"CUDA_VISIBLE_DEVICES": ",".join(gpus)}}
    return options


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
    # A CPU reserved in addition to the GPU could only prevent an engine from being placed.
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
    pace(context)
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
