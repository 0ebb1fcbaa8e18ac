"""Predictions of a model for prompts, as a job over the cluster, and their metrics."""
