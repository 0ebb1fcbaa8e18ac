"""Refuse what a job on Kubernetes could not do, before anything is started or paid."""

from __future__ import annotations

from raysft.config import Config
from raysft.errors import RequestError
from raysft.run.resources import check_resources
from raysft.submit.kubernetes.names import config_text
from raysft.submit.kubernetes.paths import refuse_local_paths
from raysft.submit.kubernetes.sizes import WorkerPods, nodes_of
from raysft.submit.request import verb_of

CONFIG_MAP_BYTES = 1 << 20
"""Most bytes that Kubernetes stores in a ConfigMap."""
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
            f"cluster.volume.size={cluster.volume.size} has no claim to create; set cluster.volume.claim to its name"
        )
    if config.scaling.address:
        raise RequestError(
            f"scaling.address={config.scaling.address} names another cluster than the one that the job starts; remove it"
        )


def _refuse_gpus(config: Config) -> None:
    gpus, use_gpu = config.cluster.workers.gpus, config.scaling.use_gpu
    if use_gpu and not gpus:
        raise RequestError(
            "scaling.use_gpu=true needs pods with GPUs, but cluster.workers.gpus=0; set it to the GPUs of a machine"
        )
    if gpus and not use_gpu:
        raise RequestError(
            f"cluster.workers.gpus={gpus} would stand idle, as scaling.use_gpu=false; set scaling.use_gpu=true, or remove gpus"
        )
    engine = config.generate.gpus_per_engine
    if config.generates and engine > max(gpus, 1):
        raise RequestError(
            f"generate.gpus_per_engine={engine} needs {engine} GPUs of one pod, but cluster.workers.gpus={gpus}; "
            "lower it, or use larger machines"
        )


def _refuse_volume(config: Config, pods: WorkerPods) -> None:
    volume, data = config.cluster.volume, config.cluster.data_workers.replicas
    if volume.claim and volume.access_mode == "ReadWriteOnce" and pods.most + data > 1:
        raise RequestError(
            f"cluster.volume.access_mode=ReadWriteOnce serves one node, but the job has {pods.most + data} pods beside the head; "
            "use a ReadWriteMany volume (NFS, CephFS, Filestore, EFS), or a URI as run.storage"
        )


def _refuse_rules(config: Config) -> None:
    cluster = config.cluster
    if not cluster.release_workers:
        return
    if cluster.queue:
        raise RequestError(
            f"cluster.release_workers=true removes pods that Kueue has admitted together, but cluster.queue={cluster.queue}; "
            "set release_workers=false"
        )
    if config.scaling.is_elastic and verb_of(config) == "run":
        raise RequestError(
            "cluster.release_workers=true is not available with KubeRay's autoscaler, which elastic workers "
            f"(scaling.num_workers={list(config.scaling.num_workers)}) need; set release_workers=false"  # pyright: ignore
        )
