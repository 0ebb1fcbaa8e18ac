"""The RayJob: one Ray cluster that runs one command of raysft. Pure."""

from __future__ import annotations

from importlib.metadata import version
from typing import Any

from raysft.config import Config
from raysft.config.verb import verb_of
from raysft.submit.kubernetes.names import JOB_LABEL, job_name, metadata
from raysft.submit.kubernetes.pod_template import (
    CONFIG_FOLDER,
    HEAD_PORTS,
    Role,
    container_security,
    has_autoscaler,
    object_store_bytes,
    pod_template,
)
from raysft.submit.kubernetes.sizes import WorkerPods, head_memory, ray_cpus
from raysft.submit.request import CONFIG_NAME

BACKOFF_LIMIT = 3
"""How often KubeRay starts a new cluster for a job that failed; the run continues from its newest checkpoint there."""
HEAD_STORE = 10**9
WORKER_STORE = 8 * 10**9
"""Most bytes of the object store, which holds rows on their way to the workers. Ray's default is 30% of the memory."""
IDLE_SECONDS = 600
"""How long the autoscaler leaves a pod that nothing uses, such as between two parts of a run."""


def ray_job(config: Config, pods: WorkerPods) -> dict[str, Any]:
    """Return the RayJob of a config.

    KubeRay submits it by HTTP: its default, a pod that follows the log, can call a healthy run failed when the log's connection
    closes, and would not submit again after the head was lost.
    """
    cluster, name = config.cluster, job_name(config)
    queue = {"kueue.x-k8s.io/queue-name": cluster.queue} if cluster.queue else {}
    spec: dict[str, Any] = {
        # In place of the shell that Ray starts: a stop would end the shell first, and nobody in the pod would notice raysft's end.
        "entrypoint": f"exec raysft {verb_of(config)} {CONFIG_FOLDER}/{CONFIG_NAME}{_final(config)}",
        "submissionMode": "HTTPMode",
        "backoffLimit": BACKOFF_LIMIT,
        **_end(config),
    }
    if not cluster.queue:
        spec["preRunningDeadlineSeconds"] = 60 * cluster.start_minutes
    if cluster.deadline_hours:
        spec["activeDeadlineSeconds"] = max(1, int(3600 * cluster.deadline_hours))
    spec["rayClusterSpec"] = _ray_cluster(config, pods)
    return {
        "apiVersion": "ray.io/v1",
        "kind": "RayJob",
        "metadata": metadata(config, name, **{JOB_LABEL: name}, **queue),
        "spec": spec,
    }


def _final(config: Config) -> str:
    """Return the option by which a job that another start would not help is stopped, so that KubeRay leaves it alone.

    Not with rules of deletion: they know no job that was stopped, and its pods would stay.
    """
    return "" if config.cluster.release_workers else f" --rayjob http://127.0.0.1:{HEAD_PORTS['dashboard']}"


def _end(config: Config) -> dict[str, Any]:
    """Return what is removed when the job has ended."""
    seconds = config.cluster.ttl_seconds
    if not config.cluster.release_workers:
        return {"shutdownAfterJobFinishes": True, "ttlSecondsAfterFinished": seconds}
    rules = [
        {"condition": {"jobStatus": status, "ttlSeconds": after}, "policy": policy}
        for status in ("SUCCEEDED", "FAILED")
        for policy, after in (("DeleteWorkers", 0), ("DeleteCluster", seconds))
    ]
    # A job that never ran (too late, no answer) has a deployment that failed, but no status.
    rules.append({"condition": {"jobDeploymentStatus": "Failed", "ttlSeconds": seconds}, "policy": "DeleteCluster"})
    return {"deletionStrategy": {"deletionRules": rules}}


def _ray_cluster(config: Config, pods: WorkerPods) -> dict[str, Any]:
    cluster = config.cluster
    spec: dict[str, Any] = {"rayVersion": version("ray"), "authOptions": {"mode": "token"}}
    if has_autoscaler(config):
        spec["enableInTreeAutoscaling"] = True
        spec["autoscalerOptions"] = {
            "version": "v2",
            "idleTimeoutSeconds": IDLE_SECONDS,
            "securityContext": container_security(config),
        }
    memory = cluster.head.memory or head_memory(pods.most + cluster.data_workers.replicas)
    spec["headGroupSpec"] = {
        "rayStartParams": {
            "dashboard-host": "0.0.0.0",
            "num-cpus": "0",  # workers and data tasks next to the run's own process would starve it
            "object-store-memory": object_store_bytes(memory, HEAD_STORE),
        },
        "template": pod_template(config, "head", memory),
    }
    spec["workerGroupSpecs"] = [_workers(config, pods)]
    if cluster.data_workers.replicas:
        data = cluster.data_workers
        number = WorkerPods(data.replicas, data.replicas)
        spec["workerGroupSpecs"].append(_group(config, "data", number, data.memory, str(data.cpus)))
    return spec


def _workers(config: Config, pods: WorkerPods) -> dict[str, Any]:
    workers = config.cluster.workers
    group = _group(config, "worker", pods, workers.memory, str(ray_cpus(config)))
    if workers.gpus:
        group["rayStartParams"]["num-gpus"] = str(workers.gpus)
    return group


def _group(config: Config, role: Role, pods: WorkerPods, memory: str, cpus: str) -> dict[str, Any]:
    # A job starts when all replicas run, so that the first ones are the fewest; the autoscaler adds others.
    return {
        "groupName": "workers" if role == "worker" else role,
        "replicas": pods.fewest,
        "minReplicas": pods.fewest,
        "maxReplicas": pods.most,
        "rayStartParams": {"num-cpus": cpus, "object-store-memory": object_store_bytes(memory, WORKER_STORE)},
        "template": pod_template(config, role, memory),
    }
