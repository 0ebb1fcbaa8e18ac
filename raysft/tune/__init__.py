"""Sweeps: whole runs with different config values, through Ray Tune."""

from raysft.tune.sweep import tune

__all__ = ["tune"]
