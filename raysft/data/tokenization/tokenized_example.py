"""Tokenized examples, and the options that decide their ids and labels."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np

from raysft.config import Config
from raysft.data.tokenization.turn_ends import Observations
from raysft.data.types import IGNORE_INDEX, Rejected, TokenizedMedium

NO_IDS = np.empty(0, np.int32)


@dataclass(frozen=True)
class TokenizeOptions:
    """Everything that decides ids and labels, except the tokenizer."""

    stage: str
    sequence_length: int
    mask_history: bool
    train_on_prompt: bool
    on_overflow: Literal["truncate", "split", "drop", "error"]
    keep_prompt: Literal["head", "tail"]
    control_tokens: Literal["keep", "escape", "reject"]
    template_options: dict[str, Any]
    default_system: str | None
    thinking: Literal["template", "keep", "empty", "last"]
    with_prompts: bool
    """Also keep each conversation's prompt and reference, for generation."""

    @classmethod
    def of(cls, config: Config, with_prompts: bool) -> TokenizeOptions:
        """Take the options from a config."""
        data = config.data
        return cls(
            stage=config.stage,
            sequence_length=data.sequence_length,
            mask_history=data.mask_history,
            train_on_prompt=data.train_on_prompt,
            on_overflow=data.on_overflow,
            keep_prompt=data.keep_prompt,
            control_tokens=data.control_tokens_in_text,
            template_options=data.template_options,
            default_system=data.default_system,
            thinking=data.thinking,
            with_prompts=with_prompts,
        )


@dataclass(frozen=True)
class TokenizedExample:
    """Token ids and labels of one example."""

    source: str
    record: str
    input_ids: np.ndarray
    """[tokens] int32."""
    labels: np.ndarray
    """[tokens] int32, ``IGNORE_INDEX`` where the loss ignores the token; aligned with ``input_ids``, not shifted."""
    weight: float = 1.0
    prompt: str = ""
    """Rendered text up to the last assistant turn, with the generation prompt."""
    prompt_ids: np.ndarray = field(default_factory=lambda: NO_IDS)
    reference: str = ""
    """Content of the last assistant turn."""
    media: tuple[TokenizedMedium, ...] = ()
    """Its images, with their places in ``input_ids``, in order."""
    prompt_media: tuple[TokenizedMedium, ...] = ()
    """The images of the prompt, with their places in ``prompt_ids``, in order."""
    counts: tuple[tuple[str, int], ...] = ()
    """Changes to report: ``truncated``, ``truncated_tokens``, ``split``, ``control_tokens`` …"""
    observations: Observations = ()
    """How its trained turns begin and end."""

    @property
    def loss_tokens(self) -> int:
        """Number of tokens that the loss covers. The first token never counts, because nothing precedes it."""
        return int(np.count_nonzero(self.labels[1:] != IGNORE_INDEX))

    @property
    def largest(self) -> int:
        """Largest token id that the model reads or predicts."""
        return max(int(ids.max(initial=0)) for ids in (self.input_ids, self.labels, self.prompt_ids))


@dataclass(frozen=True)
class Overflow:
    """An example that is longer than a row and is not used."""

    rejected: Rejected
    tokens: int


TokenizeResult = TokenizedExample | Rejected | Overflow
