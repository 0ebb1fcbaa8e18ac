"""Examples → token ids and labels, with the model's own tokenizer and chat template.

The tasks that tokenize need neither torch nor the tokenizer classes of transformers, whose import takes longer than small data:
the driver loads the tokenizer once and sends what is behind it.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np

from raysft.data.sources.tool_calls import nested_strings
from raysft.data.tokenization.assistant_spans import Rendered, first_line, labelled
from raysft.data.tokenization.chat_template import chat_template
from raysft.data.tokenization.template_inputs import quoted
from raysft.data.tokenization.token_spans import Encoded
from raysft.data.tokenization.tokenized_example import (
    NO_IDS,
    Overflow,
    TokenizedExample,
    TokenizeOptions,
    TokenizeResult,
)
from raysft.data.tokenization.tokenizer import Tokenizer, backend_of, span_encoder
from raysft.data.tokenization.truncation import split, truncate
from raysft.data.tokenization.turn_ends import TurnInspector, truncate_observations
from raysft.data.types import IGNORE_INDEX, Example, Message, Rejected
from raysft.errors import RequestError

MARK_START, MARK_END = "\ufdd0", "\ufdd1"
"""Noncharacters, which stand in no text, around a control token that is to be plain text."""


class ExampleTokenizer:
    """A tokenizer at work, under options."""

    def __init__(self, tokenizer: Tokenizer, options: TokenizeOptions) -> None:
        self.parts, self.options = tokenizer, options
        self.backend = backend_of(tokenizer.identity, tokenizer.backend, plain=False)
        self.encode_spans = span_encoder(tokenizer.identity, tokenizer.backend)
        # Not their number: some tokenizers leave out ids.
        self.ids_end = max(self.backend.get_vocab().values(), default=-1) + 1
        self.inspector = TurnInspector(self.backend, tokenizer.eos, self.ids_end)
        self.control = re.compile("|".join(map(re.escape, tokenizer.control_tokens)) or "(?!)")
        variables = {**tokenizer.special_tokens, **options.template_options}
        self.template = chat_template(tokenizer.template, variables) if tokenizer.template else None
        tool_template = tokenizer.tool_template
        self.tool_template = chat_template(tool_template, variables) if tool_template else self.template

    def __call__(self, examples: Sequence[Example]) -> Iterator[TokenizeResult]:
        """Tokenize a batch of examples in one pass; an example may give several pieces or be rejected.

        Raises:
            RequestError: the tokenizer has not what examples of this shape need.
        """
        prepared = [self._prepare(example) for example in examples]
        chats = [p.rendered for p in prepared if isinstance(p, _Prepared) and p.in_one_pass and p.example.messages]
        whole = [p for p in prepared if isinstance(p, _Prepared) and p.in_one_pass and p.example.prompt_length is None]
        texts = [each.example.text for each in whole if each.example.text]
        # A chat template writes all special tokens itself; a plain text gets those that the tokenizer puts around it.
        encoded_chats = self.encode_spans([chat.text for chat in chats], [chat.spans for chat in chats])
        encoded_texts = iter(self.encode_spans.encode(texts, add_special_tokens=True))
        for each in prepared:
            if isinstance(each, Rejected):
                yield each
            elif each.example.messages:
                yield from self._conversation(each, next(encoded_chats) if each.in_one_pass else None)
            elif each.example.prompt_length is not None:
                yield from self._completion(each)
            elif each.example.text:
                ids = next(encoded_texts) if each.in_one_pass else self._with_bos(each.example.text, escape=True)
                yield from self._text(each, ids)
            else:
                yield from self._ids(each.example)

    def _prepare(self, example: Example) -> _Prepared | Rejected:
        """Render an example, and find the control tokens that stand in it as text."""
        options, counts = self.options, []
        written = any(self.control.search(text) for text in _texts(example))
        if written:
            counts.append(("control_tokens", 1))
            if options.control_tokens == "reject":
                return Rejected(example.source, example.record, "a control token of the tokenizer stands in its text")
        escape = written and options.control_tokens == "escape"
        if not example.messages:
            self._check_end(example)
            return _Prepared(example, Rendered(example.text, ()), tuple(counts), not escape, written)
        if self.template is None:
            raise RequestError(
                f"{example.record}: is a conversation and the model's tokenizer has no chat template; "
                "take an instruct model, or name one in model.chat_template"
            )
        messages, tools = example.messages, example.tools
        if escape:
            messages = tuple(self._escaped_turn(message) for message in messages)
            tools = self._escaped(tools)
        template = self._template(example)
        try:
            rendered = template.rendered(messages, tools)
        except ValueError as error:
            return Rejected(example.source, example.record, str(error))
        except Exception as error:  # a template refuses what it does not support with errors of its own
            return Rejected(
                example.source, example.record, f"the chat template refuses the conversation ({first_line(error)})"
            )
        if rendered.form.as_text:
            counts.append(("tools_as_text", 1))
        if rendered.left_out:
            counts.append(("turns_left_out", 1))
        if quoted(messages, [rendered.text[slice(*span)] for span in rendered.spans]):
            counts.append(("quoted_arguments", 1))
        return _Prepared(example, rendered, tuple(counts), not escape, written)

    def _check_end(self, example: Example) -> None:
        if example.text and self.parts.eos is None:
            raise RequestError(
                f"{example.record}: is a text and the model's tokenizer has no token that ends one; set its eos_token"
            )

    def _template(self, example: Example) -> Any:
        return self.tool_template if example.tools else self.template

    def _escaped_turn(self, message: Message) -> Message:
        return replace(
            message,
            content=self._escaped(message.content),
            tool_calls=self._escaped(message.tool_calls),
            extra=self._escaped(message.extra),
            original=self._escaped(message.original),
        )

    def _escaped(self, value: Any) -> Any:
        """The value with marks around each control token in its texts."""
        if isinstance(value, str):
            return self.control.sub(f"{MARK_START}\\g<0>{MARK_END}", _unmarked(value))
        if isinstance(value, dict):
            return {self._escaped(key): self._escaped(inner) for key, inner in value.items()}
        return type(value)(map(self._escaped, value)) if isinstance(value, list | tuple) else value

    def _conversation(self, each: _Prepared, encoded: Encoded | None) -> Iterator[TokenizeResult]:
        example = each.example
        if encoded is not None:
            ids, turns = encoded
        else:
            ids, offsets = self._encode_escaped(each.rendered.text)
            turns = [_bounds(labelled(offsets, [span])) for span in each.rendered.spans]
        assistant = [message for message in example.messages if message.role == "assistant"]
        first = len(turns) - 1 if self.options.mask_history else 0
        trained = [number for number in range(first, len(turns)) if assistant[number].trainable]
        labels = self._labels(ids, [turns[number] for number in trained])
        look = partial(
            self.inspector.inspect_turn, self._template(example), each.rendered, ids, has_control_tokens=each.written
        )
        seen = [one for number in trained for one in look(number, turns[number])]
        tokenized = TokenizedExample(
            example.source, example.record, ids, labels, example.weight, counts=each.counts, observations=tuple(seen)
        )
        yield from self._fit(self._with_prompt(tokenized, each) if self.options.with_prompts else tokenized, turns)

    def _labels(self, ids: np.ndarray, spans: Sequence[tuple[int, int]]) -> np.ndarray:
        if self.options.train_on_prompt:
            return ids
        labels = np.full(len(ids), IGNORE_INDEX, np.int32)
        for start, end in spans:
            labels[start:end] = ids[start:end]
        return labels

    def _with_prompt(self, tokenized: TokenizedExample, each: _Prepared) -> TokenizedExample:
        example = each.example
        form = each.rendered.form
        prompt = self._template(example).render(form.turns[: form.answers[-1]], form.tools, True)
        if each.in_one_pass:
            ids = np.asarray(self.backend.encode(prompt, add_special_tokens=False).ids, np.int32)
        else:
            ids, _ = self._encode_escaped(prompt)
            prompt = _unmarked(prompt)
        last = form.turns[form.answers[-1]]
        reference = last.get("content")
        if last.get("tool_calls") or not isinstance(reference, str):
            start, end = each.rendered.spans[-1]
            reference = each.rendered.text[start:end]
        return replace(tokenized, prompt=prompt, prompt_ids=ids, reference=_unmarked(reference))

    def _text(self, each: _Prepared, ids: Sequence[int] | np.ndarray) -> Iterator[TokenizeResult]:
        """A text and the token that ends it; all of it is trained on."""
        example, input_ids = each.example, self._with_eos(ids)
        if len(input_ids) < 2:
            yield Rejected(example.source, example.record, "the text has no token")
            return
        seen = self.inspector.inspect_ids(input_ids, input_ids)
        whole = TokenizedExample(
            example.source, example.record, input_ids, input_ids, example.weight, counts=each.counts, observations=seen
        )
        yield from [whole] if self.options.stage == "pt" else self._fit(whole, [(0, len(input_ids))])

    def _completion(self, each: _Prepared) -> Iterator[TokenizeResult]:
        """A prompt and what follows it, encoded apart: the prompt is the one that generation will be asked with."""
        example, escape = each.example, not each.in_one_pass
        prompt, reference = example.text[: example.prompt_length], example.text[example.prompt_length :]
        begun = self._with_bos(prompt, escape)
        following = self._encode_escaped(self._escaped(reference))[0] if escape else self._encoded(reference)
        input_ids = self._with_eos([*begun, *following])
        turn = (len(begun), len(input_ids))
        tokenized = TokenizedExample(
            example.source,
            example.record,
            input_ids,
            self._labels(input_ids, [turn]),
            example.weight,
            counts=each.counts,
            observations=self.inspector.inspect_ids(input_ids, input_ids),
        )
        if self.options.with_prompts:
            ids = np.asarray(begun, np.int32)
            tokenized = replace(tokenized, prompt=prompt, prompt_ids=ids, reference=reference)
        yield from self._fit(tokenized, [turn])

    def _encoded(self, text: str, special: bool = False) -> list[int]:
        return self.backend.encode(text, add_special_tokens=special).ids

    def _with_bos(self, text: str, escape: bool) -> list[int]:
        """Ids of a text with the special tokens that the tokenizer puts before it."""
        around = [token for token in self._encoded("", special=True) if token != self.parts.eos]
        return [*around, *(self._encode_escaped(self._escaped(text))[0].tolist() if escape else self._encoded(text))]

    def _with_eos(self, ids: Sequence[int] | np.ndarray) -> np.ndarray:
        """Ids with the token that ends a text behind them."""
        return np.asarray(ids if len(ids) and ids[-1] == self.parts.eos else [*ids, self.parts.eos], np.int32)

    def _ids(self, example: Example) -> Iterator[TokenizeResult]:
        """Ids that came tokenized."""
        ids = np.asarray(example.ids, np.int32)
        labels = np.asarray(example.labels, np.int32)
        for name, values in (("input_ids", ids), ("labels", labels)):
            if int(values.max()) >= self.ids_end:
                reason = f"{name} holds {values.max()} and the tokenizer has {self.ids_end} tokens"
                yield Rejected(example.source, example.record, reason)
                return
        if self.options.stage == "pt":
            if not np.array_equal(ids, labels):
                reason = (
                    "labels differ from input_ids, and with stage: pt every token is trained on; take the column out"
                )
                yield Rejected(example.source, example.record, reason)
                return
            yield TokenizedExample(
                example.source,
                example.record,
                ids,
                ids,
                example.weight,
                observations=self.inspector.inspect_ids(ids, ids),
            )
            return
        tokenized = TokenizedExample(
            example.source,
            example.record,
            ids,
            labels,
            example.weight,
            observations=self.inspector.inspect_ids(ids, labels),
        )
        yield from self._fit(tokenized, [(0, len(ids))])

    def _fit(self, whole: TokenizedExample, turns: Sequence[tuple[int, int]]) -> Iterator[TokenizeResult]:
        """The example in a row or, as ``data.on_overflow`` says, what is left of it."""
        options, tokens = self.options, len(whole.input_ids)
        pieces = [whole]
        if tokens > options.sequence_length:
            if options.on_overflow in ("drop", "error"):
                reason = f"{tokens} tokens do not fit into data.sequence_length={options.sequence_length}"
                yield Overflow(Rejected(whole.source, whole.record, reason), tokens)
                return
            if options.on_overflow == "split":
                cuts = split(tokens, options.sequence_length)
                # A piece begins in the middle, so that there is nothing to ask and to generate.
                plain = replace(whole, prompt="", prompt_ids=NO_IDS, reference="")
                pieces = [
                    replace(plain, input_ids=whole.input_ids[start:stop], labels=whole.labels[start:stop])
                    for start, stop in cuts
                ]
                pieces = [piece for piece in pieces if piece.loss_tokens]
                counts = (("split", 1), ("split_pieces", len(pieces)))
            else:
                left = truncate(
                    tokens,
                    turns,
                    options.sequence_length,
                    tail=options.keep_prompt == "tail",
                    last_first=options.mask_history,
                )
                pieces = [
                    replace(
                        whole,
                        input_ids=whole.input_ids[left],
                        labels=whole.labels[left],
                        observations=truncate_observations(whole.observations, left),
                    )
                ]
                counts = (("truncated", 1), ("truncated_tokens", tokens - len(left)))
            if pieces:
                pieces[0] = replace(pieces[0], counts=(*whole.counts, *counts))
            pieces[1:] = [replace(piece, counts=(), observations=()) for piece in pieces[1:]]
        if not pieces or not pieces[0].loss_tokens:
            yield Rejected(whole.source, whole.record, "no token of it would be trained on")
            return
        yield from pieces

    def _encode_escaped(self, text: str) -> tuple[np.ndarray, list[tuple[int, int]]]:
        """Ids of a text in which marked control tokens are plain characters, and where each stands in it."""
        ids: list[int] = []
        offsets: list[tuple[int, int]] = []
        at = 0
        plain = backend_of(self.parts.identity, self.parts.backend, plain=True)
        for index, piece in enumerate(re.split(f"[{MARK_START}{MARK_END}]", text)):
            encoding = (plain if index % 2 else self.backend).encode(piece, add_special_tokens=False)
            ids += encoding.ids
            offsets += [(at + start, at + end) for start, end in encoding.offsets]
            at += len(piece) + 1
        return np.asarray(ids, np.int32), offsets


@dataclass(frozen=True)
class _Prepared:
    example: Example
    rendered: Rendered
    counts: tuple[tuple[str, int], ...]
    in_one_pass: bool
    written: bool
    """Whether a control token stands in what somebody wrote."""


def _texts(example: Example) -> Iterator[str]:
    """All that somebody wrote in an example."""
    yield example.text
    for message in example.messages:
        yield message.content
        if message.tool_calls or message.extra or message.original:
            yield from nested_strings((message.tool_calls, message.extra, message.original))
    if example.tools:
        yield from nested_strings(example.tools)


def _bounds(inside: Sequence[bool]) -> tuple[int, int]:
    where = np.flatnonzero(inside)
    return (int(where[0]), int(where[-1]) + 1) if len(where) else (0, 0)


def _unmarked(text: str) -> str:
    return text.replace(MARK_START, "").replace(MARK_END, "")
