"""What a verb can do with a config, judged by the config alone: also where nothing else is imported, as in ``raysft submit``."""

from __future__ import annotations

from typing import Literal

from raysft.config import Config
from raysft.errors import RequestError

Verb = Literal["run", "check", "prepare", "train", "evaluate", "generate", "tune"]
TRAINS_ONE: tuple[Verb, ...] = ("run", "check", "prepare", "train")
"""Verbs that train one run, or show what that would do."""
TRAINS: tuple[Verb, ...] = (*TRAINS_ONE, "tune")


def check_verb(config: Config, verb: Verb) -> None:
    """Refuse a config that the verb cannot use."""
    model, evaluated = config.generate.model, config.evaluate.model
    if evaluated is not None and (verb in TRAINS or (verb == "generate" and model is None)):
        instead = "set generate.model" if verb == "generate" else "remove evaluate.model"
        raise RequestError(
            f"raysft {verb} uses the trained model, but evaluate.model={evaluated}; {instead}, or use raysft evaluate"
        )
    if verb in ("run", "check", "tune") and model is not None:
        raise RequestError(
            f"raysft {verb} generates with the model that it trains, but generate.model={model}; remove generate.model, or use "
            "raysft generate"
        )
    if verb == "evaluate" and not (config.data.eval or config.data.holdout):
        raise RequestError("there is nothing to evaluate on; set data.eval, or data.holdout above 0")
    if verb == "generate" and config.stage != "sft":
        raise RequestError(f"raysft generate needs conversations, but stage={config.stage}; set stage=sft")
    if verb == "generate" and not config.generate.enabled:
        raise RequestError("raysft generate needs generate.enabled, but generate.enabled=false; set it to true")
    if verb == "generate" and not config.generates:
        raise RequestError("there is nothing to generate for; set data.eval, data.holdout or generate.sources")
