"""transformers' own generation, batch by batch."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from transformers import LogitsProcessorList, RepetitionPenaltyLogitsProcessor, StoppingCriteriaList

from raysft.generate.engines.base import ModelEngine
from raysft.generate.engines.interface import Completion
from raysft.generate.engines.sampling import RowLimits, RowSampling, uniform_numbers


class TransformersEngine(ModelEngine):
    """Static batches through ``model.generate``, padded on the left.

    Greedy: in float32 the text is that of ``model.generate`` on the prompt alone, token for token.
    Sampling: each prompt draws from random numbers of its own, made from ``run.seed`` and its id, so a prediction does
    not depend on the other prompts, their order, the number of engines or a restart. What remains is rounding: the
    logits of a batch of another shape differ in their last digits, and a draw that falls just between two tokens (or a
    greedy tie in bfloat16) can turn on that.
    """

    def complete(self, ids: Sequence[str], prompts: Sequence[Sequence[int]]) -> list[Completion]:
        """Complete prompts, as the interface says."""
        size = self._settings.batch_size
        starts = range(0, len(ids), size)
        return [each for at in starts for each in self._batch(ids[at : at + size], prompts[at : at + size])]

    @torch.inference_mode()
    def _batch(self, ids: Sequence[str], prompts: Sequence[Sequence[int]]) -> list[Completion]:
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
            self._completion(tokens[:limit], limit, prompt, short)
            for tokens, limit, prompt, short in zip(written, limits.tolist(), prompts, kept, strict=True)
        ]

    def _by_beam(self, of_rows: torch.Tensor) -> torch.Tensor:
        """[rows] → [rows · beams], as a beam search holds them."""
        return of_rows.repeat_interleave(self._settings.num_beams).to(self._device)

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
