"""Base class of the transformers engines: a loaded model, and prompts that fit into its positions."""

from __future__ import annotations

import os
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import torch
from transformers import GenerationConfig
from transformers.utils import logging as transformers_logging

from raysft.config import Config
from raysft.garbage import resume_collection
from raysft.generate.engines.context_window import fit, limit
from raysft.generate.engines.interface import Completion
from raysft.generate.engines.model import load_model, padding_token, stop_tokens
from raysft.models.onednn import pack_linear, use_onednn
from raysft.models.remote_code import runs_code
from raysft.models.rope_scaling import positions_of
from raysft.models.tokenizer import tokenizer_of
from raysft.storage.local_cache import model_copy

CPU_MEMORY_SHARE = 0.25
"""Largest share of a node's memory that the caches of its engines may take together on CPUs."""
LIMITS = (Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"))
"""Files with the most bytes that this container may take, of both versions of control groups; Ray reads the same."""


def memory_bytes(limits: Sequence[Path] = LIMITS) -> int:
    """Bytes of the machine's memory that this container may take."""
    found = [os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")]
    for file in limits:
        with suppress(OSError, ValueError):  # there is none, or it says "max"
            found.append(int(file.read_text(encoding="ascii")))
    return min(found)


def cpu_cache_bytes(engines_per_node: int) -> float:
    """Bytes that the cache of one of this many engines may take on a CPU."""
    return memory_bytes() * CPU_MEMORY_SHARE / engines_per_node


class ModelEngine:
    """A transformers model in this process, with its tokenizer.

    Args:
        model: folder of a Hugging Face model, or of a peft adapter.
        threads: number of threads; default: torch's own choice.
        ends: tokens that end an answer, besides those of the model and the config.
        engines_per_node: number of engines that share the memory of this node.
    """

    def __init__(
        self,
        config: Config,
        model: str,
        threads: int | None = None,
        ends: Sequence[int] = (),
        engines_per_node: int = 1,
    ) -> None:
        transformers_logging.set_verbosity_error()
        transformers_logging.disable_progress_bar()
        if threads:
            torch.set_num_threads(threads)
        folder = model_copy(model)
        self._settings = config.generate
        self._seed = config.run.seed
        self._engines_per_node = engines_per_node
        self._device = torch.device("cuda" if config.scaling.use_gpu else "cpu")
        if self._device.type == "cpu":
            use_onednn()
        self._tokenizer = tokenizer_of(config, folder)
        resume_collection()
        self._model = load_model(config, folder, self._device).eval()
        self._runs_code = runs_code(config, folder)
        if self._device.type == "cpu" and config.dtype == "float32" and not self._runs_code:
            pack_linear(self._model, self._settings.batch_size * self._settings.num_beams)
        self._stops = stop_tokens(self._tokenizer, self._model.generation_config, config.generate.stop_tokens, ends)
        self._padding = padding_token(self._tokenizer, self._stops, self._model.config)
        self._positions = positions_of(self._model.config)

    def _fit(self, prompt: Sequence[int]) -> Sequence[int]:
        """Return the prompt or its tail; an empty prompt becomes one padding token."""
        return fit(prompt if len(prompt) else [self._padding], self._positions, self._settings.max_new_tokens)

    def _limit(self, prompt: Sequence[int]) -> int:
        """Number of tokens that may follow a prompt that fits."""
        return limit(prompt, self._positions, self._settings.max_new_tokens)

    def _generation(self, new_tokens: int) -> GenerationConfig:
        # Greedy for transformers, because our own processor samples: it leaves one token to choose from.
        return GenerationConfig(
            max_new_tokens=new_tokens,
            do_sample=False,
            num_beams=self._settings.num_beams,
            length_penalty=self._settings.length_penalty,
            max_time=self._settings.max_seconds,
            eos_token_id=self._stops or None,
            pad_token_id=self._padding,
            use_cache=True,
        )

    def _completion(self, tokens: list[int], limit: int, prompt: Sequence[int], kept: Sequence[int]) -> Completion:
        cut = max(0, len(prompt) - len(kept))
        end = next((at for at, token in enumerate(tokens) if token in self._stops), None)
        text = str(self._tokenizer.decode(tokens[:end], skip_special_tokens=self._settings.skip_special_tokens))
        if end is not None:
            return Completion(text, tokens=end + 1, cut=cut, stop="eos")
        return Completion(text, tokens=len(tokens), cut=cut, stop="length" if len(tokens) >= limit else "time")
