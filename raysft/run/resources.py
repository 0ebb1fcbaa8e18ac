"""Refuse a run that no node of the cluster could ever place."""

from __future__ import annotations

from collections.abc import Sequence

from raysft.cluster.placement import TASK_CPUS, Node, listed, max_workers
from raysft.config import Config
from raysft.errors import RequestError


def check_resources(config: Config, nodes: Sequence[Node], reserved_cpus: float = 0.0) -> None:
    """Refuse what the cluster can never place: Ray would wait for it for ever and say nothing.

    Args:
        config: the run's config.
        nodes: the cluster's nodes.
        reserved_cpus: CPUs that something else keeps while the run goes on (a Tune trial).

    Raises:
        RequestError: with what is wanted, what is there, and what to do.
    """
    scaling = config.scaling
    count, each, use_gpu = scaling.fewest_workers, scaling.cpus_per_worker, scaling.use_gpu
    asked = f"scaling.num_workers={[count, scaling.most_workers] if scaling.is_elastic else count}"
    most = sum(node.capacity(each, float(use_gpu)) for node in nodes)
    if count > most:
        gpus = f"{count} GPUs with " if use_gpu else ""
        least = "at least " if scaling.is_elastic else ""
        raise RequestError(
            f"{asked} wants {least}{gpus}{count * each:g} CPUs in shares of {each:g} and the cluster has room "
            f"for {most} ({listed(nodes, use_gpu)}); {_remedy(nodes, most, each, use_gpu)}"
        )
    beside_data = max_workers(nodes, each, use_gpu, reserved_cpus)
    if count > beside_data:
        cpus = sum(node.cpus for node in nodes)
        wanted = count * each + TASK_CPUS + reserved_cpus
        less = (tenths / 10 for tenths in range(int(10 * each - 1e-9), 0, -1))
        fitting = next((share for share in less if max_workers(nodes, share, use_gpu, reserved_cpus) >= count), None)
        fewer = f"use scaling.num_workers={beside_data}, or add nodes" if beside_data else "add nodes"
        raise RequestError(
            f"{asked} × scaling.cpus_per_worker={each:g} leaves no CPU for data tasks: {wanted:g} CPUs "
            f"wanted with {TASK_CPUS:g} for data on one node, {cpus:g} in the cluster ({listed(nodes, use_gpu)}); "
            + (f"use scaling.cpus_per_worker={fitting:g}" if fitting else fewer)
        )


def _remedy(nodes: Sequence[Node], most: int, each: float, use_gpu: bool) -> str:
    if most:
        return f"use {most}, or add nodes"
    if use_gpu and not any(node.gpus >= 1 for node in nodes):
        return "add nodes with GPUs, or set scaling.use_gpu=false"
    return f"lower scaling.cpus_per_worker={each:g}, or add nodes"
