"""The verb that a config asks for."""

from __future__ import annotations

from typing import Literal

from raysft.config.config import Config
from raysft.errors import RequestError


def verb_of(config: Config) -> Literal["run", "tune", "evaluate", "generate"]:
    """The verb that a config asks for.

    Raises:
        RequestError: it asks for two.
    """
    if config.tune.space:
        return "tune"
    evaluated, generates = config.evaluate.model, config.generate.model
    if evaluated is not None and generates is not None:
        raise RequestError(
            f"a command either evaluates or generates, but evaluate.model={evaluated} and generate.model={generates} are both "
            "set; set one to null, and do the other afterwards"
        )
    return "evaluate" if evaluated is not None else "generate" if generates is not None else "run"
