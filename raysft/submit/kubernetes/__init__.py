"""Run a config on Kubernetes: the documents of a RayJob, and kubectl to apply and follow them."""

from raysft.submit.kubernetes.documents import documents, render
from raysft.submit.kubernetes.follow import follow_to_end
from raysft.submit.kubernetes.names import kubectl_command
from raysft.submit.kubernetes.start import submit

__all__ = ["documents", "follow_to_end", "kubectl_command", "render", "submit"]
