"""Start the job of a config on Kubernetes, once: the same config finds the job that runs."""

from __future__ import annotations

from collections.abc import Callable

from raysft.config import Config
from raysft.errors import RequestError
from raysft.submit.kubernetes.documents import render
from raysft.submit.kubernetes.kubectl import kubectl, namespace_option
from raysft.submit.kubernetes.names import job_name, kubectl_command
from raysft.submit.kubernetes.ray_job_state import ENDED


def submit(config: Config, notify: Callable[[str], None]) -> str:
    """Start the job of a config, or find the one that runs.

    Args:
        config: the config.
        notify: receives lines for the user.

    Returns:
        The name of the RayJob.

    Raises:
        RequestError: the config cannot run there, kubectl is missing or reaches no cluster, the cluster refuses, or the job has
            already ended.
    """
    text, name = render(config), job_name(config)
    namespace = namespace_option(config.cluster.namespace)
    fields = "jsonpath={.metadata.name} {.status.jobDeploymentStatus}"
    found = kubectl("get", "rayjob", name, *namespace, "--ignore-not-found", "--output", fields).split()
    if found:
        status = found[1] if len(found) > 1 else "new"
        if status in ENDED:
            raise RequestError(
                f"RayJob {name} has ended ({status}), and Kubernetes keeps it; to resume from the newest checkpoint, run "
                f"{kubectl_command(config, f'delete rayjob {name}')}, then the same command"
            )
        notify(f"RayJob {name} already exists ({status})")
        return name
    # Applied by the server: kubectl alone would copy the document into an annotation, which holds less than a ConfigMap.
    for line in kubectl("apply", "--server-side", *namespace, "--filename", "-", given=text).splitlines():
        notify(line)
    return name
