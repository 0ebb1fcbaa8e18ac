"""Which nodes the pods may run on: selectors, tolerations, affinities. Pure."""

from __future__ import annotations

from typing import Any

from raysft.config import Config
from raysft.submit.kubernetes.names import JOB_LABEL, job_name

SPOT_LABELS = {
    "gke": ("cloud.google.com/gke-spot", "true"),
    "eks": ("eks.amazonaws.com/capacityType", "SPOT"),
    "aks": ("kubernetes.azure.com/scalesetpriority", "spot"),
    "karpenter": ("karpenter.sh/capacity-type", "spot"),
}
"""Label, and value of it, of the spot nodes of each kind of cluster; their taint, if they have one, has the same key and value."""


def placement(config: Config, role: str) -> dict[str, Any]:
    """Return the fields of a pod's spec that choose its node.

    Args:
        config: the config.
        role: ``head``, ``worker`` or ``data``.
    """
    cluster = config.cluster
    group = {"head": cluster.head, "worker": cluster.workers, "data": cluster.data_workers}[role]
    selector, tolerations = dict(group.node_selector), list(group.tolerations)
    if role == "worker" or (role == "head" and on_one_node(config)):
        selector, tolerations = _of_workers(config)
    fields: dict[str, Any] = {}
    if selector:
        fields["nodeSelector"] = selector
    if tolerations:
        fields["tolerations"] = tolerations
    if affinity := _affinity(config, role):
        fields["affinity"] = affinity
    return fields


def on_one_node(config: Config) -> bool:
    """Return True if head and workers share a volume that only one node can mount."""
    volume = config.cluster.volume
    return bool(volume.claim) and volume.access_mode == "ReadWriteOnce"


def _of_workers(config: Config) -> tuple[dict[str, str], list[dict[str, Any]]]:
    workers = config.cluster.workers
    selector, tolerations = dict(workers.node_selector), list(workers.tolerations)
    if workers.gpus:
        tolerations.append({"key": workers.gpu_resource, "operator": "Exists", "effect": "NoSchedule"})
    if workers.spot:
        key, value = SPOT_LABELS[workers.spot]
        selector[key] = value
        tolerations.append({"key": key, "operator": "Equal", "value": value, "effect": "NoSchedule"})
    return selector, tolerations


def _affinity(config: Config, role: str) -> dict[str, Any]:
    cluster = config.cluster
    if role == "head" and cluster.workers.spot and not on_one_node(config):
        # The run's own process is on the head: without it, all workers end.
        key, value = SPOT_LABELS[cluster.workers.spot]
        other = {"matchExpressions": [{"key": key, "operator": "NotIn", "values": [value]}]}
        return {"nodeAffinity": {"requiredDuringSchedulingIgnoredDuringExecution": {"nodeSelectorTerms": [other]}}}
    if role == "worker" and on_one_node(config):
        term = _beside(config, "head", "kubernetes.io/hostname")
        return {"podAffinity": {"requiredDuringSchedulingIgnoredDuringExecution": [term]}}
    if role == "worker" and cluster.topology and not cluster.queue:
        term = {"weight": 100, "podAffinityTerm": _beside(config, "worker", cluster.topology)}
        return {"podAffinity": {"preferredDuringSchedulingIgnoredDuringExecution": [term]}}
    return {}


def _beside(config: Config, node_type: str, topology: str) -> dict[str, Any]:
    labels = {JOB_LABEL: job_name(config), "ray.io/node-type": node_type}
    return {"labelSelector": {"matchLabels": labels}, "topologyKey": topology}
