"""The ``tune`` section."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field

from raysft.config.section import Positive, Section


class TuneSection(Section):
    """The sweep of raysft tune."""

    space: dict[str, Annotated[list[Any], Field(min_length=1)]] = {}
    """Config key → list of values to try, for example ``{train.learning_rate: [1.0e-4, 2.0e-4]}``. Each combination is a trial."""
    metric: str = "eval_loss"
    """Result that trials are compared by: a key of ``all_results.json``."""
    mode: Literal["min", "max"] = "min"
    """``min``: the lowest value is best; ``max``: the highest."""
    max_concurrent: Positive | None = None
    """Maximum number of trials that run at the same time. Default: as many as the cluster can place."""
