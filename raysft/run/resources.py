"""Refuse a run that the cluster could never place."""

from __future__ import annotations

from collections.abc import Sequence

from raysft.cluster.placement import TASK_CPUS, Node, Workers, counted, listed, max_workers, workers_on_a_node
from raysft.config import Config
from raysft.errors import RequestError, as_yaml


def check_resources(config: Config, nodes: Sequence[Node], reserved_cpus: float = 0.0) -> None:
    """Refuse workers that the cluster can never place: Ray would wait forever and say nothing.

    Args:
        config: the run's config.
        nodes: the cluster's nodes.
        reserved_cpus: CPUs that another process keeps during the run (a Tune trial).

    Raises:
        RequestError: the message says what is needed, what the cluster has, and the remedy.
    """
    scaling = config.scaling
    count, cpus_per_worker, use_gpu = scaling.fewest_workers, scaling.cpus_per_worker, scaling.use_gpu
    workers = f"scaling.num_workers={[count, scaling.most_workers] if scaling.is_elastic else count}"
    _check_data_nodes(config, nodes)
    _check_experts(config, nodes)
    capacity = sum(node.capacity(cpus_per_worker, float(use_gpu)) for node in nodes if node.takes_workers)
    beside_data = scaling.whole_groups(max_workers(nodes, cpus_per_worker, use_gpu, reserved_cpus))
    if count > capacity:
        at_least = "at least " if scaling.is_elastic else ""
        gpus = f"{at_least}{counted(count, 'GPU')} and " if use_gpu else ""
        raise RequestError(
            f"{workers} needs {gpus}{counted(cpus_per_worker, 'CPU')} per worker, but the cluster can place only "
            f"{counted(capacity, 'worker')} ({listed(nodes, use_gpu)}); {_remedy(nodes, beside_data, cpus_per_worker, use_gpu)}"
        )
    if count > beside_data:
        cpus = sum(node.cpus for node in nodes)
        needed = count * cpus_per_worker + TASK_CPUS + reserved_cpus
        lower = (tenths / 10 for tenths in range(int(10 * cpus_per_worker - 1e-9), 0, -1))
        fitting = next((value for value in lower if max_workers(nodes, value, use_gpu, reserved_cpus) >= count), None)
        fewer = f"use scaling.num_workers={beside_data}, or add nodes" if beside_data else "add nodes"
        raise RequestError(
            f"{workers} and scaling.cpus_per_worker={cpus_per_worker:g} leave no CPU for data tasks: {needed:g} CPUs are needed, "
            f"{TASK_CPUS:g} of them for data on one node, but the cluster has {cpus:g} ({listed(nodes, use_gpu)}); "
            + (f"use scaling.cpus_per_worker={fitting:g}" if fitting else fewer)
        )


def _check_data_nodes(config: Config, nodes: Sequence[Node]) -> None:
    label = config.scaling.data_label
    if any(node.takes_data and node.cpus >= TASK_CPUS for node in nodes) or label is None:
        return
    labelled = [node for node in nodes if node.takes_data]
    if labelled:
        fact = f"none of the nodes with this label has {TASK_CPUS:g} CPUs for data tasks ({listed(labelled, False)})"
    else:
        fact = f"no node of the cluster has this label ({listed(nodes, False)})"
    raise RequestError(
        f"scaling.data_label={label}: {fact}; start a node with ray start --labels {label}, or remove scaling.data_label"
    )


def _check_experts(config: Config, nodes: Sequence[Node]) -> None:
    """Refuse several workers on a node if each of them would keep all experts in its memory and compute them on all its CPUs."""
    scaling = config.scaling
    if config.model.experts != "kt" or scaling.most_workers == 1:
        return
    workers = Workers(scaling.most_workers, scaling.cpus_per_worker, scaling.use_gpu, scaling.placement == "spread")
    if (together := workers_on_a_node(nodes, workers)) > 1:
        able = sum(
            node.capacity(scaling.cpus_per_worker, float(scaling.use_gpu)) > 0 for node in nodes if node.takes_workers
        )
        spread = "scaling.placement=spread with " if able > 1 else ""
        raise RequestError(
            f"model.experts=kt needs one worker per node, but scaling.num_workers={as_yaml(scaling.num_workers)} with "
            f"scaling.placement={scaling.placement} puts {together} on one; use {spread}scaling.num_workers={max(1, able)}"
        )


def _remedy(nodes: Sequence[Node], workers: int, cpus_per_worker: float, use_gpu: bool) -> str:
    if workers:
        return f"use scaling.num_workers={workers}, or add nodes"
    if use_gpu and not any(node.gpus >= 1 for node in nodes):
        return "add nodes with GPUs, or set scaling.use_gpu=false"
    return f"lower scaling.cpus_per_worker={cpus_per_worker:g}, or add nodes"
