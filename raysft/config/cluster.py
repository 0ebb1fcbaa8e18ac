"""The ``cluster`` section: pods on Kubernetes."""

from __future__ import annotations

import math
import re
from typing import Annotated, Any, Literal, Self

from pydantic import Field, field_validator, model_validator

from raysft.config.kubernetes_values import (
    Device,
    Devices,
    Folder,
    Image,
    Label,
    LabelValue,
    NodeSelector,
    ObjectName,
    Quantity,
    ShortName,
    Toleration,
    Variables,
)
from raysft.config.section import LARGEST, Count, Positive, Section

_SECRET_NAME = re.compile(r"(?i)(token|secret|passw(or)?d|passphrase|[_-]pwd|credentials?|[_-]key|^key)$")
_FILES_NAME = re.compile(r"(?i)credentials?$")
"""Variables that usually name a file with a secret, such as GOOGLE_APPLICATION_CREDENTIALS."""


class PodSection(Section):
    """Size and place of a pod."""

    cpus: Positive = 4
    """CPUs of a pod, a whole number: Ray rounds a fraction up, and would start more than there is room for."""
    disk: Quantity | None = None
    """Disk of a pod (``ephemeral-storage``) for what Ray spills and the local copy of the model, such as ``200Gi``. Default: no
    request and no limit."""
    node_selector: NodeSelector = {}
    """Labels that a node must have, for example ``{cloud.google.com/gke-accelerator: nvidia-h100-80gb}``."""
    tolerations: list[Toleration] = []
    """Taints that the pod tolerates, as Kubernetes writes them: ``[{key: nvidia.com/gpu, operator: Exists}]``."""

    @field_validator("cpus", mode="before")
    @classmethod
    def _whole(cls, value: Any) -> Any:
        if isinstance(value, float) and value > 0 and math.isfinite(value) and value != int(value):
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
    gpu_resource: Device = "nvidia.com/gpu"
    """Kubernetes' name of the GPUs, for example ``amd.com/gpu``."""
    resources: Devices = {}
    """Further resources of a pod, for example ``{rdma/hca: 1}``."""
    replicas: Positive | None = None
    """Number of pods. Default: what ``scaling.num_workers`` needs; for ``raysft generate`` what ``generate.num_actors`` needs, or
    one; for ``raysft tune`` what ``tune.max_concurrent`` trials need."""
    spot: Literal["gke", "eks", "aks", "karpenter"] | None = None
    """Run the pods on spot nodes, and the head on others: sets the node selector and toleration that this kind of cluster has for
    them. With ``scaling.num_workers: [min, max]``, the run goes on with the workers that remain."""

    @model_validator(mode="after")
    def _gpus_once(self) -> Self:
        if self.gpu_resource in self.resources:
            raise ValueError(
                f"resources names {self.gpu_resource}, which gpus already asks for; remove it from resources"
            )
        return self


class DataWorkersSection(PodSection):
    """Pods without GPUs that read and tokenize data beside the pods with GPUs."""

    memory: Quantity = "16Gi"
    """Memory of a pod."""
    replicas: Count = 0
    """Number of pods. Above 0, Ray gets only those CPUs of a pod with GPUs that its workers reserve, so that the tasks which make
    rows run here during training; with more than 64 workers, each pod of workers makes its own rows."""


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

    image: Image | None = None
    """Image of all pods, with raysft in it (``cluster/Dockerfile``). Required by ``raysft submit --to kubernetes``."""
    image_folders: list[Folder] = []
    """Folders inside the image with models or data that the config names. Other local paths are refused, because pods would not
    find them."""
    image_pull_secrets: list[ObjectName] = []
    """Names of Secrets for the registry of the image."""
    namespace: ShortName | None = None
    """Namespace of all objects. Default: that of the current context of kubectl."""
    service_account: ObjectName | None = None
    """Service account of the pods, for access to buckets without keys. Default: the namespace's own."""
    secrets: list[ObjectName] = []
    """Names of Secrets whose entries become environment variables of all pods, such as AWS_SECRET_ACCESS_KEY or HF_TOKEN."""
    environment: Variables = {}
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
    queue: ShortName | None = None
    """Kueue's local queue that admits the job: all pods at once, or none. Default: no Kueue."""
    topology: Label | None = None
    """Node label whose value workers should share, for example ``topology.kubernetes.io/zone``; with ``queue`` a level of Kueue's
    topology. A preference, not a condition. Default: none."""
    start_minutes: Annotated[int, Field(gt=0, le=LARGEST // 60, strict=True)] = 30
    """Minutes that pods may take to start before the job counts as failed. Without effect with ``queue``, where a job may wait."""
    deadline_hours: Annotated[float, Field(gt=0, le=LARGEST // 3600)] | None = None
    """Hours after which KubeRay ends the job, without a checkpoint; a guard against runs that hang. Default: none."""
    ttl_seconds: Count = 120
    """Seconds that the pods stay after the end of the job, with dashboard and logs."""
    release_workers: bool = False
    """Remove the workers' pods at the end of the job, and only the head ``ttl_seconds`` later. Caution: a job that was stopped (not
    failed) keeps all its pods until its RayJob is deleted. Not available with ``queue`` and elastic workers."""
    debug: bool = False
    """Let py-spy and the dashboard show the stacks of processes: grants the capability SYS_PTRACE."""
    prometheus: LabelValue | None = None
    """Let Prometheus collect the pods' metrics, with a dashboard for Grafana and alerts: value of the label ``release`` by which
    Prometheus's operator selects PodMonitors and rules. Default: no metrics."""

    @field_validator("environment")
    @classmethod
    def _no_secret(cls, value: dict[str, str]) -> dict[str, str]:
        for name, text in value.items():
            is_path = _FILES_NAME.search(name) and text.startswith("/")
            if _SECRET_NAME.search(name) and not is_path:
                raise ValueError(
                    f"the variable {name} looks like a secret, but configs are copied to run directories and logs; "
                    "put it into a Secret and name that in cluster.secrets"
                )
        return value
