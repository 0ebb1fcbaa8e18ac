"""transformers' own generation, batch by batch."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from transformers import (
    AutoTokenizer,
    GenerationConfig,
    LogitsProcessorList,
    RepetitionPenaltyLogitsProcessor,
    StoppingCriteriaList,
)
from transformers.utils import logging as transformers_logging

from raysft.config import Config
from raysft.copies import local_copy
from raysft.generate.engines.interface import Completion
from raysft.generate.engines.model import load_model, runs_code, stop_tokens
from raysft.generate.engines.sampling import RowLimits, RowSampling, uniform_numbers
from raysft.matmul import use_onednn


class TransformersEngine:
    """Static batches through ``model.generate``, padded on the left.

    Greedy: in float32 the text is that of ``model.generate`` on the prompt alone, token for token.
    Sampling: each prompt draws from random numbers of its own, made from ``run.seed`` and its id, so a prediction does
    not depend on the other prompts, their order, the number of engines or a restart. What remains is rounding: the
    logits of a batch of another shape differ in their last digits, and a draw that falls just between two tokens (or a
    greedy tie in bfloat16) can turn on that.
    """

    def __init__(self, config: Config, model: str, threads: int | None = None) -> None:
        transformers_logging.set_verbosity_error()
        transformers_logging.disable_progress_bar()
        if threads:
            torch.set_num_threads(threads)
        model = local_copy(model)
        self._settings = config.generate
        self._seed = config.run.seed
        self._device = torch.device("cuda" if config.scaling.use_gpu else "cpu")
        if self._device.type == "cpu":
            use_onednn()
        self._tokenizer = AutoTokenizer.from_pretrained(
            model, local_files_only=True, trust_remote_code=runs_code(config, Path(model))
        )
        self._model = load_model(config, Path(model), self._device).eval()
        self._stops = stop_tokens(self._tokenizer, self._model, config.generate.stop_tokens)
        padding = self._tokenizer.pad_token_id
        self._padding = padding if padding is not None else (self._stops or [0])[0]
        positions = getattr(self._model.config.get_text_config(), "max_position_embeddings", None)
        self._positions = positions if isinstance(positions, int) and positions > 1 else None

    @torch.inference_mode()
    def complete(self, ids: Sequence[str], prompts: Sequence[Sequence[int]]) -> list[Completion]:
        """Complete a batch, as the interface says."""
        if any(len(prompt) == 0 for prompt in prompts):
            prompts = [prompt if len(prompt) else [self._padding] for prompt in prompts]
        kept = [self._fit(prompt) for prompt in prompts]
        longest = max(len(prompt) for prompt in kept)
        pads = torch.tensor([longest - len(prompt) for prompt in kept])
        rows = torch.tensor([[self._padding] * (longest - len(prompt)) + list(prompt) for prompt in kept])
        mask = (torch.arange(longest)[None, :] >= pads[:, None]).long()
        limits = torch.tensor([self._limit(prompt) for prompt in kept])
        output = self._model.generate(
            input_ids=rows.to(self._device),
            attention_mask=mask.to(self._device),
            generation_config=self._generation(int(limits.max())),
            logits_processor=self._processors(ids, pads, longest),
            stopping_criteria=StoppingCriteriaList([RowLimits(limits.to(self._device), longest)]),
        )
        written = output[:, longest:].tolist()
        return [
            self._completion(tokens[:limit], limit, cut=len(prompt) - len(short))
            for tokens, limit, prompt, short in zip(written, limits.tolist(), prompts, kept, strict=True)
        ]

    def _fit(self, prompt: Sequence[int]) -> Sequence[int]:
        """The prompt, or its tail where prompt and answer are more than the model has positions for."""
        if self._positions is None:
            return prompt
        # At most half of the positions are given to the answer at the cost of the prompt.
        room = self._positions - min(self._settings.max_new_tokens, self._positions // 2)
        return prompt[-room:] if len(prompt) > room else prompt

    def _limit(self, prompt: Sequence[int]) -> int:
        """Tokens that may follow a prompt."""
        if self._positions is None:
            return self._settings.max_new_tokens
        return min(self._settings.max_new_tokens, self._positions - len(prompt))

    def _by_beam(self, of_rows: torch.Tensor) -> torch.Tensor:
        """[rows] → [rows · beams], as a beam search holds them."""
        return of_rows.repeat_interleave(self._settings.num_beams).to(self._device)

    def _generation(self, new_tokens: int) -> GenerationConfig:
        # Always "greedy" for transformers: sampling is the last processor, which leaves one token to choose.
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

    def _processors(self, ids: Sequence[str], pads: torch.Tensor, longest: int) -> LogitsProcessorList:
        processors = LogitsProcessorList()
        if self._settings.repetition_penalty != 1.0:
            # Padding is no token that was used; often it is the stop token, which a penalty would keep from coming.
            penalty = self._settings.repetition_penalty
            processors.append(RepetitionPenaltyLogitsProcessor(penalty, prompt_ignore_length=self._by_beam(pads)))
        if self._settings.do_sample:
            uniforms = torch.stack([uniform_numbers(self._seed, id, self._settings.max_new_tokens) for id in ids])
            processors.append(RowSampling(self._settings, uniforms.to(self._device), longest))
        return processors

    def _completion(self, tokens: list[int], limit: int, cut: int) -> Completion:
        end = next((at for at, token in enumerate(tokens) if token in self._stops), None)
        text = str(self._tokenizer.decode(tokens[:end], skip_special_tokens=self._settings.skip_special_tokens))
        if end is not None:
            return Completion(text, tokens=end + 1, cut=cut, stop="eos")
        return Completion(text, tokens=len(tokens), cut=cut, stop="length" if len(tokens) >= limit else "time")
