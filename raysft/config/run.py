"""The ``run`` section."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field, field_validator

from raysft.config.section import Name, Section, Text, known_scheme


class RunSection(Section):
    name: Name = "run"
    """Name of the run directory inside ``run.storage``. Default: the config file's name without its ending."""
    storage: Text = "runs"
    """Folder that holds run directories and the cache: a path that every node of the cluster sees, or a URI (``s3://``,
    ``gs://``, ``hdfs://``, ``abfs://``; options as ``?region=…``). Of a run in an object store this machine keeps the small
    files in ``~/.cache/raysft/runs`` while it works on it."""
    seed: Annotated[int, Field(ge=0, lt=2**32, strict=True)] = 0
    """Seed of the data order, adapter initialisation, dropout and sampling. The same seed gives the same numbers."""

    @field_validator("storage")
    @classmethod
    def _storage_is_known(cls, value: str) -> str:
        return known_scheme(value)
