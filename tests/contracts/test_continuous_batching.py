"""transformers' continuous batching: its manager, its thread and its logits processors."""

from __future__ import annotations

import inspect

from transformers import LlamaConfig
from transformers.generation.configuration_utils import ContinuousBatchingConfig
from transformers.generation.continuous_batching import ContinuousBatchingManager, continuous_api
from transformers.generation.continuous_batching.cb_logits_processors import (
    ContinuousBatchingLogitsProcessor,
    ContinuousBatchingLogitsProcessorList,
)
from transformers.generation.continuous_batching.requests import GenerationOutput, RequestState

from raysft.generate.engines.continuous_internals import cache_width
from tests.contracts.contract import Contract

INTERNALS = Contract("transformers", "raysft/generate/engines/continuous_internals.py")
ENGINE = Contract("transformers", "raysft/generate/engines/continuous.py")
SAMPLING = Contract("transformers", "raysft/generate/engines/sampling.py")


def test_a_manager_takes_requests_and_says_what_became_of_them():
    ENGINE.parameters(
        ENGINE.name(ContinuousBatchingManager, "add_request"), ["request_id", "max_new_tokens", "eos_token_id"]
    )
    ENGINE.parameters(ENGINE.name(ContinuousBatchingManager, "get_result"), ["timeout"])
    ENGINE.parameters(
        ENGINE.name(ContinuousBatchingManager, "stop", "manager.stop("),
        ["timeout", "keep_for_next_session", "hard_stop"],
        "manager.stop(",
    )
    for method in ("start", "warmup", "is_running"):
        ENGINE.name(ContinuousBatchingManager, method, f"{method}()")
    for field in ("request_id", "generated_tokens", "error"):
        assert field in GenerationOutput.__annotations__, f"look at {ENGINE.line(field)}"
    ENGINE.name(GenerationOutput, "is_finished")


def test_the_manager_can_be_looked_into():
    source = inspect.getsource(continuous_api)
    assert "self.fatal_error =" in source, f"look at {INTERNALS.line('fatal_error')}"
    INTERNALS.source(ContinuousBatchingManager, "self.background_thread_status =", "background_thread_status")
    INTERNALS.source(ContinuousBatchingManager, "self.current_batch += 1", "current_batch")
    INTERNALS.source(ContinuousBatchingManager, "self.logit_processor =", "logit_processor =")
    assert "_cached_continuous_batching_manager" in source, (
        f"look at {INTERNALS.line('_cached_continuous_batching_manager')}"
    )
    mixin = continuous_api.ContinuousMixin
    INTERNALS.positional(INTERNALS.name(mixin, "init_continuous_batching"), 3)


def test_a_cache_has_the_size_that_it_is_told():
    ENGINE.parameters(
        ContinuousBatchingConfig,
        ["max_memory_percent", "num_blocks", "max_batch_tokens", "max_requests_per_batch", "use_async_batching",
         "use_cuda_graph", "page_size", "auto_switch_to_flash"],
    )  # fmt: skip
    config = LlamaConfig(hidden_size=32, num_attention_heads=4, num_key_value_heads=2, num_hidden_layers=3)
    assert cache_width(config) == 2 * 3 * 2 * 8


def test_logits_processors_get_the_requests_that_have_a_new_token():
    SAMPLING.parameters(
        SAMPLING.name(ContinuousBatchingLogitsProcessor, "prepare_tensor_args"), ["requests_with_new_token"]
    )
    SAMPLING.positional(SAMPLING.name(ContinuousBatchingLogitsProcessor, "fill_defaults"), 2)
    for name in ("supported_kwargs", "ignored_kwargs"):
        assert name in ContinuousBatchingLogitsProcessor.__annotations__, f"look at {SAMPLING.line(name)}"
    for name in ("request_id", "position_offset", "initial_tokens", "generated_tokens"):
        assert name in inspect.getsource(RequestState), f"RequestState.{name}; look at {SAMPLING.line(name)}"
    INTERNALS.source(ContinuousBatchingLogitsProcessorList, "self.tensors_required", "tensors_required")
