"""How many pods a job has, and what Ray gets of each: from the config alone. Pure."""

from __future__ import annotations

import math
from dataclasses import dataclass

from raysft.cluster.placement import TASK_CPUS, Node, max_workers
from raysft.config import Config
from raysft.config.verb import verb_of
from raysft.errors import RequestError

HEAD_MEMORY = 6 << 30
HEAD_MEMORY_PER_POD = 256 << 20
"""For Ray's control store, dashboard and the run's own process; heads with less were killed (KubeRay's samples: 4 to 5 GiB)."""


@dataclass(frozen=True)
class WorkerPods:
    """Number of pods for workers."""

    fewest: int
    most: int


def worker_pods(config: Config) -> WorkerPods:
    """Return the number of worker pods that the config needs.

    Raises:
        RequestError: the pods of ``cluster.workers`` cannot hold exactly what the config asks for.
    """
    of_verb = {"run": _of_training, "tune": _of_sweep, "evaluate": _of_training, "generate": _of_generation}
    pods = of_verb[verb_of(config)](config)
    if config.cluster.queue:  # Kueue admits a number of pods, and no autoscaler changes it
        return WorkerPods(pods.most, pods.most)
    return pods


def ray_cpus(config: Config) -> int:
    """CPUs that Ray gets of a worker's pod."""
    workers, scaling = config.cluster.workers, config.scaling
    if workers.gpus and config.cluster.data_workers.replicas:
        return min(workers.cpus, max(1, math.ceil(workers.gpus * scaling.cpus_per_worker)))
    return workers.cpus


def nodes_of(config: Config, workers: int) -> list[Node]:
    """Return the nodes that Ray would see with a number of worker pods; the head offers nothing."""
    pod = Node(float(ray_cpus(config)), float(config.cluster.workers.gpus), "a worker's pod")
    return [*[pod] * workers, *_data_nodes(config)]


def head_memory(pods: int) -> str:
    """Memory of the head for a number of other pods, as Kubernetes writes it.

    >>> head_memory(2), head_memory(1000)
    ('6656Mi', '262144Mi')
    """
    return f"{min(256 << 30, HEAD_MEMORY + pods * HEAD_MEMORY_PER_POD) >> 20}Mi"


def _data_nodes(config: Config) -> list[Node]:
    data = config.cluster.data_workers
    return [Node(float(data.cpus), name="a data pod")] * data.replicas


def _of_training(config: Config) -> WorkerPods:
    scaling, workers = config.scaling, config.cluster.workers
    count = _gpu_pods if workers.gpus else _cpu_pods
    fewest, most = count(config, scaling.fewest_workers), count(config, scaling.most_workers)
    if workers.replicas and workers.replicas != most:
        held = f" of {workers.gpus} GPUs" if workers.gpus else ""
        raise RequestError(
            f"cluster.workers.replicas={workers.replicas} pods{held} do not add up to scaling.num_workers={_given(config)}; "
            f"remove replicas (the run needs {most}), or change scaling.num_workers"
        )
    return WorkerPods(fewest, most)


def _gpu_pods(config: Config, workers: int) -> int:
    """Number of pods whose GPUs are exactly as many as the workers."""
    gpus = config.cluster.workers.gpus
    if workers % gpus:
        fitting = sorted({number for number in (workers // gpus * gpus, (workers // gpus + 1) * gpus) if number})
        divisor = max(number for number in range(1, gpus + 1) if workers % number == 0)
        raise RequestError(
            f"scaling.num_workers={_given(config)} leaves GPUs of a pod idle, as cluster.workers.gpus={gpus}; "
            f"use {' or '.join(map(str, fitting))} workers, or cluster.workers.gpus={divisor}"
        )
    return workers // gpus


def _cpu_pods(config: Config, workers: int) -> int:
    """Smallest number of pods that hold this many workers alongside the data tasks."""
    per_worker, cpus = config.scaling.cpus_per_worker, config.cluster.workers.cpus
    per_pod = Node(float(cpus)).capacity(per_worker)
    if not per_pod:
        raise RequestError(
            f"scaling.cpus_per_worker={per_worker:g} needs {per_worker:g} CPUs in one pod, but cluster.workers.cpus={cpus}; "
            f"use cluster.workers.cpus={math.ceil(per_worker + TASK_CPUS)}, or lower scaling.cpus_per_worker"
        )
    pods = math.ceil(workers / per_pod)
    return pods if max_workers(nodes_of(config, pods), per_worker, use_gpu=False) >= workers else pods + 1


def _of_sweep(config: Config) -> WorkerPods:
    workers, scaling, trials = config.cluster.workers, config.scaling, config.tune.max_concurrent
    if workers.replicas:
        return WorkerPods(workers.replicas, workers.replicas)
    if not trials:
        raise RequestError(
            "a sweep runs as many trials at a time as fit, but neither cluster.workers.replicas nor tune.max_concurrent is "
            "set; set one of them"
        )
    cpus = trials * (scaling.most_workers * scaling.cpus_per_worker + TASK_CPUS)
    pods = math.ceil(cpus / workers.cpus)
    if workers.gpus:
        pods = max(pods, math.ceil(trials * scaling.most_workers / workers.gpus))
    return WorkerPods(pods, pods)


def _of_generation(config: Config) -> WorkerPods:
    workers, generate = config.cluster.workers, config.generate
    if workers.gpus % generate.gpus_per_engine:
        raise RequestError(
            f"generate.gpus_per_engine={generate.gpus_per_engine} leaves GPUs of a pod idle, as cluster.workers.gpus="
            f"{workers.gpus}; use a multiple of {generate.gpus_per_engine} GPUs"
        )
    per_pod = workers.gpus // generate.gpus_per_engine if workers.gpus else workers.cpus
    needed = math.ceil((generate.num_actors or 1) / per_pod)
    if workers.replicas and workers.replicas < needed:
        raise RequestError(
            f"generate.num_actors={generate.num_actors} needs {needed} pods, but cluster.workers.replicas={workers.replicas}; "
            f"use {needed}, or lower generate.num_actors"
        )
    pods = workers.replicas or needed
    return WorkerPods(pods, pods)


def _given(config: Config) -> str:
    number = config.scaling.num_workers
    return str(number if isinstance(number, int) else list(number))
