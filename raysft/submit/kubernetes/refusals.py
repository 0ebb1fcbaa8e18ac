"""Refuse what a job on Kubernetes could not do, before anything is started or paid."""

from __future__ import annotations

from pathlib import PurePosixPath

from raysft.config import Config
from raysft.config.verb import verb_of
from raysft.errors import RequestError
from raysft.run.resources import check_resources
from raysft.submit.kubernetes.names import config_text
from raysft.submit.kubernetes.paths import refuse_local_paths
from raysft.submit.kubernetes.pod_template import CONFIG_FOLDER, object_store_bytes
from raysft.submit.kubernetes.sizes import WorkerPods, nodes_of

CONFIG_MAP_BYTES = 1 << 20
"""Most bytes that Kubernetes stores in a ConfigMap."""
LEAST_MEMORY, LEAST_STORE = "250Mi", 75 << 20
"""The smallest object store with which Ray starts, in bytes, and the memory of a pod for it."""
TRIAL_CPUS = 0.1
"""CPUs that the process of a sweep's trial reserves."""


def refuse(config: Config, pods: WorkerPods) -> None:
    """Refuse a config that cannot run in the pods of its ``cluster`` section.

    Args:
        config: the config.
        pods: the number of worker pods.

    Raises:
        RequestError: names the first problem.
    """
    _refuse_missing(config)
    _refuse_small_pods(config)
    _refuse_gpus(config)
    _refuse_volume(config, pods)
    refuse_local_paths(config)
    _refuse_rules(config)
    size = len(config_text(config).encode())
    if size > CONFIG_MAP_BYTES:
        raise RequestError(
            f"the config has {size:,} bytes, but a ConfigMap holds {CONFIG_MAP_BYTES:,}; move long lists into files "
            "(data.registry, train.deepspeed)"
        )
    _refuse_engines(config, pods)
    if verb_of(config) != "generate":
        check_resources(config, nodes_of(config, pods.fewest), TRIAL_CPUS if verb_of(config) == "tune" else 0.0)


def _refuse_missing(config: Config) -> None:
    cluster = config.cluster
    if not cluster.image:
        raise RequestError(
            "cluster.image is not set, but pods need an image with raysft; build cluster/Dockerfile, push it, and name it"
        )
    if cluster.volume.size and not cluster.volume.claim:
        raise RequestError(
            f"cluster.volume.size={cluster.volume.size} needs a claim to create; set cluster.volume.claim to its name"
        )
    if config.scaling.address:
        raise RequestError(
            f"scaling.address={config.scaling.address} names a different cluster from the one that the job starts; remove it"
        )


def _refuse_small_pods(config: Config) -> None:
    cluster = config.cluster
    used = {"head": cluster.head.memory, "workers": cluster.workers.memory}
    if cluster.data_workers.replicas:
        used["data_workers"] = cluster.data_workers.memory
    for name, memory in used.items():
        if memory and int(object_store_bytes(memory, LEAST_STORE)) < LEAST_STORE:
            raise RequestError(
                f"cluster.{name}.memory={memory} is too little for Ray, which needs {LEAST_MEMORY} to start; use some GiB, such "
                "as 16Gi"
            )


def _refuse_engines(config: Config, pods: WorkerPods) -> None:
    """Refuse more engines than the pods hold with which the job starts, as the run itself would there."""
    generate, on_gpus = config.generate, config.scaling.use_gpu
    if not generate.num_actors or not (config.generates or generate.model) or verb_of(config) == "evaluate":
        return
    cpus, gpus = (0.0, float(generate.gpus_per_engine)) if on_gpus else (1.0, 0.0)
    most = sum(node.capacity(cpus, gpus) for node in nodes_of(config, pods.fewest))
    if generate.num_actors > most:
        raise RequestError(
            f"generate.num_actors={generate.num_actors} engines do not fit into the job's pods, which hold {most}; use {most}, "
            "or more pods"
        )


def _refuse_gpus(config: Config) -> None:
    gpus, use_gpu = config.cluster.workers.gpus, config.scaling.use_gpu
    if use_gpu and not gpus:
        raise RequestError(
            "scaling.use_gpu=true needs pods with GPUs, but cluster.workers.gpus=0; set it to the GPUs of a machine"
        )
    if gpus and not use_gpu:
        raise RequestError(
            f"cluster.workers.gpus={gpus} would be idle, because scaling.use_gpu=false; set scaling.use_gpu=true, or remove "
            "gpus"
        )
    engine = config.generate.gpus_per_engine
    if config.generates and verb_of(config) != "evaluate" and engine > max(gpus, 1):
        raise RequestError(
            f"generate.gpus_per_engine={engine} needs {engine} GPUs of one pod, but cluster.workers.gpus={gpus}; "
            "lower it, or use larger machines"
        )


def _refuse_volume(config: Config, pods: WorkerPods) -> None:
    volume, data = config.cluster.volume, config.cluster.data_workers.replicas
    mounted, own = PurePosixPath(volume.mount_path), PurePosixPath(CONFIG_FOLDER)
    if volume.claim and (own.is_relative_to(mounted) or mounted.is_relative_to(own)):
        raise RequestError(
            f"cluster.volume.mount_path={volume.mount_path} would hide {CONFIG_FOLDER}, where the head finds the config; use "
            "another folder, such as /mnt/raysft"
        )
    if volume.claim and volume.access_mode == "ReadWriteOnce" and pods.most + data > 1:
        raise RequestError(
            f"cluster.volume.access_mode=ReadWriteOnce serves one node, but the job has {pods.most + data} pods in addition to "
            "the head; use a ReadWriteMany volume (NFS, CephFS, Filestore, EFS), or a URI as run.storage"
        )


def _refuse_rules(config: Config) -> None:
    cluster = config.cluster
    if not cluster.release_workers:
        return
    if cluster.queue:
        raise RequestError(
            f"cluster.release_workers=true deletes pods that Kueue has admitted together, but cluster.queue={cluster.queue}; "
            "set release_workers=false"
        )
    if config.scaling.is_elastic and verb_of(config) in ("run", "evaluate"):
        raise RequestError(
            "cluster.release_workers=true is not available with KubeRay's autoscaler, which elastic workers "
            f"(scaling.num_workers={list(config.scaling.num_workers)}) need; set release_workers=false"  # pyright: ignore
        )
