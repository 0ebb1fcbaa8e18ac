"""The private parts of transformers' continuous batching that raysft uses, in one place;
``tests/contracts/test_continuous_batching.py`` checks that they exist."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from transformers import LogitsProcessorList
from transformers.generation.configuration_utils import ContinuousBatchingConfig
from transformers.generation.continuous_batching import ContinuousBatchingManager
from transformers.generation.continuous_batching.cb_logits_processors import (
    ContinuousBatchingLogitsProcessor,
    ContinuousBatchingLogitsProcessorList,
)
from transformers.generation.continuous_batching.requests import GenerationOutput
from transformers.generation.continuous_batching.utils import find_head_dim, find_num_key_value_heads

__all__ = [
    "ContinuousBatchingConfig",
    "ContinuousBatchingLogitsProcessor",
    "ContinuousBatchingManager",
    "GenerationOutput",
    "cache_width",
    "create_manager",
    "drop_manager",
    "fatal_error",
    "steps_done",
]


def create_manager(
    model: Any,
    generation: Any,
    config: ContinuousBatchingConfig,
    processors: Sequence[ContinuousBatchingLogitsProcessor],
) -> ContinuousBatchingManager:
    """Return a manager that applies these logits processors; those of ``generation`` have no use for a request's own numbers."""
    manager = model.init_continuous_batching(generation, config)
    manager.logit_processor = ContinuousBatchingLogitsProcessorList(LogitsProcessorList(processors))  # pyright: ignore
    manager.logit_processor.tensors_required = len(processors)
    return manager


def drop_manager(model: Any) -> None:
    """Let a model forget its manager. The public way waits for the manager's thread, which may never end."""
    model._cached_continuous_batching_manager = None


def fatal_error(manager: ContinuousBatchingManager) -> BaseException | None:
    """Return the error that ended the manager's thread."""
    return manager.background_thread_status.fatal_error


def steps_done(manager: ContinuousBatchingManager) -> int:
    """Return the number of the manager's current step; -1 before the first one."""
    return getattr(manager, "current_batch", -1)


def cache_width(text_config: Any) -> int:
    """Return the number of values that the cache holds for a token."""
    return 2 * text_config.num_hidden_layers * find_num_key_value_heads(text_config) * find_head_dim(text_config)
