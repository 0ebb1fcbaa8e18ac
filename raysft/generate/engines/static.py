"""Static batches with ``model.generate`` of transformers."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from transformers import LogitsProcessor, LogitsProcessorList, RepetitionPenaltyLogitsProcessor, StoppingCriteriaList

from raysft.config import Config
from raysft.generate.engines.base import ModelEngine, cpu_cache_bytes
from raysft.generate.engines.context_window import longrope_threshold
from raysft.generate.engines.interface import Completion, Media, failure
from raysft.generate.engines.media import PIXEL_BYTES, BatchImages, ImageInputs, ahead, kept_media
from raysft.generate.engines.roomy_cache import ROOM, token_bytes
from raysft.generate.engines.sampling import RowLimits, RowSampling, uniform_numbers
from raysft.generate.engines.shrinking import can_shrink, grow, mask_of, padded, reading_groups, trial
from raysft.models.processor import differs_alone
from raysft.storage.local_cache import model_copy

TRIAL_TOKENS = 8
"""Tokens, and as many padding tokens, of the test whether a model ignores padding."""


class StepCounter(LogitsProcessor):
    """Counts an engine's steps; it changes no logits."""

    def __init__(self, engine: TransformersEngine) -> None:
        self._engine = engine

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        self._engine.steps += 1
        return scores


class TransformersEngine(ModelEngine):
    """Static batches through ``model.generate``, padded on the left.

    Greedy predictions in float32 equal ``model.generate`` on the prompt alone, token for token. When sampling, each prompt has
    its own random numbers, derived from ``run.seed`` and its id, so that a prediction does not depend on other prompts, their
    order, the number of engines or a restart. Only rounding remains: logits of a batch of another shape differ in their last
    digits, which can decide a draw that falls between two tokens, or a greedy tie in bfloat16.
    """

    steps = 0
    """Steps of all predictions so far."""

    def __init__(self, config: Config, model: str, *arguments: Any, **options: Any) -> None:
        super().__init__(config, model, *arguments, **options)
        self._images = ImageInputs(model_copy(model), self._runs_code, by_row=self._settings.num_beams > 1)

    def complete(self, ids: Sequence[str], prompts: Sequence[Sequence[int]], media: Media = ()) -> list[Completion]:
        """Complete prompts."""
        kept, media = self._fit_all(prompts, media)
        size = self._rows_at_once(kept, media)
        alone = [self._runs_alone(prompt) for prompt in kept]
        shared = [index for index in range(len(ids)) if not alone[index]]
        batches = [shared[at : at + size] for at in range(0, len(shared), size)]
        batches += [[index] for index in range(len(ids)) if alone[index]]
        found: dict[int, Completion] = {}
        for batch, images in zip(batches, self._images_of(batches, kept, media), strict=True):
            faults = images.faults if images else {}
            found.update({batch[number]: failure(fault) for number, fault in faults.items()})
            left = [index for number, index in enumerate(batch) if number not in faults]
            if left:
                texts = (
                    [ids[index] for index in left],
                    [prompts[index] for index in left],
                    [kept[index] for index in left],
                )
                found.update(zip(left, self._batch(*texts, images), strict=True))
        return [found[index] for index in range(len(ids))]

    def _fit_all(self, prompts: Sequence[Sequence[int]], media: Media) -> tuple[list[Sequence[int]], Media]:
        """Return prompts that fit, and their images; a prompt that is cut keeps no part of an image."""
        kept = [self._fit(prompt) for prompt in prompts]
        if not any(media):
            return kept, ()
        alone = differs_alone(self._images.processor)
        whole = [kept_media(*each, alone) for each in zip(prompts, kept, media, strict=True)]
        return [self._fit(tokens) for tokens, _ in whole], [images for _, images in whole]

    def _images_of(
        self, batches: Sequence[Sequence[int]], kept: Sequence[Sequence[int]], media: Media
    ) -> Iterator[BatchImages | None]:
        """Yield the images of each batch, which are made ahead; None if no prompt has any."""
        if not any(media):
            return itertools.repeat(None, len(batches))
        shrinks = self._shrinks  # tested here: the model belongs to this thread

        def make(batch: Sequence[int]) -> BatchImages:
            def groups(numbers: list[int]) -> list[list[int]]:
                lengths = [len(kept[batch[number]]) for number in numbers]
                return reading_groups(lengths) if len(lengths) > 1 and shrinks else [list(range(len(lengths)))]

            images = self._images.batch([media[index] for index in batch], groups)
            self.steps += 1  # a sign of life, as files may take long to come
            return images

        return ahead(make, batches)

    def _rows_at_once(self, kept: Sequence[Sequence[int]], media: Media) -> int:
        """Rows of a batch: as configured, or on a CPU fewer if their cache and images could exceed their share of the memory."""
        size = self._settings.batch_size
        if min(size, len(kept)) < 2 or self._device.type != "cpu" or self._runs_code:
            return size
        memory = cpu_cache_bytes(self._engines_per_node)
        tokens = self._settings.num_beams * (max(len(prompt) + self._limit(prompt) for prompt in kept) + ROOM)
        # The images of one batch are there while those of the next are made.
        pixels = 2 * max((sum(each.width * each.height for each in of_prompt) for of_prompt in media), default=0)
        return max(1, min(size, int(memory / max(1.0, tokens * self._token_bytes + pixels * PIXEL_BYTES))))

    @functools.cached_property
    @torch.inference_mode()
    def _token_bytes(self) -> float:
        """Bytes that a token takes in the cache; 0 if it does not grow with the tokens."""
        rows = torch.zeros(1, TRIAL_TOKENS).long()
        output = trial(self._model, rows, torch.ones_like(rows), 1, self._padding)
        return token_bytes(getattr(output, "past_key_values", None))

    def _runs_alone(self, kept: Sequence[int]) -> bool:
        """True if other prompts in the batch would change this prediction, or it theirs."""
        threshold = longrope_threshold(self._model.config)
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
    def _batch(
        self,
        ids: Sequence[str],
        prompts: Sequence[Sequence[int]],
        kept: Sequence[Sequence[int]],
        images: BatchImages | None,
    ) -> list[Completion]:
        limits = torch.tensor([self._limit(prompt) for prompt in kept])
        write = self._shrinking if len(ids) > 1 and self._shrinks else self._whole
        return [
            self._completion(tokens[:limit], limit, prompt, short)
            for tokens, limit, prompt, short in zip(
                write(ids, kept, limits, images), limits.tolist(), prompts, kept, strict=True
            )
        ]

    def _whole(
        self, ids: Sequence[str], prompts: Sequence[Sequence[int]], limits: torch.Tensor, images: BatchImages | None
    ) -> list[list[int]]:
        """Generate until the last row has finished; returns the new tokens of each row, with padding."""
        rows, pads = padded(prompts, self._padding)
        longest = rows.shape[1]
        output = self._model.generate(
            input_ids=rows.to(self._device),
            attention_mask=mask_of(pads, longest).to(self._device),
            generation_config=self._generation(int(limits.max())),
            logits_processor=self._processors(ids, pads, longest),
            stopping_criteria=StoppingCriteriaList([RowLimits(limits.to(self._device), longest)]),
            **self._inputs(images, list(range(len(ids))), rows),
        )
        return output[:, longest:].tolist()

    def _shrinking(
        self, ids: Sequence[str], prompts: Sequence[Sequence[int]], limits: torch.Tensor, images: BatchImages | None
    ) -> list[list[int]]:
        """As ``_whole``, but prompts are read in groups of like length, and rows leave the batch when they have finished."""

        def arguments(left: list[int], pads: torch.Tensor, begin: int, new_tokens: int) -> dict[str, Any]:
            settings = self._generation(new_tokens)
            settings.return_dict_in_generate = True
            processors = self._processors([ids[index] for index in left], pads, begin)
            return {"generation_config": settings, "logits_processor": processors}

        inputs = functools.partial(self._inputs, images)
        return grow(self._model, prompts, limits, self._stops, self._padding, arguments, inputs)

    def _inputs(self, images: BatchImages | None, members: list[int], rows: torch.Tensor) -> dict[str, torch.Tensor]:
        """Return what the model takes besides the padded tokens of prompts that are read together."""
        made = images.inputs.get(tuple(members)) if images else None
        if made is None:
            return {}
        return {
            name: values.to(self._device, self._model.dtype if values.is_floating_point() else values.dtype)
            for name, values in (made | self._images.token_types(rows)).items()
        }

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
        processors = LogitsProcessorList([StepCounter(self)])
        if self._settings.repetition_penalty != 1.0:
            # Padding was not used by the text; it is often the stop token, which a penalty would suppress.
            penalty = self._settings.repetition_penalty
            processors.append(RepetitionPenaltyLogitsProcessor(penalty, prompt_ignore_length=self._by_beam(pads)))
        if self._settings.do_sample:
            uniforms = torch.stack([uniform_numbers(self._seed, id, self._settings.max_new_tokens) for id in ids])
            processors.append(RowSampling(self._settings, uniforms.to(self._device), longest))
        return processors
