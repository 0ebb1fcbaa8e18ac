"""kubectl, which knows the cluster and who asks."""

from __future__ import annotations

import shutil
import subprocess

from raysft.errors import RequestError, one_line

REQUEST_SECONDS = 30
"""How long the cluster may take to answer one request."""
COMMAND_SECONDS = 300
"""How long kubectl may take in all; it makes one request for each document and several to get to know the cluster."""
_REMEDIES = (
    (
        ("forbidden",),
        "kubectl is not allowed to do this",
        "ask for permission, or use cluster.namespace or a context where you have it",
    ),
    (
        ("no matches for kind", "doesn't have a resource type"),
        "the cluster does not know all resource types",
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
        "kubectl cannot reach a cluster",
        "choose one with kubectl config use-context, and try kubectl get nodes",
    ),
    (
        ("unauthorized", "logged in"),
        "the cluster does not recognize your credentials",
        "log in, and try kubectl get nodes",
    ),
    (("unknown field",), "the cluster has an older KubeRay", "install KubeRay's operator and its CRDs, 1.7 or newer"),
)
"""Words in kubectl's messages, in lower case; what they mean; what to do."""


class KubectlFailed(RequestError):
    """kubectl had no answer, or a refusal."""

    def __init__(self, text: str, reason: str) -> None:
        super().__init__(text)
        self.reason = reason
        """kubectl's own last line."""


def namespace_option(namespace: str | None) -> list[str]:
    """The option for a namespace; none for that of the current context."""
    return ["--namespace", namespace] if namespace else []


def program() -> str:
    """Path of kubectl.

    Raises:
        RequestError: it is not installed.
    """
    path = shutil.which("kubectl")
    if path is None:
        raise RequestError(
            "kubectl is not installed, but raysft needs it to start jobs on Kubernetes; install it, or write the manifests "
            "with --render FILE and apply them elsewhere"
        )
    return path


def kubectl(verb: str, *arguments: str, given: str | None = None) -> str:
    """Run kubectl and return what it prints.

    Raises:
        RequestError: kubectl is missing.
        KubectlFailed: it reaches no cluster, or the cluster refuses.
    """
    command = [program(), verb, f"--request-timeout={REQUEST_SECONDS}s", *arguments]
    try:
        done = subprocess.run(
            command,
            input=given,
            capture_output=True,
            encoding="utf-8",
            errors="replace",
            timeout=COMMAND_SECONDS,
            check=False,
        )
    except subprocess.TimeoutExpired:
        raise KubectlFailed(
            f"kubectl {verb} did not respond within {COMMAND_SECONDS} seconds; try kubectl get nodes, then the same command "
            "again",
            f"kubectl did not respond within {COMMAND_SECONDS} seconds",
        ) from None
    if done.returncode:
        raise _refusal(verb, done.stderr)
    return done.stdout


def _refusal(verb: str, stderr: str) -> KubectlFailed:
    """Describe in one line why kubectl failed; its last line says it."""
    lines = [line for line in stderr.splitlines() if line.strip()] or ["no message"]
    last, lower = one_line(lines[-1], length=300), stderr.lower()
    for words, meaning, remedy in _REMEDIES:
        if any(word in lower for word in words):
            return KubectlFailed(f"{meaning} ({last}); {remedy}", last)
    return KubectlFailed(
        f"kubectl {verb} failed ({last}); correct what it names, then run the same command again", last
    )
