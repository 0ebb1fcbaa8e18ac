"""Engines: what completes tokenized prompts, behind one small interface."""

from __future__ import annotations

import gc
import importlib.util
import sys
from collections.abc import Sequence

from raysft.config import Config
from raysft.errors import RequestError
from raysft.generate.engines.batching import batching, refused
from raysft.generate.engines.interface import Completion, Engine
from raysft.storage.local_cache import model_copy

__all__ = ["Completion", "Engine", "batching", "check_engine", "check_suitable", "create_engine"]


def check_engine(config: Config) -> None:
    """Find out before anything starts that the engine is not installed.

    Raises:
        RequestError: ``generate.engine=vllm``, and there is no vLLM.
    """
    if config.generate.engine == "vllm" and importlib.util.find_spec("vllm") is None:
        raise RequestError(
            "generate.engine=vllm and vLLM is not installed; pip install 'raysft[vllm]' on every node, or set "
            "generate.engine=transformers"
        )


def check_suitable(config: Config, model: str) -> None:
    """Find out before anything starts what of ``generate`` does not go with a model.

    Args:
        model: folder of a Hugging Face model, or of a peft adapter; or where one is.

    Raises:
        RequestError: its tokenizer has not a token of ``generate.stop_tokens``, or ``generate.batching=continuous`` is not for it.
    """
    settings = config.generate
    if settings.engine == "transformers" and settings.batching == "continuous":
        batching(config, model)
    if settings.stop_tokens:
        from raysft.generate.engines.model import named_tokens
        from raysft.models.tokenizer import tokenizer_of

        named_tokens(tokenizer_of(config, model_copy(model)), settings.stop_tokens)


def create_engine(config: Config, model: str, threads: int | None = None, ends: Sequence[int] = ()) -> Engine:
    """The engine of transformers that ``generate.batching`` names, with the model loaded; vLLM's is made by
    ``raysft.generate.engines.vllm``.

    Args:
        model: folder of a Hugging Face model, or of a peft adapter.
        threads: threads to compute with; default: torch's own choice.
        ends: tokens that end an answer, besides those that the model and the config name.

    Raises:
        RequestError: ``generate.batching=continuous`` does not go with the model.
    """
    from raysft.generate.engines.static import TransformersEngine

    if batching(config, model) == "static":
        return TransformersEngine(config, model, threads, ends)
    from raysft.generate.engines.continuous import ContinuousEngine

    engine = ContinuousEngine(config, model, threads, ends)
    reason = engine.trial()
    if not reason:
        return engine
    if config.generate.batching == "continuous":
        raise refused(model, reason)
    print(f"generate: static batches, because continuous ones do not work with {model}: {reason}", file=sys.stderr)
    del engine
    gc.collect()
    return TransformersEngine(config, model, threads, ends)
