"""transformers' continuous batching: where a prediction ends, another prompt takes its place."""

from __future__ import annotations

import itertools
import logging
import math
import os
import time
import traceback
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

import torch
from peft import PeftModel

from raysft.config import Config
from raysft.generate.engines.base import ModelEngine
from raysft.generate.engines.continuous_internals import (
    ContinuousBatchingConfig,
    ContinuousBatchingLogitsProcessor,
    ContinuousBatchingManager,
    GenerationOutput,
    cache_width,
    create_manager,
    drop_manager,
    fatal_error,
    steps_done,
)
from raysft.generate.engines.interface import Completion, failure
from raysft.generate.engines.sampling import RequestPenalty, RequestSampling, uniform_numbers
from raysft.models.transformers_internals import supports_flash_attention

PATIENCE = 600.0
"""Seconds without a step or a result after which generation is given up; the first step may compile kernels."""
STOP_SECONDS = 30.0
"""Seconds that the thread has to end."""
CPU_STEP_TOKENS = 512
"""Tokens of one step on a CPU, where attention is computed between all of them, whatever prompt they belong to."""
CPU_PAGE_TOKENS = 32
"""Tokens of a page of the cache on a CPU; on a GPU the kernels want the 256 of transformers."""
CPU_MEMORY_SHARE = 0.25
"""Most of a machine's memory that the cache may take on a CPU."""
RESERVE = 1.25
"""Pages there are for each that is needed: with less than 15 % free, transformers takes in no further prompt."""
TRIAL_TOKENS, TRIAL_PAGES = 8, 8
TRIAL = ("The capital of France is Paris, and the capital of Germany is", "Once upon a time there was")


@dataclass(frozen=True)
class Request:
    """A prompt as it is handed over."""

    tokens: list[int]
    limit: int
    """Most new tokens."""
    stops: list[int]
    """Tokens that end it; -1: none."""


class ContinuousEngine(ModelEngine):
    """Completes at most ``generate.batch_size`` prompts at once, of as many as it is given.

    The predictions are those of static batches: greedy in float32 token for token, and sampled with the same random numbers.
    """

    def __init__(self, config: Config, model: str, threads: int | None = None, ends: Sequence[int] = ()) -> None:
        super().__init__(config, model, threads, ends)
        # Adapters lie in the layers of the model itself, of which their wrapper knows nothing that generation needs.
        self._inner: Any = self._model.get_base_model() if isinstance(self._model, PeftModel) else self._model
        half = self._inner.dtype in (torch.bfloat16, torch.float16)
        if self._device.type == "cuda" and half and supports_flash_attention(self._inner) and find_spec("flash_attn"):
            self._inner.set_attn_implementation("flash_attention_2")
        # Errors come back to the caller, who says them once.
        logging.getLogger("ContinuousBatchingLogger").setLevel(logging.CRITICAL)
        self._sampling = RequestSampling(config.generate)
        self._manager: ContinuousBatchingManager | None = None
        self._pages = 0
        self._broken: Exception | None = None
        self._calls = itertools.count()

    def complete(self, ids: Sequence[str], prompts: Sequence[Sequence[int]]) -> list[Completion]:
        """Complete prompts, as the interface says.

        Raises:
            TimeoutError: nothing came for ``PATIENCE`` seconds; so does each later call.
            Exception: what ended the thread that generates, for all prompts alike.
        """
        call, stops = next(self._calls), self._stops or [-1]
        kept = [list(self._fit(prompt)) for prompt in prompts]
        # A name of its own for each: what a call left behind when it failed is none of the next one's.
        names = [f"{call}/{index}" for index in range(len(ids))]
        requests = {name: Request(tokens, self._limit(tokens), stops) for name, tokens in zip(names, kept, strict=True)}
        if self._settings.do_sample:
            count = self._settings.max_new_tokens
            uniforms = {name: uniform_numbers(self._seed, id, count) for name, id in zip(names, ids, strict=True)}
            self._sampling.begin(uniforms, {name: len(request.tokens) for name, request in requests.items()})
        found = self._run(self._ready(requests), requests)
        return [
            failure(error)
            if (error := found[name].error) is not None
            else self._completion(found[name].generated_tokens, requests[name].limit, prompt, short)
            for name, prompt, short in zip(names, prompts, kept, strict=True)
        ]

    def trial(self) -> str:
        """Complete two sentences and compare with the model's own logits; gives what is wrong, empty where nothing is."""
        requests = {
            f"trial/{index}": Request(self._tokenizer(text)["input_ids"], TRIAL_TOKENS, [-1])
            for index, text in enumerate(TRIAL)
        }
        cache = self._cache(TRIAL_PAGES)
        cache.num_blocks = TRIAL_PAGES
        try:
            found = self._run(self._create(cache, []), requests)
        except Exception as error:
            return failure(error).error
        finally:
            self._drop()
        for name, request in requests.items():
            tokens = found[name].generated_tokens
            if found[name].error or len(tokens) != TRIAL_TOKENS or not self._is_likely(request.tokens, tokens):
                return f"its tokens are not those of the model on its own ({found[name].error or tokens})"
        return ""

    @torch.no_grad()
    def _is_likely(self, prompt: list[int], tokens: list[int]) -> bool:
        """Whether each token is the most probable one, but for rounding: by less than half the spread of the logits."""
        row = torch.tensor([prompt + tokens], device=self._device)
        logits = self._inner(row).logits[0, len(prompt) - 1 : -1].float()
        chosen = logits.gather(-1, row[0, len(prompt) :, None])[:, 0]
        return bool((logits.max(-1).values - chosen < 0.5 * logits.std(-1) + 1e-6).all())

    def _ready(self, requests: Mapping[str, Request]) -> ContinuousBatchingManager:
        """What runs requests: that of the calls before, where its cache is large enough."""
        # On a GPU the cache is as large as the memory allows.
        pages = self._pages_for(requests) if self._device.type == "cpu" else 0
        if self._manager is None or pages > self._pages:
            self._drop()
            penalty = self._settings.repetition_penalty
            processors: list[ContinuousBatchingLogitsProcessor] = [RequestPenalty(penalty)] if penalty != 1.0 else []
            processors += [self._sampling] if self._settings.do_sample else []
            self._manager, self._pages = self._create(self._cache(pages), processors), pages
            self._manager.warmup()
        return self._manager

    def _create(
        self, cache: ContinuousBatchingConfig, processors: Sequence[ContinuousBatchingLogitsProcessor]
    ) -> ContinuousBatchingManager:
        if self._broken:
            raise self._broken
        generation = self._generation(self._settings.max_new_tokens)
        return create_manager(self._inner, generation, cache, processors)

    def _pages_for(self, requests: Mapping[str, Request]) -> int:
        """Pages that the requests of a step need where they are the longest ones."""
        longest = max(len(request.tokens) + request.limit for request in requests.values())
        pages = math.ceil(longest / CPU_PAGE_TOKENS)
        at_once = min(self._settings.batch_size, len(requests))
        return max(pages, min(math.ceil(at_once * pages * RESERVE), self._most_pages())) + 1

    def _most_pages(self) -> int:
        text = self._inner.config.get_text_config()
        per_token = cache_width(text) + CPU_STEP_TOKENS
        memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") * CPU_MEMORY_SHARE
        return int(memory / (per_token * self._inner.dtype.itemsize * CPU_PAGE_TOKENS))

    def _cache(self, pages: int) -> ContinuousBatchingConfig:
        size = self._settings.batch_size
        # Its own choice for a GPU: what is free of the memory but for a fifth, in which there are logits of each prompt.
        sizes: dict[str, Any] = {"max_memory_percent": 0.8}
        if self._device.type == "cpu":
            step = max(CPU_STEP_TOKENS, size)
            sizes = {"num_blocks": pages, "page_size": CPU_PAGE_TOKENS, "max_batch_tokens": step}
        if self._settings.repetition_penalty != 1.0:
            sizes |= {"use_async_batching": False, "use_cuda_graph": False}
        # A kernel that is not installed would be fetched.
        return ContinuousBatchingConfig(max_requests_per_batch=size, auto_switch_to_flash=False, **sizes)

    def _run(self, manager: ContinuousBatchingManager, requests: Mapping[str, Request]) -> dict[str, GenerationOutput]:
        """The outcome of each request. The thread lives as long as this, for a process does not end while it does."""
        whole = False
        manager.start()
        try:
            for name, request in requests.items():
                manager.add_request(
                    request.tokens, request_id=name, max_new_tokens=request.limit, eos_token_id=request.stops
                )
            found = gather(manager, requests)
            whole = True
        except TimeoutError as error:
            self._broken = error
            raise
        finally:
            manager.stop(timeout=STOP_SECONDS, keep_for_next_session=whole, hard_stop=not whole)
            fatal = fatal_error(manager)
            if fatal or not whole or manager.is_running():
                self._drop()
        if fatal:
            # The frames that it was raised through hold the cache.
            fatal.add_note("".join(traceback.format_tb(fatal.__traceback__)))
            raise fatal.with_traceback(None)
        return found

    def _drop(self) -> None:
        self._manager, self._pages = None, 0
        drop_manager(self._inner)


def gather(manager: ContinuousBatchingManager, wanted: Collection[str]) -> dict[str, GenerationOutput]:
    """Wait for the outcome of requests.

    Raises:
        TimeoutError: neither a step nor a result for ``PATIENCE`` seconds.
        RuntimeError: the thread is gone.
    """
    found: dict[str, GenerationOutput] = {}
    steps, moved = -1, time.monotonic()
    while len(found) < len(wanted):
        lives = manager.is_running()
        result = manager.get_result(timeout=0.5)
        if result is not None:
            if result.request_id in wanted and result.is_finished():
                found[result.request_id] = result
            continue
        waits_for = f"{len(wanted) - len(found)} of {len(wanted)} predictions"
        if not lives:
            fatal = fatal_error(manager)
            raise RuntimeError(f"continuous batching ended and owes {waits_for} ({fatal or 'it did not say why'})")
        if (now_at := steps_done(manager)) != steps:
            steps, moved = now_at, time.monotonic()
        elif time.monotonic() - moved > PATIENCE:
            raise TimeoutError(f"continuous batching made no step in {PATIENCE:g} s; waited for {waits_for}")
    return found
