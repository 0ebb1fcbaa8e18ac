"""Pods of the head and of the workers. Pure."""

from __future__ import annotations

from typing import Any, Literal

from raysft.config import Config
from raysft.config.cluster import DataWorkersSection, HeadSection, WorkersSection
from raysft.config.kubernetes_values import bytes_of
from raysft.submit.kubernetes.names import JOB_LABEL, job_name
from raysft.submit.kubernetes.placement import placement
from raysft.submit.request import STOP_SECONDS
from raysft.train.cpu_worker import KEEP_MEMORY

Role = Literal["head", "worker", "data"]

DRAIN_SECONDS = 300
"""How long Ray may take to leave a node after SIGTERM: time for a step and a checkpoint. Its own default is 30."""
GRACE_SECONDS = DRAIN_SECONDS + 30
"""How long Kubernetes waits after SIGTERM before it kills; the default of 30 would end the drain at once."""
ENVIRONMENT = {
    "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S": str(DRAIN_SECONDS),
    "RAY_JOB_STOP_WAIT_TIME_S": str(STOP_SECONDS),
    "RAY_TRAIN_PREEMPTION_POLL_INTERVAL_S": "1",
    "PYTHONFAULTHANDLER": "1",
}
CONFIG_FOLDER = "/etc/raysft"
USER = 1000
"""User of the image."""
HEAD_PORTS = {"gcs-server": 6379, "dashboard": 8265, "client": 10001, "metrics": 8080}
WORKER_PORTS = {"metrics": 8080}


def pod_template(config: Config, role: Role, memory: str) -> dict[str, Any]:
    """Return the template of a group's pods.

    Args:
        config: the config.
        role: the group.
        memory: memory of a pod.
    """
    cluster, head = config.cluster, role == "head"
    group = {"head": cluster.head, "worker": cluster.workers, "data": cluster.data_workers}[role]
    annotations: dict[str, str] = {}
    if head:
        annotations["cluster-autoscaler.kubernetes.io/safe-to-evict"] = "false"
    elif cluster.queue and cluster.topology and role == "worker":
        annotations["kueue.x-k8s.io/podset-preferred-topology"] = cluster.topology
    spec: dict[str, Any] = {
        "terminationGracePeriodSeconds": GRACE_SECONDS,
        # The head's token is what KubeRay's autoscaler asks Kubernetes for pods with.
        "automountServiceAccountToken": head and has_autoscaler(config),
        "securityContext": _pod_security(),
        "containers": [_container(config, role, group, memory)],
        **placement(config, role),
    }
    if cluster.service_account:
        spec["serviceAccountName"] = cluster.service_account
    if cluster.priority_class:
        spec["priorityClassName"] = cluster.priority_class
    if cluster.image_pull_secrets:
        spec["imagePullSecrets"] = [{"name": name} for name in cluster.image_pull_secrets]
    if volumes := _volumes(config, head):
        spec["volumes"] = volumes
    labels = {JOB_LABEL: job_name(config)}
    return {"metadata": {"labels": labels, **({"annotations": annotations} if annotations else {})}, "spec": spec}


def has_autoscaler(config: Config) -> bool:
    """Return True if KubeRay's autoscaler adds pods while the job runs: for elastic workers, unless Kueue admits all at once."""
    elastic = config.scaling.is_elastic and not (config.tune.space or config.generate.model)
    return elastic and not config.cluster.queue


def container_security(config: Config, role: Role | None = None) -> dict[str, Any]:
    """Return what a container may do: nothing beyond its user, apart from what was asked for."""
    added = ["SYS_PTRACE"] if config.cluster.debug and role else []
    if role == "worker" and any("rdma" in name for name in config.cluster.workers.resources):
        added.append("IPC_LOCK")  # RDMA pins memory
    return {
        # A capability of another user than root comes with an executable file, which counts as an escalation.
        "allowPrivilegeEscalation": "SYS_PTRACE" in added,
        "capabilities": {"drop": ["ALL"], **({"add": added} if added else {})},
    }


def _pod_security() -> dict[str, Any]:
    return {
        "runAsNonRoot": True,
        "runAsUser": USER,
        "runAsGroup": USER,
        "fsGroup": USER,
        # Without it, the kubelet changes the owner of every file of the volume at each start.
        "fsGroupChangePolicy": "OnRootMismatch",
        "seccompProfile": {"type": "RuntimeDefault"},
    }


def _container(
    config: Config, role: Role, group: HeadSection | WorkersSection | DataWorkersSection, memory: str
) -> dict[str, Any]:
    cluster, head = config.cluster, role == "head"
    on_cpus = role == "worker" and not config.scaling.use_gpu
    environment = {**ENVIRONMENT, **(KEEP_MEMORY if on_cpus else {}), **cluster.environment}
    ports = HEAD_PORTS if head else WORKER_PORTS
    amounts: dict[str, Any] = {"cpu": str(group.cpus), "memory": memory}
    if group.disk:
        amounts["ephemeral-storage"] = group.disk
    if role == "worker":
        if cluster.workers.gpus:
            amounts[cluster.workers.gpu_resource] = str(cluster.workers.gpus)
        amounts |= {name: str(number) for name, number in cluster.workers.resources.items()}
    container = {
        "name": "ray-head" if head else "ray-worker",
        "image": cluster.image,
        "ports": [{"name": name, "containerPort": port} for name, port in ports.items()],
        "env": [{"name": name, "value": value} for name, value in environment.items()],
        # Requests as limits: Ray takes the limits for what there is.
        "resources": {"requests": dict(amounts), "limits": dict(amounts)},
        "securityContext": container_security(config, role),
    }
    if cluster.secrets:
        container["envFrom"] = [{"secretRef": {"name": name}} for name in cluster.secrets]
    if mounts := _mounts(config, head):
        container["volumeMounts"] = mounts
    return container


def _mounts(config: Config, head: bool) -> list[dict[str, Any]]:
    volume = config.cluster.volume
    storage = [{"name": "storage", "mountPath": volume.mount_path}] if volume.claim else []
    return storage + ([{"name": "config", "mountPath": CONFIG_FOLDER, "readOnly": True}] if head else [])


def _volumes(config: Config, head: bool) -> list[dict[str, Any]]:
    claim = config.cluster.volume.claim
    storage = [{"name": "storage", "persistentVolumeClaim": {"claimName": claim}}] if claim else []
    return storage + ([{"name": "config", "configMap": {"name": job_name(config)}}] if head else [])


def object_store_bytes(memory: str, most: int) -> str:
    """Bytes of Ray's object store: at most 30% of a pod's memory, which it is a part of."""
    return str(min(most, bytes_of(memory) * 3 // 10))
