"""Examples → token ids and labels, with the model's own tokenizer and chat template."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import numpy as np

from raysft.config import RequestError
from raysft.data.render import assistant_spans, labelled, prompt_messages
from raysft.records import IGNORED, Example, Message, Rejected


@dataclass(frozen=True)
class Tokenized:
    """One tokenized example."""

    source: str
    record: str
    input_ids: np.ndarray
    """[tokens] int32."""
    labels: np.ndarray
    """[tokens] int32, ``IGNORED`` where not trained; aligned with ``input_ids``, not shifted."""
    prompt: str = ""
    """Rendered text up to the last assistant turn, with the generation prompt."""
    prompt_ids: np.ndarray = field(default_factory=lambda: np.empty(0, np.int32))
    reference: str = ""
    """What the assistant wrote in its last turn."""

    @property
    def trained(self) -> int:
        """Tokens that are predicted and trained on. Nothing precedes the first one, so it never counts."""
        return int((self.labels[1:] != IGNORED).sum())


@dataclass(frozen=True)
class Tokenizer:
    """A model's tokenizer with the options that decide ids and labels."""

    model: str
    """Folder or hub id."""
    sequence_length: int
    mask_history: bool
    train_on_prompt: bool
    with_prompts: bool
    """Also give prompt and reference of each conversation, for generation."""

    def __call__(self, examples: Sequence[Example]) -> Iterator[Tokenized | Rejected]:
        """Tokenize a batch of examples in one pass; an example may give several pieces (long texts) or be rejected.

        Raises:
            RequestError: the tokenizer has not what examples of this shape need.
        """
        tokenizer = load_tokenizer(self.model)
        _check(tokenizer, examples)
        rendered: list[tuple[Example, str, list[tuple[int, int]]] | Rejected] = []
        for example in examples:
            try:
                rendered.append((example, *self._render(tokenizer, example)))
            except ValueError as error:
                rendered.append(Rejected(example.source, example.record, str(error)))
        texts = [item[1] for item in rendered if not isinstance(item, Rejected)]
        encoded = tokenizer(texts, add_special_tokens=False, return_offsets_mapping=True) if texts else {}
        ids, offsets = iter(encoded.get("input_ids", [])), iter(encoded.get("offset_mapping", []))
        for item in rendered:
            if isinstance(item, Rejected):
                yield item
            elif item[0].messages:
                yield self._conversation(tokenizer, item[0], next(ids), next(offsets), item[2])
            else:
                next(offsets)
                yield from self._document(tokenizer, item[0], next(ids))

    def _render(self, tokenizer: Any, example: Example) -> tuple[str, list[tuple[int, int]]]:
        if not example.messages:
            return example.text, []
        try:
            text, spans = assistant_spans(example.messages, _template(tokenizer))
        except ValueError:
            raise
        except Exception as error:  # a template refuses what it does not support with errors of its own
            raise ValueError(f"the chat template refuses the conversation ({str(error).splitlines()[0]})") from None
        return text, spans[-1:] if self.mask_history else spans

    def _conversation(
        self,
        tokenizer: Any,
        example: Example,
        ids: list[int],
        offsets: list[tuple[int, int]],
        spans: list[tuple[int, int]],
    ) -> Tokenized | Rejected:
        input_ids = np.asarray(ids, np.int32)
        labels = (
            input_ids
            if self.train_on_prompt
            else np.where(labelled(offsets, spans), input_ids, IGNORED).astype(np.int32)
        )
        tokenized = Tokenized(example.source, example.record, input_ids, labels)
        if tokenized.trained == 0:
            return Rejected(example.source, example.record, "no token of it would be trained on")
        if not self.with_prompts:
            return tokenized
        asked, reference = prompt_messages(example.messages)
        prompt = _template(tokenizer)(asked, True)
        prompt_ids = np.asarray(tokenizer(prompt, add_special_tokens=False)["input_ids"], np.int32)
        return Tokenized(example.source, example.record, input_ids, labels, prompt, prompt_ids, reference)

    def _document(self, tokenizer: Any, example: Example, ids: list[int]) -> Iterator[Tokenized | Rejected]:
        """A text and the token that ends it, cut into pieces of at most ``sequence_length``; labels are the inputs.

        A piece begins with the last token of the one before, so that each token but the document's first is predicted once.
        """
        input_ids = np.asarray([*ids, tokenizer.eos_token_id], np.int32)
        if len(input_ids) < 2:
            yield Rejected(example.source, example.record, "the text has no token")
        for start in range(0, len(input_ids) - 1, self.sequence_length - 1):
            piece = input_ids[start : start + self.sequence_length]
            yield Tokenized(example.source, example.record, piece, piece)


@lru_cache(maxsize=2)
def load_tokenizer(model: str) -> Any:
    """The model's tokenizer, loaded once in a process."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(model)


def _check(tokenizer: Any, examples: Sequence[Example]) -> None:
    for example in examples:
        if example.messages and not tokenizer.chat_template:
            raise RequestError(
                f"{example.record}: is a conversation and the model's tokenizer has no chat template; take an instruct model"
            )
        if not example.messages and tokenizer.eos_token_id is None:
            raise RequestError(
                f"{example.record}: is a text and the model's tokenizer has no token that ends one; set its eos_token"
            )


def _template(tokenizer: Any) -> Any:
    def render(messages: Sequence[Message], add_generation_prompt: bool) -> str:
        turns = [{"role": message.role, "content": message.content} for message in messages]
        return tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=add_generation_prompt)

    return render
