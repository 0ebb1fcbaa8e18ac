"""Generation by vLLM as ``ray.data.llm`` runs it: what it is told of a model, the requests, and what comes back."""

from __future__ import annotations

import contextlib
import logging
import math
import os
from collections.abc import AsyncIterator, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import ray
import ray.data
from transformers import AutoConfig, GenerationConfig

from raysft.config import Config
from raysft.errors import RequestError
from raysft.generate.engine_pool import Pool
from raysft.generate.engines.context_window import fit, limit, positions_of
from raysft.generate.engines.model import padding_token, stop_tokens
from raysft.generate.engines.sampling import prompt_seed
from raysft.models.adapter_files import adapter_base, read_adapter_config
from raysft.models.loading import generation_config
from raysft.models.remote_code import runs_code
from raysft.models.tokenizer import tokenizer_of
from raysft.storage.local_cache import model_copy

IN_FLIGHT = 1024
"""Prompts that an engine has at once, where there are so many: vLLM runs up to 1024 of them together on a large GPU."""
LORA_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)
"""What vLLM takes as the largest rank of an adapter."""
_FOREIGN_TO_LORA = (
    "use_dora", "modules_to_save", "rank_pattern", "alpha_pattern", "lora_bias", "target_parameters", "layer_replication",
    "trainable_token_indices",
)  # fmt: skip
"""What an adapter's description may ask for and vLLM refuses, or does not even read."""
_COLUMNS = ("id", "cut", "generated_text", "generated_tokens", "time_taken_llm", "__inference_error__")


@dataclass(frozen=True)
class VllmModel:
    """A model as vLLM is told of it; nothing of its weights is loaded here."""

    source: str
    """Where the model, or the adapter, is for every node."""
    folder: Path
    """Where it is here, and on every node once it has fetched it."""
    base: Path | None
    """The model that an adapter sits on; None: ``folder`` is a whole model."""
    rank: int
    """The rank of the adapter; 0 without one."""
    stops: list[int]
    padding: int
    """A token that stands for a prompt of none."""
    positions: int | None

    @classmethod
    def of(cls, config: Config, model: str, ends: Sequence[int] = ()) -> VllmModel:
        """Look into a model's folder; ``ends``: tokens that end an answer, besides those that it and the config name.

        Raises:
            RequestError: vLLM cannot serve this adapter, or not on so many GPUs.
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
                f"generate.gpus_per_engine={gpus} and the model has {heads} attention heads, which vLLM shares out evenly; "
                f"use a number that divides {heads}"
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
        )


def requests(config: Config, served: VllmModel, prompts: pa.Table) -> pa.Table:
    """Prompts (columns id, input_ids) as the processor takes them: id, cut, tokenized_prompt, sampling_params and, for an
    adapter, model."""
    new_tokens = config.generate.max_new_tokens
    ids, whole = prompts["id"].to_pylist(), prompts["input_ids"].to_pylist()
    kept = [fit(prompt or [served.padding], served.positions, new_tokens) for prompt in whole]
    limits = [limit(prompt, served.positions, new_tokens) for prompt in kept]
    columns = {
        "id": ids,
        "cut": [max(0, len(prompt) - len(short)) for prompt, short in zip(whole, kept, strict=True)],
        "tokenized_prompt": pa.array(kept, pa.list_(pa.int32())),
        "sampling_params": [sampling(config, served, id, most) for id, most in zip(ids, limits, strict=True)],
    }
    if served.base:
        columns["model"] = [str(served.folder)] * len(ids)  # another name than the base's is a LoRA request
    return pa.table(columns)


def sampling(config: Config, served: VllmModel, id: str, new_tokens: int) -> dict[str, Any]:
    """Arguments of vLLM's ``SamplingParams`` for a prompt; the seed is its own, whichever engine it goes to."""
    settings = config.generate
    arguments: dict[str, Any] = {
        "max_tokens": new_tokens,
        "repetition_penalty": settings.repetition_penalty,
        "skip_special_tokens": settings.skip_special_tokens,
        "temperature": 0.0,
    }
    if served.stops:
        arguments["stop_token_ids"] = served.stops
    if settings.do_sample:
        arguments |= {"temperature": settings.temperature, "top_p": settings.top_p, "top_k": settings.top_k}
        arguments["seed"] = prompt_seed(config.run.seed, id)
    return arguments


def processor_config(config: Config, served: VllmModel, pool: Pool, blocks: Sequence[pa.Table]) -> Any:
    """The ``vLLMEngineProcessorConfig`` for a pool of engines and the requests that they get."""
    from ray.data.llm import vLLMEngineProcessorConfig

    size, gpus = config.generate.batch_size, config.generate.gpus_per_engine
    # No more than an engine's share, or the one that is up first would take the prompts of the others.
    together = max(1, min(math.ceil(IN_FLIGHT / size), math.ceil(len(blocks) / pool.engines)))
    engine: dict[str, Any] = {
        "tokenizer": str(served.folder),
        "dtype": config.dtype,
        "seed": config.run.seed,
        "trust_remote_code": runs_code(config, served.folder),
        "tensor_parallel_size": gpus,
        # What is needed and not what the model could: vLLM does not start where its memory cannot hold one such sequence.
        "max_model_len": max(_longest(block) for block in blocks),
        "disable_log_stats": True,
    }
    if gpus > 1:
        # Processes on the actor's node, with the GPUs that the actor reserves: one reservation, as for every engine.
        engine["distributed_executor_backend"] = "mp"
    if served.rank:
        engine |= {"enable_lora": True, "max_lora_rank": next(rank for rank in LORA_RANKS if rank >= served.rank)}
    return vLLMEngineProcessorConfig(
        model_source=str(served.base or served.folder),
        engine_kwargs=engine,
        batch_size=size,
        concurrency=(pool.engines, pool.engines),
        max_concurrent_batches=together,
        max_tasks_in_flight_per_actor=together,
        should_continue_on_error=True,
        log_engine_metrics=False,
        # Prompts come as tokens, and the engine itself makes text of what it wrote.
        chat_template_stage=False,
        tokenize_stage=False,
        detokenize_stage=False,
    )


def completed(
    config: Config, served: VllmModel, prompts: Sequence[pa.Table], pool: Pool, restarts: int
) -> ray.data.Dataset:
    """A dataset of what vLLM wrote after the prompts, in blocks of ``generate.batch_size``; ``entries`` reads it.

    Args:
        prompts: batches with the columns id and input_ids.
        restarts: how often an engine whose process died is started again.
    """
    from ray.data.llm import build_processor

    blocks = [requests(config, served, batch) for batch in prompts]
    # The steps around the engine move columns only, and would have to wait for a CPU that somebody else has.
    free = {"num_cpus": 0}
    with _silent():
        processor = build_processor(
            processor_config(config, served, pool, blocks), preprocess_map_kwargs=free, postprocess_map_kwargs=free
        )
    stage = processor.get_stage_by_name("vLLMEngineStage")
    stage.fn = on_its_node(stage.fn, served.source)
    # Ray Data's own choice is without end: an engine killed for its memory would be started for ever.
    stage.map_batches_kwargs |= {"num_cpus": pool.cpus, "max_restarts": restarts, "max_task_retries": -1}
    return processor(ray.data.from_arrow(list(blocks))).select_columns(list(_COLUMNS), num_cpus=0)


@contextlib.contextmanager
def _silent() -> Iterator[None]:
    """Without the log of a processor that is built: it initialises Ray once more, which says so and logs more from then on."""
    ray_log, before = logging.getLogger("ray"), logging.root.manager.disable
    level = ray_log.level
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(before)
        ray_log.setLevel(level)


def on_its_node(stage: type[Any], source: str) -> type[Any]:
    """The stage's class, which first fetches the model to its node, and which fails as data.

    Raised, a failure to start would be printed by Ray, a hundred lines, and reach the driver without its reason.
    """

    class Engine(stage):
        def __init__(self, data_column: str, **settings: Any) -> None:
            os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")  # vLLM would tell its makers of this machine
            self._failure = ""
            try:
                adapter_base(model_copy(source))
                super().__init__(data_column, **settings)
            except Exception as error:
                self._failure, self.data_column = _reason(error), data_column

        async def __call__(self, batch: dict[str, Any]) -> AsyncIterator[dict[str, Any]]:
            if self._failure:
                nothing = {"generated_text": "", "generated_tokens": [], "time_taken_llm": -1.0}
                rows = [{**row, **nothing, "__inference_error__": self._failure} for row in batch[self.data_column]]
                yield {self.data_column: rows}
                return
            async for rows in super().__call__(batch):
                yield rows

    return Engine


def _reason(error: Exception) -> str:
    reason = f"{type(error).__name__}: {error}"
    if "root cause" in reason:  # it was in another process, which wrote it into this one's log
        reason += f" (in worker-*-{os.getpid()}.err of Ray's logs on {ray.util.get_node_ip_address()})"
    return reason


def entries(rows: Sequence[dict[str, Any]], stops: Sequence[int]) -> list[dict[str, Any]]:
    """Rows of ``completed`` as entries ({id, predict, tokens, cut, stop, error, seconds})."""
    seconds = max(0.0, *(float(row["time_taken_llm"]) for row in rows))
    return [_entry(row, stops, seconds) for row in rows]


def _entry(row: dict[str, Any], stops: Sequence[int], seconds: float) -> dict[str, Any]:
    error = f"{' '.join(row['__inference_error__'].split()):.400}"
    tokens = [] if error else list(row["generated_tokens"])
    # The processor does not pass on why a request ended; a token that ends a turn is only ever the last one.
    stop = "error" if error else "eos" if tokens and tokens[-1] in stops else "length"
    text = "" if error else row["generated_text"]
    return {
        "id": row["id"], "predict": text, "tokens": len(tokens), "cut": row["cut"], "stop": stop, "error": error,
        "seconds": seconds,
    }  # fmt: skip


def _longest(requests: pa.Table) -> int:
    """Most positions that a request of these can need."""
    prompts, params = requests["tokenized_prompt"].to_pylist(), requests["sampling_params"].to_pylist()
    return max(len(prompt) + each["max_tokens"] for prompt, each in zip(prompts, params, strict=True))


def _lora_rank(folder: Path) -> int:
    description = read_adapter_config(folder)
    foreign = [key for key in _FOREIGN_TO_LORA if description.get(key)]
    foreign += [f"bias={description['bias']}"] if description.get("bias", "none") != "none" else []
    foreign += [f"peft_type={description.get('peft_type')}"] if description.get("peft_type") != "LORA" else []
    if not foreign and description["r"] > LORA_RANKS[-1]:
        foreign = [f"r={description['r']}"]
    if foreign:
        raise RequestError(
            f"{folder}: vLLM serves no adapter with {foreign[0]}; merge it into its model (raysft export), or set "
            "generate.engine=transformers"
        )
    return int(description["r"])
