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
    """Size and placement of a pod."""

    cpus: Positive = 4
    """CPUs of a pod, a whole number: Ray rounds a fraction up, and would then schedule more than the pod can hold."""
    disk: Quantity | None = None
    """Disk of a pod (``ephemeral-storage``), for objects that Ray spills and the local copy of the model, such as ``200Gi``.
    Default: no request and no limit."""
    node_selector: NodeSelector = {}
    """Labels that a node must have, for example ``{cloud.google.com/gke-accelerator: nvidia-h100-80gb}``."""
    tolerations: list[Toleration] = []
    """Taints that the pod tolerates, in Kubernetes' notation: ``[{key: nvidia.com/gpu, operator: Exists}]``."""

    @field_validator("cpus", mode="before")
    @classmethod
    def _whole(cls, value: Any) -> Any:
        if isinstance(value, float) and value > 0 and math.isfinite(value) and value != int(value):
            raise ValueError(
                f"must be a whole number, because Ray rounds a pod's CPU limit up; use {int(value) or 1} or {int(value) + 1}"
            )
        return value


class HeadSection(PodSection):
    """The head pod, which runs the driver process of the run; no workers run there."""

    memory: Quantity | None = None
    """Memory of the pod, such as ``16Gi``. Default: 6 GiB, plus 256 MiB for each worker pod."""

    @model_validator(mode="before")
    @classmethod
    def _no_gpus(cls, value: Any) -> Any:
        if isinstance(value, dict) and "gpus" in value:
            raise ValueError(
                "the head trains nothing, so its GPUs would be idle; remove gpus, or set cluster.workers.gpus"
            )
        return value


class WorkersSection(PodSection):
    """The pods of training workers and generation engines: one per machine, with all of its GPUs."""

    memory: Quantity = "16Gi"
    """Memory of a pod."""
    gpus: Count = 0
    """GPUs of a pod: all that a machine has, so that its workers share one copy of the model and communicate over NVLink."""
    gpu_resource: Device = "nvidia.com/gpu"
    """Kubernetes resource name of the GPUs, for example ``amd.com/gpu``."""
    resources: Devices = {}
    """Additional resources of a pod, for example ``{rdma/hca: 1}``."""
    replicas: Positive | None = None
    """Number of pods. Default: as many as ``scaling.num_workers`` needs; for ``raysft generate`` as many as
    ``generate.num_actors`` needs, or one; for ``raysft tune`` as many as ``tune.max_concurrent`` trials need."""
    spot: Literal["gke", "eks", "aks", "karpenter"] | None = None
    """Run these pods on spot nodes, and the head on regular ones: sets the node selector and toleration that this kind of
    cluster uses for spot nodes. With ``scaling.num_workers: [min, max]``, the run continues with the remaining workers."""

    @model_validator(mode="after")
    def _gpus_once(self) -> Self:
        if self.gpu_resource in self.resources:
            raise ValueError(
                f"resources contains {self.gpu_resource}, which gpus already requests; remove it from resources"
            )
        return self


class DataWorkersSection(PodSection):
    """CPU-only pods that read and tokenize data, in addition to the GPU pods."""

    memory: Quantity = "16Gi"
    """Memory of a pod."""
    replicas: Count = 0
    """Number of pods. Above 0, Ray is given only those CPUs of a GPU pod that its workers reserve, so that the tasks that build
    rows run here during training; with more than 64 workers, each worker pod builds its own rows."""


class VolumeSection(Section):
    """The volume that all pods mount."""

    claim: ObjectName | None = None
    """Name of the PersistentVolumeClaim. Default: no volume; ``run.storage`` must be a URI then."""
    mount_path: Folder = "/mnt/raysft"
    """Folder where pods mount the volume; ``run.storage`` must be a folder below it, or a URI."""
    size: Quantity | None = None
    """Create the claim with this size. It is not deleted with the job. Default: the claim already exists."""
    storage_class: ObjectName | None = None
    """Storage class of the claim if it is created. Default: the cluster's default."""
    access_mode: Literal["ReadWriteMany", "ReadWriteOnce"] = "ReadWriteMany"
    """``ReadWriteMany``: nodes share the volume (NFS, CephFS, Filestore, EFS, …). ``ReadWriteOnce``, as with most disks: one
    node at a time, so the head and the only worker pod are placed on the same node."""


class ClusterSection(Section):
    """What raysft submit --to kubernetes starts; everything else ignores this section. It must not contain secrets."""

    image: Image | None = None
    """Image of all pods, with raysft installed (``cluster/Dockerfile``). Required by ``raysft submit --to kubernetes``."""
    image_folders: list[Folder] = []
    """Folders inside the image with models or data that the config names. Other local paths are refused, because pods would not
    find them."""
    image_pull_secrets: list[ObjectName] = []
    """Names of the Secrets for the image's registry."""
    namespace: ShortName | None = None
    """Namespace of all objects. Default: that of kubectl's current context."""
    service_account: ObjectName | None = None
    """Service account of the pods, for access to buckets without keys. Default: that of the namespace."""
    secrets: list[ObjectName] = []
    """Names of Secrets whose entries become environment variables of all pods, such as AWS_SECRET_ACCESS_KEY or HF_TOKEN."""
    environment: Variables = {}
    """Additional environment variables of all pods, for example ``{HF_HOME: /mnt/raysft/hub}``. No secrets."""
    priority_class: ObjectName | None = None
    """Priority class of all pods."""
    head: HeadSection = HeadSection()
    """The head pod."""
    workers: WorkersSection = WorkersSection()
    """The worker pods."""
    data_workers: DataWorkersSection = DataWorkersSection()
    """The data pods."""
    volume: VolumeSection = VolumeSection()
    """The volume."""
    queue: ShortName | None = None
    """Kueue LocalQueue that admits the job: all pods at once, or none. Default: no Kueue."""
    topology: Label | None = None
    """Node label whose value workers should share, for example ``topology.kubernetes.io/zone``; with ``queue``, a level of
    Kueue's topology. A preference, not a requirement. Default: none."""
    start_minutes: Annotated[int, Field(gt=0, le=LARGEST // 60, strict=True)] = 30
    """Minutes that pods may take to start before the job counts as failed. Has no effect with ``queue``, where a job may have
    to wait."""
    deadline_hours: Annotated[float, Field(gt=0, le=LARGEST // 3600)] | None = None
    """Hours after which KubeRay ends the job, without a checkpoint; a guard against runs that hang. Default: none."""
    ttl_seconds: Count = 120
    """Seconds that the pods stay up after the end of the job, with the dashboard and logs."""
    release_workers: bool = False
    """Remove the worker pods at the end of the job, and the head ``ttl_seconds`` later. Caution: a job that was stopped (not
    failed) keeps all its pods until its RayJob is deleted. Not available with ``queue`` and elastic workers."""
    debug: bool = False
    """Allow py-spy and the dashboard to show stack traces of processes: grants the capability SYS_PTRACE."""
    prometheus: LabelValue | None = None
    """Let Prometheus scrape the pods' metrics, and create a Grafana dashboard and alerts: value of the label ``release`` by
    which the Prometheus operator selects PodMonitors and rules. Default: no metrics."""

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
