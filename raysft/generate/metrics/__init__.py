"""Metrics of predictions: ``evaluate`` modules, either the ones in this folder or any other by path or Hub id."""

from __future__ import annotations

from raysft.generate.metrics.loading import BUILTIN_METRICS, check
from raysft.generate.metrics.rows import MetricRow, ModelRole, flat_results, write_metrics, write_step_metrics
from raysft.generate.metrics.scoring import score, score_labelled

__all__ = [
    "BUILTIN_METRICS",
    "MetricRow",
    "ModelRole",
    "check",
    "flat_results",
    "score",
    "score_labelled",
    "write_metrics",
    "write_step_metrics",
]
