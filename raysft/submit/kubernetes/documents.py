"""The objects of Kubernetes that run a config. Pure."""

from __future__ import annotations

import json
import re
from typing import Any

import yaml

from raysft.config import Config
from raysft.config.yaml_text import Dumper
from raysft.submit.kubernetes.names import JOB_LABEL, config_text, job_name, kubectl_command, metadata
from raysft.submit.kubernetes.ray_job import ray_job
from raysft.submit.kubernetes.refusals import refuse
from raysft.submit.kubernetes.sizes import worker_pods
from raysft.submit.request import CONFIG_NAME
from raysft.telemetry.dashboard import alerts, dashboard

SHARED_NAME = "raysft-monitoring"
"""Name of the dashboard and of the alerts."""
_NO_TEXT = re.compile(
    r"[-+]?(\.[0-9]+|[0-9][0-9_]*\.?[0-9_]*)([eE][-+]?[0-9]+)?|[-+]?0[xX][0-9a-fA-F_]+|[-+]?0[oObB]?[0-7_]+|[yYnN]|\d{4}-\d.*"
)
"""Text that is a number, a truth value or a date for kubectl, though not for PyYAML, unless it is quoted."""
Document = dict[str, Any]


def documents(config: Config) -> list[Document]:
    """Return the documents of a job: its config, storage, protection and metrics where asked for, and the RayJob.

    Raises:
        RequestError: the config cannot run in the pods that its ``cluster`` section describes.
    """
    pods = worker_pods(config)
    refuse(config, pods)
    optional = [_claim(config), _disruption_budget(config), *_monitoring(config)]
    return [_config_map(config), *(one for one in optional if one), ray_job(config, pods)]


def render(config: Config) -> str:
    """Return the documents as YAML, below a comment that says how to use them.

    Raises:
        RequestError: as ``documents``.
    """
    name = job_name(config)
    given = documents(config)
    kinds = ",".join(one["kind"].lower() for one in given if JOB_LABEL in one["metadata"].get("labels", {}))
    header = (
        f"# kubectl apply --server-side -f FILE             start: KubeRay 1.7 or newer makes a Ray cluster and runs raysft on it\n"
        f"# {kubectl_command(config, f'get rayjob {name}')}\n"
        f"# {kubectl_command(config, f'delete {kinds} -l {JOB_LABEL}={name}')}\n"
    )
    texts = [yaml.dump(one, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=1 << 16) for one in given]
    return header + "---\n".join(texts)


def _config_map(config: Config) -> Document:
    name = job_name(config)
    return {
        "apiVersion": "v1",
        "kind": "ConfigMap",
        "metadata": metadata(config, name, **{JOB_LABEL: name}),
        "immutable": True,
        "data": {CONFIG_NAME: config_text(config)},
    }


def _claim(config: Config) -> Document | None:
    volume = config.cluster.volume
    if not (volume.claim and volume.size):
        return None
    spec: dict[str, Any] = {
        "accessModes": [volume.access_mode],
        "resources": {"requests": {"storage": volume.size}},
    }
    if volume.storage_class:
        spec["storageClassName"] = volume.storage_class
    # Without the job's label, as it holds the run and stays.
    return {
        "apiVersion": "v1",
        "kind": "PersistentVolumeClaim",
        "metadata": metadata(config, volume.claim),
        "spec": spec,
    }


def _disruption_budget(config: Config) -> Document:
    """Keep the head from being evicted when somebody drains its node: the run would end."""
    name = job_name(config)
    labels = {JOB_LABEL: name, "ray.io/node-type": "head"}
    return {
        "apiVersion": "policy/v1",
        "kind": "PodDisruptionBudget",
        "metadata": metadata(config, name, **{JOB_LABEL: name}),
        # Not maxUnavailable, for which Kubernetes asks the pods' owner how many there should be; a RayCluster cannot tell.
        "spec": {"minAvailable": 1, "selector": {"matchLabels": labels}},
    }


def _monitoring(config: Config) -> list[Document]:
    """Return what Prometheus collects, which is the job's, and dashboard and alerts, which all jobs share."""
    release = config.cluster.prometheus
    if not release:
        return []
    shown = {
        "apiVersion": "v1",
        "kind": "ConfigMap",
        # The label by which Grafana's sidecar finds dashboards.
        "metadata": metadata(config, SHARED_NAME, grafana_dashboard="1"),
        "data": {"raysft.json": json.dumps(dashboard())},
    }
    rules = {
        "apiVersion": "monitoring.coreos.com/v1",
        "kind": "PrometheusRule",
        "metadata": metadata(config, SHARED_NAME, release=release),
        "spec": alerts(),
    }
    return [_pod_monitor(config, release), shown, rules]


def _pod_monitor(config: Config, release: str) -> Document:
    name = job_name(config)
    relabelings = [
        {"action": "replace", "sourceLabels": [f"__meta_kubernetes_pod_label_{label}"], "targetLabel": label}
        for label in ("ray_io_cluster", "ray_io_node_type", "ray_io_group")
    ]
    return {
        "apiVersion": "monitoring.coreos.com/v1",
        "kind": "PodMonitor",
        "metadata": metadata(config, name, **{JOB_LABEL: name, "release": release}),
        "spec": {
            "selector": {"matchLabels": {JOB_LABEL: name}},
            "podMetricsEndpoints": [{"port": "metrics", "relabelings": relabelings}],
        },
    }


class _Dumper(Dumper):
    """Writes text of several lines as such, and repeats what occurs twice instead of naming it; kubectl reads the same."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


def _text(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    style = '"' if "\x85" in text else "|" if "\n" in text else "'" if _NO_TEXT.fullmatch(text) else None
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=style)


_Dumper.add_representer(str, _text)
