"""Batches that compute little more than their tokens: prompts are read in groups of like length, and finished rows leave."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from transformers import DynamicCache, GenerationConfig, StoppingCriteria, StoppingCriteriaList
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from raysft.generate.engines.roomy_cache import forget, joined

SHARE = 16
"""Rows are dropped as soon as one in this many has finished: that costs about a tenth of a step."""
GROUP_TOKENS = 512
"""Tokens of prompts, with their padding, that are read at once: more are hardly faster, but differ more in length."""
TRIAL_TOKENS = 8
"""Tokens of the prompts that test whether a model allows it."""
Arguments = Callable[[list[int], torch.Tensor, int, int], dict[str, Any]]
"""Returns further arguments of ``model.generate`` for rows: the index of each row's prompt, its padding, the columns before the
first new token, and the new tokens that may follow."""
Inputs = Callable[[list[int], torch.Tensor], dict[str, Any]]
"""Returns what the model takes besides the tokens of prompts that are read together: by their indices and padded rows."""


class EnoughDone(StoppingCriteria):
    """Interrupt the generation of a batch when enough of its rows have finished.

    Args:
        stops: tokens that end a row.
        limits: [rows] most new tokens of each row.
        begin: column of the first new token.
    """

    def __init__(self, stops: Sequence[int], limits: torch.Tensor, begin: int) -> None:
        self._stops = torch.tensor(list(stops), dtype=torch.long)
        self._limits, self._begin = limits, begin
        self.done = torch.zeros(len(limits), dtype=torch.bool)

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:  # pyright: ignore
        # A finished row is padded with tokens that need not be stop tokens: it stays finished.
        self.done |= torch.isin(input_ids[:, -1], self._stops)
        self.done |= input_ids.shape[1] - self._begin >= self._limits
        enough = int(self.done.sum()) * SHARE >= len(self.done)
        return torch.ones_like(self.done) if enough else self.done


class Batch:
    """Rows that grow together.

    Args:
        prompts: [rows] index of each row's prompt.
        tokens: [rows, columns] prompts, padded on the left, and the tokens after them.
        pads: [rows] columns of padding.
        begin: column of the first new token.
        cache: of all columns but the last.
        shifts: [rows, 1] what is added to the positions of new tokens because of images; None if the model keeps no such state.
    """

    def __init__(
        self,
        prompts: torch.Tensor,
        tokens: torch.Tensor,
        pads: torch.Tensor,
        begin: int,
        cache: DynamicCache,
        shifts: torch.Tensor | None = None,
    ) -> None:
        self.prompts, self.tokens, self.pads, self.begin, self.cache = prompts, tokens, pads, begin, cache
        self.shifts = shifts

    @property
    def mask(self) -> torch.Tensor:
        """[rows, columns]; 0 for padding."""
        return mask_of(self.pads, self.tokens.shape[1])

    def keep(self, kept: torch.Tensor) -> None:
        """Drop the rows that are False in ``kept``, and the columns that are padding in all others.

        The last rows take the places that become free, so that no other is copied.
        """
        count, places = int(kept.sum()), torch.arange(len(kept))
        rows = places[:count].clone()
        rows[~kept[:count]] = places[count:][kept[count:]]
        self.cache.batch_select_indices(rows)
        self.prompts, self.tokens, self.pads = self.prompts[rows], self.tokens[rows], self.pads[rows]
        self.shifts = None if self.shifts is None else self.shifts[rows]
        if count and (empty := int(self.pads.min())):
            forget(self.cache, empty)
            self.tokens, self.pads, self.begin = self.tokens[:, empty:], self.pads - empty, self.begin - empty


def grow(
    model: Any,
    prompts: Sequence[Sequence[int]],
    limits: torch.Tensor,
    stops: Sequence[int],
    padding: int,
    arguments: Arguments,
    inputs: Inputs = lambda members, rows: {},
) -> list[list[int]]:
    """Generate a batch, and leave out rows once they have finished.

    Args:
        model: one for which ``can_shrink`` holds.
        prompts: tokens of each.
        limits: [prompts] most new tokens of each.
        stops: tokens that end a row.
        padding: token for padding.
        arguments: further arguments of ``model.generate``.
        inputs: of the prompts' images.

    Returns:
        New tokens of each prompt; padding may follow its end.
    """
    shifted = shifted_part(model)
    batch = read(model, prompts, padding, arguments, inputs, shifted)
    written: list[list[int]] = [[] for _ in prompts]
    done = EnoughDone(stops, limits[batch.prompts], batch.begin)
    done(batch.tokens, None)
    while True:
        for row in done.done.nonzero()[:, 0].tolist():
            written[int(batch.prompts[row])] = batch.tokens[row, batch.begin :].tolist()
        batch.keep(~done.done)
        if not len(batch.prompts):
            return written
        left = limits[batch.prompts]
        done = EnoughDone(stops, left, batch.begin)
        more = int(left.max()) - (batch.tokens.shape[1] - batch.begin)
        if shifted is not None:
            shifted.rope_deltas = batch.shifts
        batch.tokens = model.generate(
            input_ids=batch.tokens,
            attention_mask=batch.mask,
            past_key_values=batch.cache,
            stopping_criteria=StoppingCriteriaList([done]),
            **arguments(batch.prompts.tolist(), batch.pads, batch.begin, more),
        ).sequences


def read(
    model: Any,
    prompts: Sequence[Sequence[int]],
    padding: int,
    arguments: Arguments,
    inputs: Inputs,
    shifted: Any,
) -> Batch:
    """Read prompts in groups of like length, each up to its first new token, and make one batch of them.

    Args:
        inputs: of the prompts' images.
        shifted: the model's ``shifted_part``.
    """
    lengths = [len(prompt) for prompt in prompts]
    groups, outputs, shifts = reading_groups(lengths), [], []
    for members in groups:
        rows, pads = padded([prompts[index] for index in members], padding)
        longest = rows.shape[1]
        further = arguments(members, pads, longest, 1) | inputs(members, rows)
        outputs.append(model.generate(input_ids=rows, attention_mask=mask_of(pads, longest), **further))
        if shifted is not None:
            shifts.append(shifted.rope_deltas)
    order = torch.tensor([index for members in groups for index in members])
    batch = join(model, order, [output.sequences for output in outputs], [output.past_key_values for output in outputs],
                 torch.tensor(lengths)[order], padding)  # fmt: skip
    batch.shifts = torch.cat(shifts) if shifts else None
    return batch


def shifted_part(model: Any) -> Any:
    """Return the part of a model that keeps, besides the cache, by how much images shift the positions of a row's later tokens.

    Only Qwen's models for images have one. Its state is that of the last call, whose rows need not be those of the next.
    """
    return next((part for part in model.modules() if hasattr(part, "rope_deltas")), None)


def reading_groups(lengths: Sequence[int]) -> list[list[int]]:
    """Say which prompts of these lengths are read together."""
    return group(lengths, GROUP_TOKENS)


def join(
    model: Any,
    order: torch.Tensor,
    parts: Sequence[torch.Tensor],
    caches: Sequence[DynamicCache],
    lengths: torch.Tensor,
    padding: int,
) -> Batch:
    """Make one batch of rows that have one new token each.

    Args:
        order: [rows] index of each row's prompt.
        parts: [rows, columns] tokens of each group.
        caches: of the groups; they are emptied.
        lengths: [rows] tokens of each prompt.
    """
    longest = max(part.shape[1] for part in parts) - 1
    fills = [torch.nn.functional.pad(part, (longest + 1 - part.shape[1], 0), value=padding) for part in parts]
    return Batch(order, torch.cat(fills), longest - lengths, longest, joined(model.config, caches, longest))


def group(lengths: Sequence[int], most: int) -> list[list[int]]:
    """Divide prompts into groups of like length, longest first, of at most this many tokens with padding if they are several.

    >>> group([2, 9, 3, 4, 3], most=9)
    [[1], [3, 2], [4, 0]]
    """
    groups: list[list[int]] = []
    for index in sorted(range(len(lengths)), key=lambda index: -lengths[index]):
        if groups and lengths[groups[-1][0]] * (len(groups[-1]) + 1) <= most:
            groups[-1].append(index)
        else:
            groups.append([index])
    return groups


def padded(prompts: Sequence[Sequence[int]], padding: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Pad prompts on the left; returns [rows, tokens] and the padding of each row, [rows].

    >>> padded([[5, 6, 7], [8]], padding=0)
    (tensor([[5, 6, 7],
            [0, 0, 8]]), tensor([0, 2]))
    """
    longest = max(len(prompt) for prompt in prompts)
    pads = [longest - len(prompt) for prompt in prompts]
    rows = [[padding] * pad + list(prompt) for pad, prompt in zip(pads, prompts, strict=True)]
    return torch.tensor(rows), torch.tensor(pads)


def mask_of(pads: torch.Tensor, columns: int) -> torch.Tensor:
    """[rows, columns] attention mask of rows that are padded on the left."""
    return (torch.arange(columns)[None, :] >= pads[:, None]).long()


@torch.inference_mode()
def can_shrink(model: Any, padding: int) -> bool:
    """Test whether a model generates the same tokens when prompts are read apart and a row leaves; return True if it does.

    The cache must consist of keys and values alone; states of other kinds (recurrent, quantized) are not indexed by row.
    """
    tokens = torch.arange(2 * TRIAL_TOKENS) % model.config.get_text_config().vocab_size
    prompts = [tokens[1:TRIAL_TOKENS].tolist(), tokens[TRIAL_TOKENS:].tolist()]
    rows, pads = padded(prompts, padding)
    whole = trial(model, rows, mask_of(pads, TRIAL_TOKENS), 4, padding)
    if not is_plain(whole.get("past_key_values"), model, TRIAL_TOKENS + 3):
        return False
    started = [
        trial(model, torch.tensor([prompt]), torch.ones(1, len(prompt)).long(), 1, padding) for prompt in prompts
    ]
    lengths = torch.tensor([len(prompt) for prompt in prompts])
    batch = join(model, torch.arange(2), [each.sequences for each in started],
                 [each.past_key_values for each in started], lengths, padding)  # fmt: skip
    batch.tokens = trial(model, batch.tokens, batch.mask, 1, padding, batch.cache).sequences
    batch.keep(torch.tensor([True, False]))
    rest = trial(model, batch.tokens, batch.mask, 2, padding, batch.cache)
    expected, found = torch.cat(whole.logits[2:])[::2], torch.cat(rest.logits)
    return bool(((expected - found).abs() <= 1e-2 * expected.std(-1, keepdim=True) + 1e-6).all())


def is_plain(cache: Any, model: Any, tokens: int) -> bool:
    """True if a cache holds keys and values of this many tokens, in the layers that transformers makes for the model's config."""
    if type(cache) is not DynamicCache or cache.get_seq_length() != tokens:  # virtual tokens come before the prompt's
        return False
    # A model for which other layers are needed brings its own cache, which is not replaced.
    layers: list[Any] = cache.layers
    kinds, usual = (
        [type(layer) for layer in layers],
        [type(layer) for layer in DynamicCache(config=model.config).layers],
    )
    if kinds != usual or not set(kinds) <= {DynamicLayer, DynamicSlidingWindowLayer}:
        return False  # recurrent layers have no keys at all
    states = [each for layer in layers for each in (layer.keys, layer.values)]
    return all(each is not None and each.dim() == 4 for each in states)


def trial(model: Any, rows: torch.Tensor, mask: torch.Tensor, new_tokens: int, padding: int, cache: Any = None) -> Any:
    """Generate this many tokens greedily, without stopping early; returns the output of ``model.generate``, with logits."""
    settings = GenerationConfig(
        max_new_tokens=new_tokens,
        do_sample=False,
        pad_token_id=padding,
        eos_token_id=-1,
        output_logits=True,
        return_dict_in_generate=True,
    )
    started = {} if cache is None else {"past_key_values": cache}
    return model.generate(input_ids=rows, attention_mask=mask, generation_config=settings, **started)
