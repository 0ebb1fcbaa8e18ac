"""The ``cluster`` section: pods on Kubernetes."""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, field_validator, model_validator

from raysft.config.section import Count, Positive, Section, Text

_OBJECT_NAME = re.compile(r"[a-z0-9]([-a-z0-9.]{0,251}[a-z0-9])?")
_QUANTITY = re.compile(r"([1-9][0-9]*)(Mi|Gi|Ti|M|G|T)")
_UNITS = {"Mi": 1 << 20, "Gi": 1 << 30, "Ti": 1 << 40, "M": 10**6, "G": 10**9, "T": 10**12}
_SECRET_NAME = re.compile(r"(?i)(token|secret|passw(or)?d|credentials?|[_-]key|^key)$")


def _object_name(value: str) -> str:
    if not _OBJECT_NAME.fullmatch(value):
        raise ValueError("must be the name of an object in Kubernetes: lower-case letters, digits, '-' and '.'")
    return value


def _quantity(value: str) -> str:
    if not _QUANTITY.fullmatch(value):
        raise ValueError(f"must be a whole number with a unit ({', '.join(_UNITS)}), for example 64Gi")
    return value


def _folder(value: str) -> str:
    if not value.startswith("/") or ".." in value.split("/"):
        raise ValueError("must be an absolute path inside the pods, for example /mnt/raysft")
    return value.rstrip("/") or "/"


ObjectName = Annotated[str, AfterValidator(_object_name)]
"""Name of an object in Kubernetes."""
Quantity = Annotated[str, AfterValidator(_quantity)]
"""Amount of memory or disk, as Kubernetes writes it: 64Gi."""
Folder = Annotated[str, AfterValidator(_folder)]
"""Absolute path inside the pods."""


def bytes_of(quantity: str) -> int:
    """Bytes of an amount of memory or disk.

    >>> bytes_of("64Gi") == 64 * 2**30, bytes_of("500M")
    (True, 500000000)
    """
    unit = quantity.lstrip("0123456789")
    return int(quantity.removesuffix(unit)) * _UNITS[unit]


class PodSection(Section):
    """Size and place of a pod."""

    cpus: Positive = 4
    """CPUs of a pod, a whole number: Ray rounds a fraction up, and would start more than there is room for."""
    disk: Quantity | None = None
    """Disk of a pod (``ephemeral-storage``) for what Ray spills and the local copy of the model, such as ``200Gi``. Default: no
    request and no limit."""
    node_selector: dict[Text, str] = {}
    """ObjectNames that a node must have, for example ``{cloud.google.com/gke-accelerator: nvidia-h100-80gb}``."""
    tolerations: list[dict[Text, Any]] = []
    """Taints that the pod tolerates, as Kubernetes writes them: ``[{key: nvidia.com/gpu, operator: Exists}]``."""

    @field_validator("cpus", mode="before")
    @classmethod
    def _whole(cls, value: Any) -> Any:
        if isinstance(value, float) and value > 0 and value != int(value):
            raise ValueError(
                f"must be a whole number, because Ray rounds a pod's CPU limit up; use {int(value) or 1} or {int(value) + 1}"
            )
        return value


class HeadSection(PodSection):
    """The head's pod, with the run's own process; no worker runs there."""

    memory: Quantity | None = None
    """Memory of the pod, such as ``16Gi``. Default: 6 GiB, and 256 MiB more for each pod of a worker."""

    @model_validator(mode="before")
    @classmethod
    def _no_gpus(cls, value: Any) -> Any:
        if isinstance(value, dict) and "gpus" in value:
            raise ValueError(
                "the head trains nothing, so its GPUs would stand idle; remove gpus, or set cluster.workers.gpus"
            )
        return value


class WorkersSection(PodSection):
    """The pods of training workers and generation engines: one per machine, with all its GPUs."""

    memory: Quantity = "16Gi"
    """Memory of a pod."""
    gpus: Count = 0
    """GPUs of a pod: all that a machine has, so that its workers share one copy of the model and talk over NVLink."""
    gpu_resource: Text = "nvidia.com/gpu"
    """Kubernetes' name of the GPUs, for example ``amd.com/gpu``."""
    resources: dict[Text, Positive] = {}
    """Further resources of a pod, for example ``{rdma/hca: 1}``."""
    replicas: Positive | None = None
    """Number of pods. Default: what ``scaling.num_workers`` needs; for ``raysft generate`` what ``generate.num_actors`` needs, or
    one; for ``raysft tune`` what ``tune.max_concurrent`` trials need."""
    spot: Literal["gke", "eks", "aks", "karpenter"] | None = None
    """Run the pods on spot nodes, and the head on others: sets the node selector and toleration that this kind of cluster has for
    them. With ``scaling.num_workers: [min, max]``, the run goes on with the workers that remain."""


class DataWorkersSection(PodSection):
    """Pods without GPUs that read and tokenize data beside the pods with GPUs."""

    memory: Quantity = "16Gi"
    """Memory of a pod."""
    replicas: Count = 0
    """Number of pods. Above 0, Ray gets only those CPUs of a pod with GPUs that its workers reserve, so that the tasks which make
    rows run here during training."""


class VolumeSection(Section):
    """The volume that all pods mount."""

    claim: ObjectName | None = None
    """Name of the PersistentVolumeClaim. Default: no volume; ``run.storage`` must be a URI then."""
    mount_path: Folder = "/mnt/raysft"
    """Folder where pods see the volume; ``run.storage`` is a folder below it, or a URI."""
    size: Quantity | None = None
    """Create the claim with this size. It is not removed with the job. Default: the claim exists."""
    storage_class: ObjectName | None = None
    """Storage class of a claim that is created. Default: the cluster's own."""
    access_mode: Literal["ReadWriteMany", "ReadWriteOnce"] = "ReadWriteMany"
    """``ReadWriteMany``: nodes share the volume (NFS, CephFS, Filestore, EFS, …). ``ReadWriteOnce``, as most disks have it: one
    node at a time, so that the head and the only pod of workers are placed on the same one."""


class ClusterSection(Section):
    """What raysft submit --to kubernetes starts; everything else ignores it, and no value may be a secret."""

    image: Text | None = None
    """Image of all pods, with raysft in it (``cluster/Dockerfile``). Required by ``raysft submit --to kubernetes``."""
    image_folders: list[Folder] = []
    """Folders inside the image with models or data that the config names. Other local paths are refused, because pods would not
    find them."""
    image_pull_secrets: list[ObjectName] = []
    """Names of Secrets for the registry of the image."""
    namespace: ObjectName | None = None
    """Namespace of all objects. Default: that of the current context of kubectl."""
    service_account: ObjectName | None = None
    """Service account of the pods, for access to buckets without keys. Default: the namespace's own."""
    secrets: list[ObjectName] = []
    """Names of Secrets whose entries become environment variables of all pods, such as AWS_SECRET_ACCESS_KEY or HF_TOKEN."""
    environment: dict[Text, str] = {}
    """Further environment variables of all pods, for example ``{HF_HOME: /mnt/raysft/hub}``. No secrets."""
    priority_class: ObjectName | None = None
    """Priority class of all pods."""
    head: HeadSection = HeadSection()
    """The head's pod."""
    workers: WorkersSection = WorkersSection()
    """The workers' pods."""
    data_workers: DataWorkersSection = DataWorkersSection()
    """Pods for data."""
    volume: VolumeSection = VolumeSection()
    """The volume."""
    queue: ObjectName | None = None
    """Kueue's local queue that admits the job: all pods at once, or none. Default: no Kueue."""
    topology: Text | None = None
    """Node label whose value workers should share, for example ``topology.kubernetes.io/zone``; with ``queue`` a level of Kueue's
    topology. A preference, not a condition. Default: none."""
    start_minutes: Positive = 30
    """Minutes that pods may take to start before the job counts as failed. Without effect with ``queue``, where a job may wait."""
    deadline_hours: Annotated[float, Field(gt=0)] | None = None
    """Hours after which KubeRay ends the job, without a checkpoint; a guard against runs that hang. Default: none."""
    ttl_seconds: Count = 120
    """Seconds that the pods stay after the end of the job, with dashboard and logs."""
    release_workers: bool = False
    """Remove the workers' pods at the end of the job, and only the head ``ttl_seconds`` later. Caution: a job that was stopped (not
    failed) keeps all its pods until its RayJob is deleted. Not available with ``queue`` and elastic workers."""
    debug: bool = False
    """Let py-spy and the dashboard show the stacks of processes: grants the capability SYS_PTRACE."""
    prometheus: Text | None = None
    """Let Prometheus collect the pods' metrics, with a dashboard for Grafana and alerts: value of the label ``release`` by which
    Prometheus's operator selects PodMonitors and rules. Default: no metrics."""

    @field_validator("environment")
    @classmethod
    def _no_secret(cls, value: dict[str, str]) -> dict[str, str]:
        for name in value:
            if _SECRET_NAME.search(name):
                raise ValueError(
                    f"the variable {name} looks like a secret, but configs are copied to run directories and logs; "
                    "put it into a Secret and name that in cluster.secrets"
                )
        return value
