"""Sampling that depends on the prompt alone, regardless of what else is in its batch."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from transformers import LogitsProcessor, RepetitionPenaltyLogitsProcessor, StoppingCriteria

from raysft.generate.engines.continuous_internals import ContinuousBatchingLogitsProcessor


def choose_tokens(
    scores: torch.Tensor, uniforms: torch.Tensor, temperature: float, top_k: int, top_p: float
) -> torch.Tensor:
    """Sample a token for each row with a given random number, after temperature, top-k and top-p.

    Args:
        scores: [rows, vocabulary] logits.
        uniforms: [rows] numbers in [0, 1).
        top_k: most probable tokens to keep; 0 keeps all.
        top_p: keep the most probable of these that together reach this probability, at least one.

    Returns:
        [rows] token ids.

    >>> choose_tokens(torch.tensor([[0.0, 9.0, 8.9]]), torch.tensor([0.99]), temperature=1.0, top_k=2, top_p=1.0)
    tensor([2])
    """
    count = min(top_k, scores.shape[-1]) if top_k else scores.shape[-1]
    best, tokens = torch.topk(scores.float() / temperature, count, dim=-1)
    probability = torch.softmax(best.double(), dim=-1)
    before = probability.cumsum(-1) - probability
    probability = probability.masked_fill(before >= top_p, 0.0)
    # Sort by token ID, so that rounding cannot swap two tokens with nearly equal logits.
    tokens, order = tokens.sort(dim=-1)
    reached = probability.gather(-1, order).cumsum(-1)
    point = uniforms.double()[:, None] * reached[:, -1:]
    chosen = torch.searchsorted(reached, point, right=True).clamp(max=count - 1)
    return tokens.gather(-1, chosen)[:, 0]


def leave_one(scores: torch.Tensor, uniforms: torch.Tensor, settings: Any) -> torch.Tensor:
    """Mask all tokens of each row but the one that its random number selects; [rows, vocabulary]."""
    tokens = choose_tokens(scores, uniforms, settings.temperature, settings.top_k, settings.top_p)
    return torch.full_like(scores, float("-inf")).scatter_(1, tokens[:, None], 0.0)


def uniform_numbers(seed: int, id: str, count: int) -> torch.Tensor:
    """[count] numbers in [0, 1) that depend on the seed and the prompt only."""
    return torch.rand(count, generator=torch.Generator().manual_seed(prompt_seed(seed, id)))


def prompt_seed(seed: int, id: str) -> int:
    """Derive a seed from 0 to 2⁶³ - 1 from the run's seed and the prompt's id.

    >>> prompt_seed(7, "q:1") == prompt_seed(7, "q:1") != prompt_seed(7, "q:2")
    True
    """
    return int.from_bytes(hashlib.sha256(f"{seed}/{id}".encode()).digest()[:8], "big") >> 1


class RowSampling(LogitsProcessor):
    """Logits processor that leaves each row the token that its random number of this step selects."""

    def __init__(self, settings: Any, uniforms: torch.Tensor, prompt_length: int) -> None:
        self._settings, self._uniforms, self._prompt_length = settings, uniforms, prompt_length

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        return leave_one(scores, self._uniforms[:, input_ids.shape[1] - self._prompt_length], self._settings)


class RowLimits(StoppingCriteria):
    """Stop each row at its own number of new tokens."""

    def __init__(self, limits: torch.Tensor, prompt_length: int) -> None:
        self._limits, self._prompt_length = limits, prompt_length

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:  # pyright: ignore
        # A beam search holds several beams of each row.
        limits = self._limits.repeat_interleave(input_ids.shape[0] // len(self._limits))
        return input_ids.shape[1] - self._prompt_length >= limits


class RequestSampling(ContinuousBatchingLogitsProcessor):
    """``RowSampling`` for continuous batching, where each request is at its own step."""

    supported_kwargs: dict[str, type] = {}  # noqa: RUF012, as in the base class
    ignored_kwargs: tuple[str, ...] = ()

    def __init__(self, settings: Any) -> None:
        self._settings = settings
        self._uniforms: dict[str, list[float]] = {}
        self._lengths: dict[str, int] = {}

    def begin(self, uniforms: Mapping[str, torch.Tensor], lengths: Mapping[str, int]) -> None:
        """Replace the requests of the previous call.

        Args:
            uniforms: for each request, a number in [0, 1) for every token that it may generate.
            lengths: for each request, the tokens of its prompt.
        """
        self._uniforms = {name: numbers.tolist() for name, numbers in uniforms.items()}
        self._lengths = dict(lengths)

    def fill_defaults(self, int32_tensor: torch.Tensor) -> None:
        int32_tensor.zero_()

    def prepare_tensor_args(self, requests_with_new_token: Sequence[Any]) -> torch.Tensor:
        """[requests] float32, viewed as the int32 that transformers copies to the device."""
        numbers = [self._number(request.state) for request in requests_with_new_token]
        return torch.tensor(numbers, dtype=torch.float32).view(torch.int32)

    def _number(self, state: Any) -> float:
        # The position includes tokens in flight. A warm-up request has no numbers; one that ended can be a step behind.
        numbers = self._uniforms.get(state.request_id, [0.0])
        step = state.position_offset - self._lengths.get(state.request_id, 0)
        return numbers[min(step, len(numbers) - 1)]

    def __call__(self, scores: torch.Tensor, tensor_arg: torch.Tensor) -> torch.Tensor:
        return leave_one(scores, tensor_arg[: scores.shape[0]].view(torch.float32), self._settings)


class RequestPenalty(ContinuousBatchingLogitsProcessor):
    """The repetition penalty of transformers for requests of continuous batching.

    It reads each request's tokens while the step is prepared, so steps must neither overlap nor be captured as graphs.
    """

    supported_kwargs: dict[str, type] = {}  # noqa: RUF012
    ignored_kwargs: tuple[str, ...] = ()

    def __init__(self, penalty: float) -> None:
        self._penalty = RepetitionPenaltyLogitsProcessor(penalty)
        self._used: list[list[int]] = []

    def fill_defaults(self, int32_tensor: torch.Tensor) -> None:
        int32_tensor.zero_()

    def prepare_tensor_args(self, requests_with_new_token: Sequence[Any]) -> torch.Tensor:
        self._used = [
            request.state.initial_tokens + request.state.generated_tokens for request in requests_with_new_token
        ]
        return torch.zeros(len(self._used), dtype=torch.int32)

    def __call__(self, scores: torch.Tensor, tensor_arg: torch.Tensor) -> torch.Tensor:
        if not self._used:
            return scores
        longest = max(len(tokens) for tokens in self._used)
        # Pad each row with one of its own tokens: a repeated token counts once.
        rows = [tokens + tokens[-1:] * (longest - len(tokens)) for tokens in self._used]
        ids: Any = torch.tensor(rows, device=scores.device)
        # Chunked prompts leave meaningless rows at the end.
        penalized: Any = self._penalty(ids, scores[: len(rows)])  # pyright: ignore
        return torch.cat([penalized, scores[len(rows) :]])
