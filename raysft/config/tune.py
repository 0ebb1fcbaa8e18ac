"""The ``tune`` section."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field

from raysft.config.section import Positive, Section


class TuneSection(Section):
    space: dict[str, Annotated[list[Any], Field(min_length=1)]] = {}
    """Dotted config key → values to try; every combination is one trial."""
    metric: str = "eval_loss"
    """Result to compare trials by: a key of ``all_results.json``."""
    mode: Literal["min", "max"] = "min"
    """Whether the smallest or the largest value is best."""
    max_concurrent: Positive | None = None
    """Trials at the same time. Default: as many as the cluster can place."""
