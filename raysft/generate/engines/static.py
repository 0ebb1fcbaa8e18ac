"""Static batches with ``model.generate`` of transformers."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
from transformers import LogitsProcessorList, RepetitionPenaltyLogitsProcessor, StoppingCriteriaList

from raysft.generate.engines.base import ModelEngine
from raysft.generate.engines.context_window import longrope_threshold
from raysft.generate.engines.interface import Completion
from raysft.generate.engines.sampling import RowLimits, RowSampling, uniform_numbers
from raysft.generate.engines.shrinking import can_shrink, grow, trial

TRIAL_TOKENS = 8
"""Tokens, and as many padding tokens, of the test whether a model ignores padding."""


class TransformersEngine(ModelEngine):
    """Static batches through ``model.generate``, padded on the left.

    Greedy predictions in float32 equal ``model.generate`` on the prompt alone, token for token. When sampling, each prompt has
    its own random numbers, derived from ``run.seed`` and its id, so that a prediction does not depend on other prompts, their
    order, the number of engines or a restart. Only rounding remains: logits of a batch of another shape differ in their last
    digits, which can decide a draw that falls between two tokens, or a greedy tie in bfloat16.
    """

    def complete(self, ids: Sequence[str], prompts: Sequence[Sequence[int]]) -> list[Completion]:
        """Complete prompts."""
        size = self._settings.batch_size
        alone = [self._runs_alone(prompt) for prompt in prompts]
        shared = [index for index in range(len(ids)) if not alone[index]]
        batches = [shared[at : at + size] for at in range(0, len(shared), size)]
        found: dict[int, Completion] = {}
        for batch in (*batches, *([index] for index in range(len(ids)) if alone[index])):
            completions = self._batch([ids[index] for index in batch], [prompts[index] for index in batch])
            found.update(zip(batch, completions, strict=True))
        return [found[index] for index in range(len(ids))]

    def _runs_alone(self, prompt: Sequence[int]) -> bool:
        """True if other prompts in the batch would change this prediction, or it theirs."""
        kept, threshold = self._fit(prompt), longrope_threshold(self._model.config)
        return not self._ignores_padding or (threshold is not None and len(kept) + self._limit(kept) > threshold)

    @functools.cached_property
    @torch.inference_mode()
    def _ignores_padding(self) -> bool:
        """True if masked padding changes nothing, by a test; some models read it anyway (RWKV, XLNet)."""
        prompt = torch.arange(TRIAL_TOKENS) % self._model.config.get_text_config().vocab_size
        alone, padded = (self._logits(prompt, pads) for pads in (0, TRIAL_TOKENS))
        # Tolerate the rounding of 16 bits.
        most = 1e-2 if self._model.dtype == torch.float32 else 0.5
        return bool(((alone - padded).abs() <= most * alone.std(-1, keepdim=True) + 1e-6).all())

    def _logits(self, prompt: torch.Tensor, pads: int) -> torch.Tensor:
        """[2, vocabulary] logits of the two tokens after a prompt."""
        row = torch.cat([torch.full((pads,), self._padding), prompt])[None].to(self._device)
        mask = torch.cat([torch.zeros(pads), torch.ones(len(prompt))]).long()[None].to(self._device)
        output = trial(self._model, row, mask, 2, self._padding)
        return torch.cat(list(output.logits))

    @torch.inference_mode()
    def _batch(self, ids: Sequence[str], prompts: Sequence[Sequence[int]]) -> list[Completion]:
        kept = [self._fit(prompt) for prompt in prompts]
        longest = max(len(prompt) for prompt in kept)
        pads = torch.tensor([longest - len(prompt) for prompt in kept])
        rows = torch.tensor([[self._padding] * (longest - len(prompt)) + list(prompt) for prompt in kept])
        mask = (torch.arange(longest)[None, :] >= pads[:, None]).long()
        limits = torch.tensor([self._limit(prompt) for prompt in kept])
        written = (self._shrinking if len(ids) > 1 and self._shrinks else self._whole)(ids, rows, mask, pads, limits)
        return [
            self._completion(tokens[:limit], limit, prompt, short)
            for tokens, limit, prompt, short in zip(written, limits.tolist(), prompts, kept, strict=True)
        ]

    def _whole(
        self, ids: Sequence[str], rows: torch.Tensor, mask: torch.Tensor, pads: torch.Tensor, limits: torch.Tensor
    ) -> list[list[int]]:
        """Generate until the last row has finished; returns the new tokens of each row, with padding."""
        longest = rows.shape[1]
        output = self._model.generate(
            input_ids=rows.to(self._device),
            attention_mask=mask.to(self._device),
            generation_config=self._generation(int(limits.max())),
            logits_processor=self._processors(ids, pads, longest),
            stopping_criteria=StoppingCriteriaList([RowLimits(limits.to(self._device), longest)]),
        )
        return output[:, longest:].tolist()

    def _shrinking(
        self, ids: Sequence[str], rows: torch.Tensor, mask: torch.Tensor, pads: torch.Tensor, limits: torch.Tensor
    ) -> list[list[int]]:
        """As ``_whole``, but rows leave the batch when they have finished."""

        def arguments(left: list[int], new_tokens: int) -> dict[str, Any]:
            settings = self._generation(new_tokens)
            settings.return_dict_in_generate = True
            processors = self._processors([ids[index] for index in left], pads[left], rows.shape[1])
            return {"generation_config": settings, "logits_processor": processors}

        return grow(self._model, rows, mask, limits, self._stops, arguments)

    @functools.cached_property
    def _shrinks(self) -> bool:
        """True if finished rows may leave a batch: on CPUs, where a step takes as long as it has rows."""
        settings = self._settings
        plain = settings.num_beams == 1 and settings.max_seconds is None and not self._runs_code
        return plain and self._device.type == "cpu" and can_shrink(self._model, self._padding)

    def _by_beam(self, of_rows: torch.Tensor) -> torch.Tensor:
        """[rows] → [rows · beams], the layout of a beam search."""
        return of_rows.repeat_interleave(self._settings.num_beams).to(self._device)

    def _processors(self, ids: Sequence[str], pads: torch.Tensor, longest: int) -> LogitsProcessorList:
        processors = LogitsProcessorList()
        if self._settings.repetition_penalty != 1.0:
            # Padding was not used by the text; it is often the stop token, which a penalty would suppress.
            penalty = self._settings.repetition_penalty
            processors.append(RepetitionPenaltyLogitsProcessor(penalty, prompt_ignore_length=self._by_beam(pads)))
        if self._settings.do_sample:
            uniforms = torch.stack([uniform_numbers(self._seed, id, self._settings.max_new_tokens) for id in ids])
            processors.append(RowSampling(self._settings, uniforms.to(self._device), longest))
        return processors
