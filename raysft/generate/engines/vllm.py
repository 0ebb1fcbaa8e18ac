"""Generation with vLLM through ``ray.data.llm``: describe the model, build requests, read results."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import logging
import math
import os
from collections.abc import AsyncIterator, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import ray
import ray.data
from transformers import AutoConfig, GenerationConfig

from raysft.config import Config
from raysft.data.types import TokenizedMedium
from raysft.errors import RequestError
from raysft.generate.engine_pool import Pool
from raysft.generate.engines.context_window import fit, limit
from raysft.generate.engines.media import ImageWords, kept_media, opened, processor_folder
from raysft.generate.engines.model import padding_token, stop_tokens
from raysft.generate.engines.sampling import prompt_seed
from raysft.generate.prompts import MEDIA, media_of
from raysft.media.files import Unreadable
from raysft.models.adapter_files import adapter_base, read_adapter_config
from raysft.models.loading import generation_config
from raysft.models.processor import load_processor
from raysft.models.remote_code import runs_code
from raysft.models.rope_scaling import positions_of
from raysft.models.tokenizer import tokenizer_of
from raysft.storage.local_cache import model_copy

IN_FLIGHT = 1024
"""Most prompts that an engine holds at once: vLLM runs up to 1024 together on a large GPU."""
LORA_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)
"""Values that vLLM accepts as the largest rank of an adapter."""
_UNSUPPORTED_IN_LORA = (
    "use_dora", "modules_to_save", "rank_pattern", "alpha_pattern", "lora_bias", "target_parameters", "layer_replication",
    "trainable_token_indices",
)  # fmt: skip
"""Keys of adapter_config.json that vLLM refuses or ignores."""
_COLUMNS = ("id", "cut", "generated_text", "generated_tokens", "time_taken_llm", "__inference_error__")

_NOTHING = {"generated_text": "", "generated_tokens": [], "time_taken_llm": -1.0}
"""What a request that failed has generated."""


@dataclass(frozen=True)
class VllmModel:
    """What vLLM needs to know about a model; no weights are loaded."""

    source: str
    """Location of the model or adapter, for every node."""
    folder: Path
    """Its folder here, and on every node that has downloaded it."""
    base: Path | None
    """Base model of an adapter; None if ``folder`` is a full model."""
    rank: int
    """Rank of the adapter; 0 without one."""
    stops: list[int]
    padding: int
    """Token that replaces an empty prompt."""
    positions: int | None
    runs_code: bool = False
    """True if code that comes with the model may run."""

    @classmethod
    def of(cls, config: Config, model: str, ends: Sequence[int] = ()) -> VllmModel:
        """Inspect a model's folder; ``ends`` are tokens that end an answer, besides those of the model and the config.

        Raises:
            RequestError: vLLM cannot serve this adapter, or not on this number of GPUs.
        """
        folder = model_copy(model)
        base = adapter_base(folder)
        whole, trusted = base or folder, runs_code(config, folder)
        tokenizer = tokenizer_of(config, folder)
        description = AutoConfig.from_pretrained(whole, local_files_only=True, trust_remote_code=trusted)
        heads, gpus = (
            getattr(description.get_text_config(), "num_attention_heads", None),
            config.generate.gpus_per_engine,
        )
        if heads and heads % gpus:
            raise RequestError(
                f"vLLM needs a number of GPUs that divides the model's {heads} attention heads, but "
                f"generate.gpus_per_engine={gpus}; use a divisor of {heads}"
            )
        if (getattr(description.get_text_config(), "rope_parameters", None) or {}).get("rope_type") == "dynamic":
            raise RequestError(
                f"generate.engine=vllm applies the same dynamic RoPE scaling of {model} to texts of any length, unlike "
                "training; use generate.engine=transformers, or model.rope_scaling=yarn"
            )
        generation = generation_config(folder, whole) or GenerationConfig.from_model_config(description)
        stops = stop_tokens(tokenizer, generation, config.generate.stop_tokens, ends)
        return cls(
            source=model,
            folder=folder.absolute(),
            base=base.absolute() if base else None,
            rank=_lora_rank(folder) if base else 0,
            stops=stops,
            padding=padding_token(tokenizer, stops, description),
            positions=positions_of(description),
            runs_code=trusted,
        )

    @functools.cached_property
    def images(self) -> ImageWords:
        """What the model's chat template writes for images."""
        return ImageWords(load_processor(processor_folder(self.folder), self.runs_code))


def requests(config: Config, vllm_model: VllmModel, prompts: pa.Table) -> pa.Table:
    """Convert prompts (columns id, input_ids and perhaps media) into the processor's columns: id, cut, tokenized_prompt,
    sampling_params, for an adapter model, and for prompts with images media and positions, the number of their tokens."""
    new_tokens = config.generate.max_new_tokens
    ids, whole, media = prompts["id"].to_pylist(), prompts["input_ids"].to_pylist(), media_of(prompts)
    kept = [fit(prompt or [vllm_model.padding], vllm_model.positions, new_tokens) for prompt in whole]
    if media:
        pairs = [kept_media(*each) for each in zip(whole, kept, media, strict=True)]
        kept, media = [prompt or [vllm_model.padding] for prompt, _ in pairs], [images for _, images in pairs]
    limits = [limit(prompt, vllm_model.positions, new_tokens) for prompt in kept]
    columns = {
        "id": ids,
        "cut": [max(0, len(prompt) - len(short)) for prompt, short in zip(whole, kept, strict=True)],
        "tokenized_prompt": pa.array(kept, pa.list_(pa.int32())),
        "sampling_params": [sampling(config, vllm_model, id, most) for id, most in zip(ids, limits, strict=True)],
    }
    if media:
        shown = [
            vllm_model.images.collapsed(prompt, images) if images else prompt
            for prompt, images in zip(kept, media, strict=True)
        ]
        described = [[asdict(each) for each in images] for images in media]
        columns |= {
            "tokenized_prompt": pa.array(shown, pa.list_(pa.int32())),
            "media": pa.array(described, prompts[MEDIA].type),
            "positions": list(map(len, kept)),
        }
    if vllm_model.base:
        columns["model"] = [str(vllm_model.folder)] * len(
            ids
        )  # a name other than the base model's makes it a LoRA request
    return pa.table(columns)


def sampling(config: Config, vllm_model: VllmModel, id: str, new_tokens: int) -> dict[str, Any]:
    """Build the arguments of vLLM's ``SamplingParams`` for a prompt; its seed does not depend on the engine."""
    settings = config.generate
    arguments: dict[str, Any] = {
        "max_tokens": new_tokens,
        "repetition_penalty": settings.repetition_penalty,
        "skip_special_tokens": settings.skip_special_tokens,
        "temperature": 0.0,
    }
    if vllm_model.stops:
        arguments["stop_token_ids"] = vllm_model.stops
    if settings.do_sample:
        arguments |= {"temperature": settings.temperature, "top_p": settings.top_p, "top_k": settings.top_k}
        arguments["seed"] = prompt_seed(config.run.seed, id)
    return arguments


def processor_config(config: Config, vllm_model: VllmModel, pool: Pool, blocks: Sequence[pa.Table]) -> Any:
    """Build the ``vLLMEngineProcessorConfig`` for a pool of engines and their requests."""
    from ray.data.llm import vLLMEngineProcessorConfig

    size, gpus = config.generate.batch_size, config.generate.gpus_per_engine
    # At most an equal part per engine; otherwise the first engine to start would take the prompts of the others.
    together = max(1, min(math.ceil(IN_FLIGHT / size), math.ceil(len(blocks) / pool.engines)))
    engine: dict[str, Any] = {
        "tokenizer": str(vllm_model.folder),
        "dtype": config.dtype,
        "seed": config.run.seed,
        "trust_remote_code": runs_code(config, vllm_model.folder),
        "tensor_parallel_size": gpus,
        # What these requests need, not what the model supports: vLLM refuses to start if one such sequence exceeds its memory.
        "max_model_len": max(_longest(block) for block in blocks),
        "disable_log_stats": True,
    }
    if "media" in blocks[0].column_names:
        engine["limit_mm_per_prompt"] = {"image": max(_most_images(block) for block in blocks)}
    if gpus > 1:
        # Processes on the actor's node use the GPUs that the actor reserves: one reservation, as for every engine.
        engine["distributed_executor_backend"] = "mp"
    if vllm_model.rank:
        engine |= {"enable_lora": True, "max_lora_rank": next(rank for rank in LORA_RANKS if rank >= vllm_model.rank)}
    return vLLMEngineProcessorConfig(
        model_source=str(vllm_model.base or vllm_model.folder),
        engine_kwargs=engine,
        batch_size=size,
        concurrency=(pool.engines, pool.engines),
        max_concurrent_batches=together,
        max_tasks_in_flight_per_actor=together,
        should_continue_on_error=True,
        log_engine_metrics=False,
        # Prompts are tokens already, and the engine detokenizes.
        chat_template_stage=False,
        tokenize_stage=False,
        detokenize_stage=False,
    )


def completed(
    config: Config, vllm_model: VllmModel, prompts: Sequence[pa.Table], pool: Pool, restarts: int
) -> ray.data.Dataset:
    """Build a dataset of vLLM's completions in blocks of ``generate.batch_size``; ``entries`` reads it.

    Args:
        prompts: batches with the columns id and input_ids, and perhaps media.
        restarts: how often an engine is restarted after its process died.
    """
    from ray.data.llm import build_processor

    blocks = [requests(config, vllm_model, batch) for batch in prompts]
    # The steps around the engine only move columns; they should not wait for a CPU.
    free = {"num_cpus": 0}
    with _silent():
        processor = build_processor(
            processor_config(config, vllm_model, pool, blocks), preprocess_map_kwargs=free, postprocess_map_kwargs=free
        )
    stage = processor.get_stage_by_name("vLLMEngineStage")
    adapt(stage, vllm_model.source, pool, restarts)
    return processor(ray.data.from_arrow(list(blocks))).select_columns(list(_COLUMNS), num_cpus=0)


def adapt(stage: Any, source: str, pool: Pool, restarts: int) -> None:
    """Let a stage of Ray download the model to each node, and reserve for each engine what the pool says."""
    stage.fn = on_each_node(stage.fn, source)
    # In place and last: whenever a field is assigned, the stage sets the GPUs again, also for vLLM's build for CPUs.
    stage.map_batches_kwargs.update(
        num_cpus=pool.cpus,
        num_gpus=pool.gpus,
        # Ray Data restarts without limit by default: an engine killed for its memory would restart forever.
        max_restarts=restarts,
        max_task_retries=-1,
    )


@contextlib.contextmanager
def _silent() -> Iterator[None]:
    """Silence the construction of a processor, which initialises Ray again and raises its log level."""
    ray_log, before = logging.getLogger("ray"), logging.root.manager.disable
    level = ray_log.level
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(before)
        ray_log.setLevel(level)


def on_each_node(stage: type[Any], source: str) -> type[Any]:
    """Subclass a stage so that it downloads the model to its node first, and returns a failure as data.

    Ray would print an exception in a hundred lines, and it would reach the driver without its reason.
    """

    class Engine(stage):
        def __init__(self, data_column: str, **settings: Any) -> None:
            os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")  # vLLM would report this machine to its makers
            self._failure = ""
            try:
                adapter_base(model_copy(source))
                super().__init__(data_column, **settings)
            except Exception as error:
                self._failure, self.data_column = _reason(error), data_column

        async def __call__(self, batch: dict[str, Any]) -> AsyncIterator[dict[str, Any]]:
            if self._failure:
                rows = [{**row, **_NOTHING, "__inference_error__": self._failure} for row in batch[self.data_column]]
                yield {self.data_column: rows}
                return
            rows = list(batch[self.data_column])
            if any("media" in row for row in rows):
                await asyncio.to_thread(add_images, rows)  # others generate meanwhile
            async for found in super().__call__({**batch, self.data_column: rows}):
                for row in found[self.data_column]:
                    row.pop("multimodal_data", None)  # of one that failed
                yield found

    return Engine


def add_images(rows: Sequence[dict[str, Any]]) -> None:
    """Read the images of requests, in place; one whose image cannot be used gets an error instead."""
    for row in rows:
        media = row.pop("media", None)
        if media is None or not len(media):
            continue
        try:
            row["multimodal_data"] = {"image": [opened(TokenizedMedium(**each)) for each in media]}
        except Unreadable as error:
            row.update(_NOTHING, __inference_error__=str(error))


def _reason(error: Exception) -> str:
    reason = f"{type(error).__name__}: {error}"
    if "root cause" in reason:  # it happened in another process, which wrote to this one's log
        reason += f" (in worker-*-{os.getpid()}.err of Ray's logs on {ray.util.get_node_ip_address()})"
    return reason


def entries(rows: Sequence[dict[str, Any]], stops: Sequence[int]) -> list[dict[str, Any]]:
    """Convert rows of ``completed`` to entries ({id, predict, tokens, cut, stop, error, seconds})."""
    seconds = max(0.0, *(float(row["time_taken_llm"]) for row in rows))
    return [_entry(row, stops, seconds) for row in rows]


def _entry(row: dict[str, Any], stops: Sequence[int], seconds: float) -> dict[str, Any]:
    error = f"{' '.join(row['__inference_error__'].split()):.400}"
    tokens = [] if error else list(row["generated_tokens"])
    # The processor drops the reason why a request ended; an end-of-turn token can only be the last one.
    stop = "error" if error else "eos" if tokens and tokens[-1] in stops else "length"
    text = "" if error else row["generated_text"]
    return {
        "id": row["id"], "predict": text, "tokens": len(tokens), "cut": row["cut"], "stop": stop, "error": error,
        "seconds": seconds,
    }  # fmt: skip


def _longest(requests: pa.Table) -> int:
    """Largest number of positions that one of these requests can need."""
    params = requests["sampling_params"].to_pylist()
    if "positions" in requests.column_names:  # images take more than the one token that stands for each
        lengths = requests["positions"].to_pylist()
    else:
        lengths = map(len, requests["tokenized_prompt"].to_pylist())
    return max(length + each["max_tokens"] for length, each in zip(lengths, params, strict=True))


def _most_images(requests: pa.Table) -> int:
    """Largest number of images of one of these requests."""
    return max(len(media) for media in requests["media"].to_pylist())


def _lora_rank(folder: Path) -> int:
    description = read_adapter_config(folder)
    unsupported = [key for key in _UNSUPPORTED_IN_LORA if description.get(key)]
    unsupported += [f"bias={description['bias']}"] if description.get("bias", "none") != "none" else []
    unsupported += [f"peft_type={description.get('peft_type')}"] if description.get("peft_type") != "LORA" else []
    if not unsupported and description["r"] > LORA_RANKS[-1]:
        unsupported = [f"r={description['r']}"]
    if unsupported:
        raise RequestError(
            f"{folder}: vLLM does not support adapters with {unsupported[0]}; merge it into its model (raysft export), or "
            "set generate.engine=transformers"
        )
    return int(description["r"])
