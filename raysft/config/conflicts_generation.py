"""Generation during training: what it needs."""

from __future__ import annotations

from collections.abc import Iterator

from raysft.config.config import Config


def step_generation(config: Config) -> Iterator[str]:
    """Yield what speaks against ``generate.every_steps``."""
    every = config.generate.every_steps
    if every is None:
        return
    named = f"generate.every_steps={every}"
    if config.stage == "pt":
        yield f"{named} generates answers in conversations, but stage=pt trains on raw text; remove it, or set stage=sft"
    elif not config.generate.enabled:
        yield f"{named} generates during training, but generate.enabled=false; set it to true, or remove every_steps"
    elif not config.generates:
        yield f"{named} needs prompts, but there is no evaluation data; set data.eval, data.holdout or generate.sources"
