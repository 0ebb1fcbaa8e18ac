"""Where predictions during training are made: alongside the workers, or on the devices of workers that wait."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from raysft.cluster.placement import Node, Workers, counted, room_beside
from raysft.config import Config
from raysft.errors import RequestError


@dataclass(frozen=True)
class GenerationPlan:
    """How a training run generates (``generate.every_steps``)."""

    every_steps: int
    times: int
    """How many times until the end of the training."""
    engines: int
    """Engines that fit alongside the workers; 0 if the workers wait instead."""
    threads: int | None
    """Threads of each engine without a GPU."""
    reason: str

    @property
    def pauses(self) -> bool:
        """True if the workers wait while it generates."""
        return not self.engines

    def line(self) -> str:
        """The plan as a line for the terminal."""
        every = "step" if self.every_steps == 1 else f"{self.every_steps:,} steps"
        after = f"generation: after every {every}, "
        if not self.times:
            return f"{after}so never, because training has fewer steps; lower generate.every_steps={self.every_steps}"
        return f"{after}{counted(self.times, 'time')}, " + (
            f"by {counted(self.engines, 'engine')} alongside training ({self.reason})"
            if self.engines
            else f"between two steps: {self.reason}"
        )


def plan_generation(config: Config, nodes: Sequence[Node], steps: int) -> GenerationPlan | None:
    """Decide where the engines run; None if the training run does not generate.

    Args:
        config: of the run.
        nodes: the cluster's nodes.
        steps: of the training.

    Raises:
        RequestError: there is no room for engines that cannot share devices with workers.
    """
    every, scaling, generate = config.generate.every_steps, config.scaling, config.generate
    if every is None or not config.generates:
        return None
    spread = scaling.placement == "spread"
    room = room_beside(nodes, Workers(scaling.most_workers, scaling.cpus_per_worker, scaling.use_gpu, spread))
    needs = (0.0, float(generate.gpus_per_engine)) if scaling.use_gpu else (1.0, 0.0)
    fitting = [node.capacity(*needs) for node in room]
    default = sum(fitting) if scaling.use_gpu else sum(1 for count in fitting if count)
    engines = min(generate.num_actors or default, sum(fitting))
    workers = f"{counted(scaling.most_workers, 'worker')} of {counted(scaling.cpus_per_worker, 'CPU')}"
    if scaling.use_gpu:
        workers += " and 1 GPU"
    times, unit = steps // every, "GPU" if scaling.use_gpu else "CPU"
    if config.run.sweep:
        engines, reason = 0, "the trials of a sweep share the cluster, so training pauses while it generates"
    elif engines:
        threads = [int(node.cpus) // count for node, count in zip(room, fitting, strict=True) if count]
        own = None if scaling.use_gpu else scaling.threads_per_worker or max(1, min(threads))
        left = sum(node.gpus if scaling.use_gpu else node.cpus for node in room)
        free = f"{counted(left, unit)} {'is' if left == 1 else 'are'} free next to {workers}"
        return GenerationPlan(every, times, engines, own, free)
    else:
        reason = f"no room for an engine next to {workers}, so training pauses while it generates"
    _check_shared(config, workers)
    return GenerationPlan(every, times, 0, None, reason)


def _check_shared(config: Config, workers: str) -> None:
    """Refuse engines that cannot use the workers' devices."""
    every, gpus = config.generate.every_steps, config.generate.gpus_per_engine
    if config.generate.engine == "vllm":
        raise RequestError(
            f"generate.every_steps={every} with generate.engine=vllm needs devices that no worker uses, but there are none "
            f"next to {workers}; add nodes, lower scaling.num_workers, set generate.engine=transformers, or remove every_steps"
        )
    if config.scaling.use_gpu and gpus > config.scaling.fewest_workers:
        raise RequestError(
            f"generate.every_steps={every} with generate.gpus_per_engine={gpus} needs {gpus} GPUs in one node, but there are "
            f"none next to {workers}, and {counted(config.scaling.fewest_workers, 'worker')} can lend too few; lower "
            "generate.gpus_per_engine, or remove every_steps"
        )
