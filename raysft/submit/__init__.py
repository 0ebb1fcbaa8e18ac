"""Send a run to a cluster: as a job of Ray's Jobs API, or to Kubernetes; follow it, look at it and stop it."""
