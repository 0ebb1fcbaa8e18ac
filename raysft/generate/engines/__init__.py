"""Engines that complete tokenized prompts, behind one small interface."""

from __future__ import annotations

import gc
import importlib.metadata
import importlib.util
import sys
from collections.abc import Sequence

from raysft.config import Config
from raysft.errors import RequestError, as_yaml
from raysft.generate.engines.batching import batching, for_images, refused
from raysft.generate.engines.interface import Completion, Engine
from raysft.storage.local_cache import model_copy

__all__ = ["Completion", "Engine", "batching", "check_engine", "check_suitable", "create_engine", "for_images"]


def check_engine(config: Config) -> None:
    """Check that the engine is installed, and built for the processors that the config names.

    Raises:
        RequestError: ``generate.engine=vllm``, but vLLM is missing, or its build is the one for GPUs and there are none, or the
            one for CPUs and there are GPUs.
    """
    if config.generate.engine != "vllm":
        return
    if importlib.util.find_spec("vllm") is None:
        raise RequestError(
            "generate.engine=vllm, but vLLM is not installed; pip install 'raysft[vllm]' on every node, or set "
            "generate.engine=transformers"
        )
    version, use_gpu = importlib.metadata.version("vllm"), config.scaling.use_gpu
    # vLLM itself decides by this part of its version which processors it runs on.
    if ("cpu" in version) == use_gpu:
        needs, lacks = ("GPUs", "CPUs") if not use_gpu else ("CPUs", "GPUs")
        raise RequestError(
            f"generate.engine=vllm with scaling.use_gpu={as_yaml(use_gpu)}, but vLLM {version} is built for {needs}; "
            f"install its build for {lacks} on every node, set scaling.use_gpu={as_yaml(not use_gpu)}, or set "
            "generate.engine=transformers"
        )


def check_suitable(config: Config, model: str) -> None:
    """Check that the settings of ``generate`` suit the model.

    Args:
        model: location of a Hugging Face model or a peft adapter.

    Raises:
        RequestError: the tokenizer lacks a token of ``generate.stop_tokens``, or the model does not support
            ``generate.batching=continuous``.
    """
    settings = config.generate
    if settings.engine == "transformers" and settings.batching == "continuous":
        batching(config, model)
    if settings.stop_tokens:
        from raysft.generate.engines.model import named_tokens
        from raysft.models.tokenizer import tokenizer_of

        named_tokens(tokenizer_of(config, model_copy(model)), settings.stop_tokens)


def create_engine(
    config: Config, model: str, threads: int | None = None, ends: Sequence[int] = (), engines_per_node: int = 1
) -> Engine:
    """Load the model into the transformers engine that ``generate.batching`` names; ``engines.vllm`` builds vLLM's.

    Args:
        model: folder of a Hugging Face model, or of a peft adapter.
        threads: number of threads; default: torch's own choice.
        ends: tokens that end an answer, besides those of the model and the config.
        engines_per_node: number of engines that share the memory of this node.

    Raises:
        RequestError: the model does not support ``generate.batching=continuous``.
    """
    from raysft.generate.engines.static import TransformersEngine

    if batching(config, model) == "static":
        return TransformersEngine(config, model, threads, ends, engines_per_node)
    from raysft.generate.engines.continuous import ContinuousEngine

    engine = ContinuousEngine(config, model, threads, ends, engines_per_node)
    reason = engine.trial()
    if not reason:
        return engine
    if config.generate.batching == "continuous":
        raise refused(model, reason)
    print(f"generate: using static batches, because continuous batching fails with {model}: {reason}", file=sys.stderr)
    del engine
    gc.collect()
    return TransformersEngine(config, model, threads, ends, engines_per_node)
