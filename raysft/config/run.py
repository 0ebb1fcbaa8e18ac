"""The ``run`` section."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field, field_validator

from raysft.config.section import Name, Section, Text, known_scheme


class RunSection(Section):
    """Name, storage and seed of a run."""

    name: Name = "run"
    """Name of the run directory inside ``run.storage``. Default: the name of the config file without its extension."""
    sweep: Name | None = None
    """Name of the sweep that this run is a trial of; ``raysft tune`` sets it to the sweep's ``run.name``. Trackers show its
    trials together: as a group in W&B, SwanLab and trackio, under a parent run in MLflow."""
    storage: Text = "runs"
    """Folder for run directories and the cache: a path that every node of the cluster can access, or a URI (``s3://``,
    ``gs://``, ``hdfs://``, ``abfs://``; with options such as ``?region=…``). While a run in an object store is active, this
    machine keeps its small files in ``~/.cache/raysft/runs``."""
    seed: Annotated[int, Field(ge=0, lt=2**32, strict=True)] = 0
    """Seed for data order, adapter initialization, dropout and sampling. The same seed gives the same numbers."""

    @field_validator("storage")
    @classmethod
    def _storage_is_known(cls, value: str) -> str:
        return known_scheme(value)
