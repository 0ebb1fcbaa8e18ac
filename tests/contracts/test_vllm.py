"""vLLM, and the stages by which ``ray.data.llm`` runs it."""

from __future__ import annotations

import inspect

import pytest

from tests.contracts.contract import Contract

ENGINE = Contract("ray", "raysft/generate/engines/vllm.py")


def test_ray_data_runs_vllm_in_a_stage_that_can_be_changed():
    from ray.data.llm import build_processor, vLLMEngineProcessorConfig
    from ray.llm._internal.batch.processor.base import Processor
    from ray.llm._internal.batch.stages import vllm_engine_stage

    ENGINE.parameters(build_processor, ["preprocess_map_kwargs", "postprocess_map_kwargs"])
    ENGINE.positional(ENGINE.name(Processor, "get_stage_by_name"), 2)
    stage = vllm_engine_stage.vLLMEngineStage
    ENGINE.line(f'"{stage.__name__}"')
    fields = getattr(stage, "model_fields", None) or stage.__fields__
    for name in ("fn", "map_batches_kwargs"):
        assert name in fields, f"look at {ENGINE.line(f'stage.{name}')}"
    udf = vllm_engine_stage.vLLMEngineStageUDF
    ENGINE.positional(udf.__call__, 2, "super().__call__(batch)")
    assert "data_column" in inspect.signature(udf).parameters, f"look at {ENGINE.line('data_column')}"
    source = inspect.getsource(vllm_engine_stage)
    for column in ("tokenized_prompt", "sampling_params", "generated_text", "generated_tokens", "time_taken_llm",
                   "multimodal_data", "__inference_error__"):  # fmt: skip
        assert column in source, f"column {column}; look at {ENGINE.line(column)}"
    options = set(vLLMEngineProcessorConfig.model_fields)
    for name in ("model_source", "engine_kwargs", "batch_size", "concurrency", "max_concurrent_batches",
                 "max_tasks_in_flight_per_actor", "should_continue_on_error", "log_engine_metrics"):  # fmt: skip
        assert name in options, f"vLLMEngineProcessorConfig.{name}; look at {ENGINE.line(f'{name}=')}"


def test_vllm_takes_the_arguments_of_an_engine_and_of_a_request():
    vllm = pytest.importorskip("vllm", reason="vLLM is not installed")
    contract = Contract("vllm", ENGINE.module)
    contract.parameters(
        vllm.SamplingParams,
        [
            "max_tokens",
            "repetition_penalty",
            "skip_special_tokens",
            "temperature",
            "stop_token_ids",
            "top_p",
            "top_k",
            "seed",
        ],
        "SamplingParams",
    )
    from vllm.engine.arg_utils import AsyncEngineArgs

    for name in ("tokenizer", "dtype", "seed", "trust_remote_code", "tensor_parallel_size", "max_model_len",
                 "disable_log_stats", "distributed_executor_backend", "enable_lora", "max_lora_rank",
                 "limit_mm_per_prompt"):  # fmt: skip
        assert name in AsyncEngineArgs.__dataclass_fields__, f"look at {contract.line(name)}"
