"""Run a config elsewhere: on Kubernetes."""
