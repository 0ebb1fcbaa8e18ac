"""Engines: what completes tokenized prompts, behind one small interface."""

from __future__ import annotations

from raysft.config import Config
from raysft.generate.engines.interface import Completion, Engine

__all__ = ["Completion", "Engine", "create_engine"]


def create_engine(config: Config, model: str, threads: int | None = None) -> Engine:
    """The engine that ``generate.engine`` names, with the model loaded.

    Args:
        model: folder of a Hugging Face model, or of a peft adapter.
        threads: threads to compute with; default: torch's own choice.
    """
    from raysft.generate.engines.static import TransformersEngine

    engines = {"transformers": TransformersEngine}
    return engines[config.generate.engine](config, model, threads)
