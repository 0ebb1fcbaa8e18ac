"""The ``train.tracking`` section."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from raysft.config.section import Section

Label = Annotated[
    str, Field(pattern=r"^[^\s\x00-\x1f\x7f]([^\x00-\x1f\x7f]*\S)?$", max_length=128, coerce_numbers_to_str=True)
]
"""A name of one line, as people read it."""
Tag = Annotated[
    str, Field(pattern=r"^[^\s\x00-\x1f\x7f]([^\x00-\x1f\x7f]*\S)?$", max_length=64, coerce_numbers_to_str=True)
]


class TrackingSection(Section):
    """Names under which ``train.trackers`` show a run. If a key is not set, the tracker's own environment variable applies
    (``WANDB_PROJECT``, ``MLFLOW_EXPERIMENT_NAME``, …), and then the default."""

    project: Label | None = None
    """Project of W&B, SwanLab and trackio, experiment of MLflow. Default: ``raysft``."""
    run_name: Label | None = None
    """Name of the run; a trial of a sweep adds its own. Default: ``run.name``."""
    tags: Annotated[list[Tag], Field(max_length=30)] = []
    """Tags of W&B and SwanLab, and of MLflow, where ``KEY=VALUE`` is a tag with a value."""
    group: Label | None = None
    """Group of runs in W&B, SwanLab and trackio. Default: the sweep of a trial; otherwise none."""
