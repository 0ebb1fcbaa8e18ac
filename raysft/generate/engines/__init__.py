"""Engines: what completes tokenized prompts, behind one small interface."""

from __future__ import annotations

import gc
import sys

from raysft.config import Config
from raysft.generate.engines.batching import batching, refused
from raysft.generate.engines.interface import Completion, Engine

__all__ = ["Completion", "Engine", "batching", "create_engine"]


def create_engine(config: Config, model: str, threads: int | None = None) -> Engine:
    """The engine that ``generate.engine`` and ``generate.batching`` name, with the model loaded.

    Args:
        model: folder of a Hugging Face model, or of a peft adapter.
        threads: threads to compute with; default: torch's own choice.

    Raises:
        RequestError: ``generate.batching=continuous`` does not go with the model.
    """
    from raysft.generate.engines.static import TransformersEngine

    if batching(config, model) == "static":
        return TransformersEngine(config, model, threads)
    from raysft.generate.engines.continuous import ContinuousEngine

    engine = ContinuousEngine(config, model, threads)
    reason = engine.trial()
    if not reason:
        return engine
    if config.generate.batching == "continuous":
        raise refused(model, reason)
    print(f"generate: static batches, because continuous ones do not work with {model}: {reason}", file=sys.stderr)
    del engine
    gc.collect()
    return TransformersEngine(config, model, threads)
