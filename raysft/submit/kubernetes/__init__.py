"""Run a config on Kubernetes: the documents of a RayJob, and kubectl to apply them."""

from raysft.submit.kubernetes.documents import documents, render
from raysft.submit.kubernetes.kubectl import submit
from raysft.submit.kubernetes.names import kubectl_command

__all__ = ["documents", "kubectl_command", "render", "submit"]
