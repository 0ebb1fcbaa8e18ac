"""Apply a job's documents with kubectl, which knows the cluster and who asks."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Callable

from raysft.config import Config
from raysft.errors import RequestError, one_line
from raysft.submit.kubernetes.documents import render
from raysft.submit.kubernetes.names import job_name, kubectl_command

REQUEST_SECONDS = 30
"""How long the cluster may take to answer one request."""
COMMAND_SECONDS = 300
"""How long kubectl may take in all; it makes one request for each document and several to get to know the cluster."""
ENDED = ("Complete", "Failed", "ValidationFailed")
_REMEDIES = (
    (
        ("forbidden",),
        "kubectl may not do this",
        "ask for the right, or use cluster.namespace or a context where you have it",
    ),
    (
        ("no matches for kind", "doesn't have a resource type"),
        "the cluster does not know all kinds of objects",
        "install KubeRay's operator 1.7 or newer (RayJob), and the Prometheus operator for cluster.prometheus",
    ),
    (
        (
            "current-context",
            "no configuration",
            "no context exists",
            "refused",
            "unable to connect",
            "no such host",
            "timeout",
        ),
        "kubectl reaches no cluster",
        "choose one with kubectl config use-context, and try kubectl get nodes",
    ),
    (("unauthorized", "logged in"), "the cluster does not know you", "log in, and try kubectl get nodes"),
    (("unknown field",), "the cluster has an older KubeRay", "install KubeRay's operator and its CRDs, 1.7 or newer"),
)
"""Words in kubectl's messages, in lower case; what they mean; what to do."""


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
    namespace = ["--namespace", config.cluster.namespace] if config.cluster.namespace else []
    fields = "jsonpath={.metadata.name} {.status.jobDeploymentStatus}"
    found = _kubectl("get", "rayjob", name, *namespace, "--ignore-not-found", "--output", fields).split()
    if found:
        status = found[1] if len(found) > 1 else "new"
        if status in ENDED:
            raise RequestError(
                f"RayJob {name} has ended ({status}), and Kubernetes keeps it; to go on from the newest checkpoint, run "
                f"{kubectl_command(config, f'delete rayjob {name}')}, then the same command"
            )
        notify(f"RayJob {name} is there already ({status})")
        return name
    # Applied by the server: kubectl alone would copy the document into an annotation, which holds less than a ConfigMap.
    for line in _kubectl("apply", "--server-side", *namespace, "--filename", "-", given=text).splitlines():
        notify(line)
    return name


def _kubectl(verb: str, *arguments: str, given: str | None = None) -> str:
    """Run kubectl and return what it prints."""
    program = shutil.which("kubectl")
    if program is None:
        raise RequestError(
            "kubectl is not installed, but raysft starts jobs on Kubernetes with it; install it, or write the documents "
            "with --render FILE and apply them elsewhere"
        )
    command = [program, verb, f"--request-timeout={REQUEST_SECONDS}s", *arguments]
    try:
        done = subprocess.run(
            command, input=given, capture_output=True, text=True, timeout=COMMAND_SECONDS, check=False
        )
    except subprocess.TimeoutExpired:
        raise RequestError(
            f"kubectl {verb} had no answer after {COMMAND_SECONDS} seconds; try kubectl get nodes, then the same command again"
        ) from None
    if done.returncode:
        raise RequestError(_refusal(verb, done.stderr))
    return done.stdout


def _refusal(verb: str, stderr: str) -> str:
    """Describe in one line why kubectl failed; its last line says it."""
    lines = [line for line in stderr.splitlines() if line.strip()] or ["no message"]
    last, lower = one_line(lines[-1], length=300), stderr.lower()
    for words, meaning, remedy in _REMEDIES:
        if any(word in lower for word in words):
            return f"{meaning} ({last}); {remedy}"
    return f"kubectl {verb} failed ({last}); correct what it names, then run the same command again"
