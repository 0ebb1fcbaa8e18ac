"""A job's config as text, and the names and labels of its objects. Pure."""

from __future__ import annotations

import hashlib
import re

from raysft.config import Config
from raysft.config.yaml_text import dump

NAME_LENGTH = 47
"""Most characters of a RayJob's name: KubeRay adds to it, and a label has 63."""
JOB_LABEL = "raysft.io/job"
"""Label of everything that belongs to one job and can be deleted with it."""


def config_text(config: Config) -> str:
    """Return the config as YAML that loads as the same config: what differs from the defaults, and the run's name."""
    settings = config.model_dump(mode="json", exclude_defaults=True)
    # A config without a name would take that of its file.
    settings["run"] = {"name": config.run.name, **settings.pop("run", {})}
    ordered = {key: settings[key] for key in type(config).model_fields if key in settings}
    return dump(ordered)


def job_name(config: Config) -> str:
    """Name of the RayJob: of the run, in the letters that Kubernetes allows, and of the config's content.

    Any change of the config makes another job, while the same config finds its job again.

    >>> from raysft.config import parse
    >>> config = parse({"run": {"name": "My_run.2"}, "model": {"path": "m"}, "data": {"train": [{"name": "a", "path": "a"}]}})
    >>> job_name(config).rpartition("-")[0]
    'raysft-my-run-2'
    """
    digest = hashlib.sha256(config_text(config).encode()).hexdigest()[:8]
    slug = re.sub(r"[^a-z0-9]+", "-", config.run.name.lower())[: NAME_LENGTH - len("raysft--") - len(digest)].strip("-")
    return f"raysft-{slug}-{digest}" if slug else f"raysft-{digest}"


def kubectl_command(config: Config, words: str) -> str:
    """Return a command for the job's namespace."""
    return f"kubectl {words}" + (f" --namespace {config.cluster.namespace}" if config.cluster.namespace else "")


def metadata(config: Config, name: str, **labels: str) -> dict[str, object]:
    """Metadata of an object with a name."""
    namespace = {"namespace": config.cluster.namespace} if config.cluster.namespace else {}
    return {"name": name, **namespace, "labels": {"app.kubernetes.io/name": "raysft", **labels}}
