"""Continuous batching of transformers: when a prediction ends, another prompt takes its place."""

from __future__ import annotations

import itertools
import logging
import math
import time
import traceback
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

import torch
from peft import PeftModel

from raysft.config import Config
from raysft.generate.engines.base import ModelEngine, cpu_cache_bytes
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
from raysft.generate.engines.interface import Completion, Media, failure
from raysft.generate.engines.sampling import RequestPenalty, RequestSampling, uniform_numbers
from raysft.models.transformers_internals import supports_flash_attention

STALL_SECONDS = 600.0
"""Seconds without a step or a result after which generation fails; the first step may compile kernels."""
STOP_SECONDS = 30.0
"""Seconds that the thread gets to stop."""
CPU_STEP_TOKENS = 512
"""Tokens of one step on a CPU, where attention is computed between all of them, across prompts."""
CPU_PAGE_TOKENS = 32
"""Tokens of a page of the cache on a CPU; on a GPU the kernels need the 256 of transformers."""
RESERVE = 1.25
"""Pages per page needed: with less than 15% free, transformers accepts no further prompt."""
TRIAL_TOKENS, TRIAL_PAGES = 8, 8
TRIAL = ("The capital of France is Paris, and the capital of Germany is", "Once upon a time there was")


@dataclass(frozen=True)
class Request:
    """A prompt with its limits."""

    tokens: list[int]
    limit: int
    """Most new tokens."""
    stops: list[int]
    """Tokens that end it; [-1] for none."""


class ContinuousEngine(ModelEngine):
    """Complete any number of prompts, at most ``generate.batch_size`` at once.

    Predictions equal those of static batches: token for token if greedy in float32, and with the same random numbers if sampled.
    """

    def __init__(self, config: Config, *arguments: Any, **options: Any) -> None:
        super().__init__(config, *arguments, **options)
        # Adapters are inside the layers; generation does not need the wrapper around the model.
        self._inner: Any = self._model.get_base_model() if isinstance(self._model, PeftModel) else self._model
        half = self._inner.dtype in (torch.bfloat16, torch.float16)
        if self._device.type == "cuda" and half and supports_flash_attention(self._inner) and find_spec("flash_attn"):
            self._inner.set_attn_implementation("flash_attention_2")
        # The caller receives the errors and reports them once.
        logging.getLogger("ContinuousBatchingLogger").setLevel(logging.CRITICAL)
        self._sampling = RequestSampling(config.generate)
        self._manager: ContinuousBatchingManager | None = None
        self._pages = 0
        self._broken: Exception | None = None
        self._calls = itertools.count()

    @property
    def steps(self) -> int:
        """The number of the current step."""
        manager = self._manager
        return steps_done(manager) if manager is not None else -1

    def complete(self, ids: Sequence[str], prompts: Sequence[Sequence[int]], media: Media = ()) -> list[Completion]:
        """Complete prompts, without images.

        Raises:
            TimeoutError: no progress for ``STALL_SECONDS``; every later call fails as well.
            Exception: the error that ended the generating thread, and with it all prompts.
        """
        assert not any(media), "continuous batching in transformers does not support images"
        call, stops = next(self._calls), self._stops or [-1]
        kept = [list(self._fit(prompt)) for prompt in prompts]
        # Unique names, so that the remains of a failed call are not taken for results of the next one.
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
        """Complete two sentences and compare with the model's own logits; returns what is wrong, or an empty string."""
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
                return f"its tokens differ from those of the model alone ({found[name].error or tokens})"
        return ""

    @torch.no_grad()
    def _is_likely(self, prompt: list[int], tokens: list[int]) -> bool:
        """True if each token is the most probable one up to rounding, within half the standard deviation of the logits."""
        row = torch.tensor([prompt + tokens], device=self._device)
        logits = self._inner(row).logits[0, len(prompt) - 1 : -1].float()
        chosen = logits.gather(-1, row[0, len(prompt) :, None])[:, 0]
        return bool((logits.max(-1).values - chosen < 0.5 * logits.std(-1) + 1e-6).all())

    def _ready(self, requests: Mapping[str, Request]) -> ContinuousBatchingManager:
        """Return the manager of earlier calls if its cache is large enough, else a new one."""
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
        """Number of pages that a step with the longest requests needs."""
        longest = max(len(request.tokens) + request.limit for request in requests.values())
        pages = math.ceil(longest / CPU_PAGE_TOKENS)
        at_once = min(self._settings.batch_size, len(requests))
        return max(pages, min(math.ceil(at_once * pages * RESERVE), self._most_pages())) + 1

    def _most_pages(self) -> int:
        text = self._inner.config.get_text_config()
        per_token = cache_width(text) + CPU_STEP_TOKENS
        page = per_token * self._inner.dtype.itemsize * CPU_PAGE_TOKENS
        return int(cpu_cache_bytes(self._engines_per_node) / page)

    def _cache(self, pages: int) -> ContinuousBatchingConfig:
        size = self._settings.batch_size
        # On a GPU, take the free memory but for a fifth, which holds the logits.
        sizes: dict[str, Any] = {"max_memory_percent": 0.8}
        if self._device.type == "cpu":
            step = max(CPU_STEP_TOKENS, size)
            sizes = {"num_blocks": pages, "page_size": CPU_PAGE_TOKENS, "max_batch_tokens": step}
        if self._settings.repetition_penalty != 1.0:
            sizes |= {"use_async_batching": False, "use_cuda_graph": False}
        # With auto_switch_to_flash, transformers would download a kernel that is not installed.
        return ContinuousBatchingConfig(max_requests_per_batch=size, auto_switch_to_flash=False, **sizes)

    def _run(self, manager: ContinuousBatchingManager, requests: Mapping[str, Request]) -> dict[str, GenerationOutput]:
        """Run requests to their end. The thread is stopped afterwards, because the process cannot exit while it runs."""
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
            # The frames of the traceback hold the cache.
            fatal.add_note("".join(traceback.format_tb(fatal.__traceback__)))
            raise fatal.with_traceback(None)
        return found

    def _drop(self) -> None:
        self._manager, self._pages = None, 0
        drop_manager(self._inner)


def gather(manager: ContinuousBatchingManager, names: Collection[str]) -> dict[str, GenerationOutput]:
    """Wait for the results of requests.

    Raises:
        TimeoutError: neither a step nor a result for ``STALL_SECONDS`` seconds.
        RuntimeError: the thread has ended.
    """
    found: dict[str, GenerationOutput] = {}
    steps, progressed = -1, time.monotonic()
    while len(found) < len(names):
        alive = manager.is_running()
        result = manager.get_result(timeout=0.5)
        if result is not None:
            if result.request_id in names and result.is_finished():
                found[result.request_id] = result
            continue
        missing = f"{len(names) - len(found)} of {len(names)} predictions"
        if not alive:
            fatal = fatal_error(manager)
            raise RuntimeError(f"continuous batching ended without {missing} ({fatal or 'no reason given'})")
        if (step := steps_done(manager)) != steps:
            steps, progressed = step, time.monotonic()
        elif time.monotonic() - progressed > STALL_SECONDS:
            raise TimeoutError(
                f"continuous batching made no progress in {STALL_SECONDS:g} s while waiting for {missing}"
            )
    return found
