"""Sweeps: whole runs over a grid of config values, through Ray Tune."""

from raysft.tune.sweep import tune

__all__ = ["tune"]
