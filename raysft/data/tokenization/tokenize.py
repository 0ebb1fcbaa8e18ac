"""Turn examples into token ids and labels, with the model's own tokenizer and chat template.

The tasks that tokenize import neither torch nor the tokenizer classes of transformers: importing them takes longer than
tokenizing a small data set. The driver loads the tokenizer once and sends its parts.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np

from raysft.data.sources.media_parts import has_stray_mark
from raysft.data.tokenization.assistant_spans import ChatTemplate, Rendered, tokens_in_spans
from raysft.data.tokenization.chat_template import chat_template
from raysft.data.tokenization.control_tokens import ControlTokens, texts_of
from raysft.data.tokenization.escapes import unescape
from raysft.data.tokenization.image_texts import ImageTexts, Written, media_of, write_media
from raysft.data.tokenization.overflow import fit_to_row
from raysft.data.tokenization.span_search import Span
from raysft.data.tokenization.template_inputs import has_double_encoded_arguments
from raysft.data.tokenization.thoughts import Thoughts, plan_thoughts
from raysft.data.tokenization.token_spans import AddedTokens, Encoded
from raysft.data.tokenization.tokenized_example import TokenizedExample, TokenizeOptions, TokenizeResult
from raysft.data.tokenization.tokenizer import Tokenizer, load_backend, load_span_encoder
from raysft.data.tokenization.turn_ends import TurnInspector
from raysft.data.types import IGNORE_INDEX, MEDIUM, STAND_IN, Example, Medium, Message, Rejected, TokenizedMedium
from raysft.errors import RequestError, one_line


@dataclass(frozen=True)
class _Prepared:
    """An example that is ready to be encoded."""

    example: Example
    rendered: Rendered
    counts: tuple[tuple[str, int], ...]
    escaped: bool
    """True if control tokens in its texts are escaped; such an example is encoded by itself, in parts."""
    has_control_tokens: bool
    thoughts: Thoughts | None = None
    """Thoughts that the template itself does not write."""
    without_thoughts: Rendered | None = None
    """The conversation as the template writes it, without them."""
    written: Written | None = None
    """The conversation with the texts of its images; None if it has none."""

    @property
    def text(self) -> str:
        """The text to encode."""
        return self.written.text if self.written else self.rendered.text

    @property
    def spans(self) -> tuple[Span, ...]:
        """Character spans of ``text``: what the assistant wrote in each of its turns, then each image."""
        return (*self.written.spans, *self.written.media) if self.written else self.rendered.spans


class ExampleTokenizer:
    """Tokenizes examples with one tokenizer under one set of options."""

    def __init__(self, tokenizer: Tokenizer, options: TokenizeOptions) -> None:
        self.options, self.eos = options, tokenizer.eos
        self.backend = load_backend(tokenizer.identity, tokenizer.backend)
        self.encode_spans = load_span_encoder(tokenizer.identity, tokenizer.backend)
        # Not the number of tokens: some tokenizers skip ids.
        self.vocab_size = max(self.backend.get_vocab().values(), default=-1) + 1
        self.inspector = TurnInspector(self.backend, tokenizer.eos, self.vocab_size)
        self.control_tokens = ControlTokens(tokenizer)
        variables = {**tokenizer.special_tokens, **options.template_options}
        if options.default_system == "":
            variables["default_system"] = ""  # named templates read it
        self.processor = tokenizer.processor
        token, words = (self.processor.image_token, self.processor.words) if self.processor else ("", "")
        self.template, tool_template = (
            chat_template(template, variables, token, words) if template else None
            for template in (tokenizer.template, tokenizer.tool_template)
        )
        self.tool_template = tool_template or self.template
        self.images = ImageTexts(self.processor) if self.processor else None
        bos = tokenizer.special_tokens.get("bos_token")
        self.added = AddedTokens.of(self.backend, str(bos) if bos else None) if self.processor else None

    def __call__(self, examples: Sequence[Example]) -> Iterator[TokenizeResult]:
        """Tokenize a batch in one pass. An example may yield several pieces or be rejected.

        Raises:
            RequestError: the tokenizer lacks something that examples of this kind need.
        """
        prepared = [self._prepare(example) for example in examples]
        in_batch = [item for item in prepared if isinstance(item, _Prepared) and not item.escaped]
        chats = [item for item in in_batch if item.example.messages]
        texts = [item.example.text for item in in_batch if item.example.text and item.example.prompt_length is None]
        # A chat template writes all special tokens itself (but see ``AddedTokens``). Plain text gets those the tokenizer adds.
        encoded_chats = self.encode_spans([chat.text for chat in chats], [chat.spans for chat in chats])
        encoded_texts = iter(self.encode_spans.encode(texts, add_special_tokens=True))
        for item in prepared:
            if isinstance(item, Rejected):
                yield item
            elif item.example.messages:
                yield from self._conversation(item, None if item.escaped else next(encoded_chats))
            elif item.example.prompt_length is not None:
                yield from self._completion(item)
            elif item.example.text:
                ids = self._with_bos(item.example.text, escape=True) if item.escaped else next(encoded_texts)
                yield from self._text(item, ids)
            else:
                yield from self._ids(item.example)

    def template_for(self, example: Example) -> ChatTemplate:
        """Return the chat template for an example.

        Raises:
            RequestError: the tokenizer has none.
        """
        template = self.tool_template if example.tools else self.template
        if template is None:
            raise RequestError(
                f"{example.record}: is a conversation, but the model's tokenizer has no chat template; "
                "use an instruct model, or set model.chat_template"
            )
        return template

    def _prepare(self, example: Example) -> _Prepared | Rejected:
        """Render an example, and handle control tokens in its texts."""
        if reason := self._media_fault(example):
            return Rejected(example.source, example.record, reason)
        counts: list[tuple[str, int]] = []
        has_control_tokens = self.control_tokens.found_in(example)
        if has_control_tokens:
            counts.append(("control_tokens", 1))
            if self.options.control_tokens == "reject":
                reason = "contains a control token of the tokenizer (data.control_tokens_in_text: reject)"
                return Rejected(example.source, example.record, reason)
        escaped = has_control_tokens and self.options.control_tokens == "escape"
        if not example.messages:
            if example.text and self.eos is None:
                raise RequestError(
                    f"{example.record}: is a text, but the model's tokenizer has no eos_token to end it with; "
                    "set eos_token in its tokenizer_config.json"
                )
            return _Prepared(example, Rendered(example.text, ()), tuple(counts), escaped, has_control_tokens)
        template = self.template_for(example)
        messages, tools, thoughts = self._with_system(template, example.messages), example.tools, None
        if self.options.thinking != "template":
            options = self.options.template_options
            planned = plan_thoughts(messages, template.thought_words, self.options.thinking, options)
            messages, thoughts = planned or (messages, None)
        if escaped:
            messages = tuple(self.control_tokens.escape_message(message) for message in messages)
            tools = self.control_tokens.escape(tools)
            thoughts = thoughts and replace(thoughts, planned=self.control_tokens.escape(thoughts.planned))
        without_thoughts = None
        try:
            rendered = template.render_conversation(messages, tools)
            if thoughts:
                without_thoughts = rendered
                text, spans = thoughts.write(rendered.text, rendered.spans)
                rendered = replace(rendered, text=text, spans=spans)
            written = self._with_images(template, rendered, example)
        except RequestError:
            raise
        except ValueError as error:
            return Rejected(example.source, example.record, str(error))
        except Exception as error:  # a template may raise any error
            reason = f"the chat template rejects the conversation ({one_line(error)})"
            return Rejected(example.source, example.record, reason)
        if self.processor and has_stray_mark(example.messages):
            counts.append(("stray_marks", 1))
        if rendered.given.tools_as_text:
            counts.append(("tools_as_text", 1))
        if rendered.omits_turns:
            counts.append(("turns_left_out", 1))
        if has_double_encoded_arguments(messages, [rendered.text[start:end] for start, end in rendered.spans]):
            counts.append(("quoted_arguments", 1))
        return _Prepared(
            example, rendered, tuple(counts), escaped, has_control_tokens, thoughts, without_thoughts, written
        )

    def _media_fault(self, example: Example) -> str:
        """Return why an example with images, or a text that reads as one, cannot be used; empty if it can be.

        Raises:
            RequestError: the model takes no images.
        """
        if any(message.media for message in example.messages):
            if not self.processor:
                raise RequestError(
                    f"{example.record}: has images, but the model has no image processor (preprocessor_config.json); use a "
                    "vision-language model, or remove the record"
                )
            if self.processor.fault:
                raise RequestError(f"{example.record}: has images, but {self.processor.fault}")
            if any(medium.kind != "image" for message in example.messages for medium in message.media):
                return "has a video, but raysft only trains on text and images"
        for token in self.processor.media_tokens if self.processor else ():
            if any(token in text for text in texts_of(example)):
                reason = f"contains {token}, which stands for an image or a video"
                if has_stray_mark(example.messages):
                    reason += ", but the record has no images (to name their column, use columns: {images: COLUMN})"
                if not self.control_tokens.can_escape(token):
                    return f"{reason}; remove it"
                if self.options.control_tokens == "keep":
                    return f"{reason}; remove it, or set data.control_tokens_in_text: escape"
        return ""

    def _with_images(self, template: ChatTemplate, rendered: Rendered, example: Example) -> Written | None:
        """Write the texts of a conversation's images; None if it has none.

        Raises:
            ValueError: the template leaves an image out, or the processor refuses one.
            RequestError: the processor cannot be loaded.
        """
        media = media_of(example.messages)
        if not (self.images and template.images):
            return None
        shown = rendered.text.count(MEDIUM)
        if shown != len(media):
            raise ValueError(
                f"the chat template writes {shown} of {len(media)} images; set another model.chat_template"
            )
        if not media:
            return None
        written = self.images.written(media, template.images)
        return Written(*write_media(rendered.text, rendered.spans, written))

    def _with_system(self, template: ChatTemplate, messages: tuple[Message, ...]) -> tuple[Message, ...]:
        """Give ``data.default_system`` to a conversation without a system message, or with an empty one."""
        system = self.options.default_system
        asked = [message for message in messages if message.role == "system" and message.content.strip()]
        if system is None or asked or not (system or template.writes_own_system):
            return messages
        return (Message("system", system), *(message for message in messages if message.role != "system"))

    def _conversation(self, item: _Prepared, encoded: Encoded | None) -> Iterator[TokenizeResult]:
        """Label what the assistant wrote in a conversation."""
        example, rendered = item.example, item.rendered
        ids, spans = self._added_to(item.text, *(encoded or self._encode_escaped(item.text, item.spans)))
        turns, media = spans[: len(rendered.spans)], spans[len(rendered.spans) :]
        if media and self.images and not item.escaped:
            words = self.template_for(example).words
            self.images.check(rendered.text.replace(MEDIUM, words), media_of(example.messages), ids)
        assistant = [message for message in example.messages if message.role == "assistant"]
        first = len(turns) - 1 if self.options.mask_history else 0
        trained_turns = [number for number in range(first, len(turns)) if assistant[number].trainable]
        template = self.template_for(example)
        tokenized = TokenizedExample(
            example.source,
            example.record,
            ids,
            self._labels(ids, [turns[number] for number in trained_turns], media),
            example.weight,
            media=_placed(media_of(example.messages), media),
            counts=item.counts,
            observations=tuple(
                observation
                for number in trained_turns
                for observation in self.inspector.inspect_turn(
                    template, rendered, ids, number, turns[number], item.has_control_tokens
                )
            ),
        )
        if self.options.with_prompts:
            asked = self._asked(item)
            if isinstance(asked, Rejected):
                yield asked
                return
            prompted = self._with_prompt(tokenized, asked, template)
            if isinstance(prompted, Rejected):
                yield prompted
                return
            tokenized = prompted if asked is item else replace(prompted, reference="")
        if example.unanswered:
            yield _prompt_alone(tokenized)
        else:
            differ_alone = self._differ_alone(tokenized, media_of(example.messages))
            yield from fit_to_row(tokenized, turns, self.options, differ_alone)

    def _differ_alone(self, tokenized: TokenizedExample, media: Sequence[Medium]) -> bool:
        """True if an example is longer than a row and one of its images would have different tokens on its own."""
        longer = len(tokenized.input_ids) > self.options.sequence_length
        return longer and len(media) > 1 and self.images is not None and self.images.differ_alone(media)

    def _asked(self, item: _Prepared) -> _Prepared | Rejected:
        """Append a stand-in answer to a conversation that ends with a question or a tool result."""
        messages = item.example.messages
        if messages[-1].role not in ("user", "tool"):
            return item
        return self._prepare(replace(item.example, messages=(*messages, Message("assistant", STAND_IN))))

    def _with_prompt(
        self, tokenized: TokenizedExample, item: _Prepared, template: ChatTemplate
    ) -> TokenizedExample | Rejected:
        """Add the prompt and the reference of the last assistant turn."""
        given = item.rendered.given
        last = given.assistant_turns[-1]
        prompt = template.render(given.turns[:last], given.tools, True)
        if item.thoughts and (plain := item.without_thoughts):
            prompt = item.thoughts.prompt(plain.text, plain.spans, prompt)
        media: tuple[Medium, ...] = ()
        text, places = prompt, ()
        if self.images and template.images and item.written:
            asked = max(index for index, message in enumerate(item.example.messages) if message.role == "assistant")
            media = media_of(item.example.messages[:asked])
            if prompt.count(MEDIUM) != len(media):
                reason = f"the chat template writes {prompt.count(MEDIUM)} of {len(media)} images into the prompt"
                return Rejected(tokenized.source, tokenized.record, f"{reason}; set another model.chat_template")
            text, _, places = write_media(prompt, (), self.images.written(media, template.images))
        if item.escaped:
            encoded = self._encode_escaped(text, places)
        elif places:
            encoded = next(self.encode_spans([text], [places]))
        else:
            encoded = np.asarray(self._encode(text), np.int32), []
        ids, placed = self._added_to(text, *encoded)
        reference = given.turns[last].get("content")
        if given.turns[last].get("tool_calls") or not isinstance(reference, str):
            start, end = item.rendered.spans[-1]
            reference = item.rendered.text[start:end]
        prompt, reference = (unescape(each).replace(MEDIUM, template.words) for each in (prompt, reference))
        return replace(
            tokenized, prompt=prompt, prompt_ids=ids, reference=reference, prompt_media=_placed(media, placed)
        )

    def _encode_escaped(self, text: str, spans: Sequence[Span]) -> Encoded:
        """Encode a text with escaped control tokens, and find the tokens of its spans."""
        ids, offsets = self.control_tokens.encode(text)
        return ids, [_bounds(tokens_in_spans(offsets, [span])) for span in spans]

    def _added_to(self, text: str, ids: np.ndarray, spans: list[Span]) -> Encoded:
        """Add the tokens that the processor would put around a conversation."""
        return self.added.put_around(text, ids, spans) if self.added else (ids, spans)

    def _text(self, item: _Prepared, ids: Sequence[int] | np.ndarray) -> Iterator[TokenizeResult]:
        """Label all of a text and its end-of-text token."""
        input_ids = self._with_eos(ids)
        if len(input_ids) < 2:
            yield Rejected(item.example.source, item.example.record, "the text has no tokens")
            return
        yield from self._fit_text(self._tokenized(item.example, input_ids, input_ids, item.counts))

    def _completion(self, item: _Prepared) -> Iterator[TokenizeResult]:
        """Label a completion. Its prompt is encoded separately, exactly as generation will encode it."""
        example = item.example
        prompt, reference = example.text[: example.prompt_length], example.text[example.prompt_length :]
        prompt_ids = self._with_bos(prompt, item.escaped)
        input_ids = self._with_eos([*prompt_ids, *self._encode_text(reference, item.escaped)])
        turn = (len(prompt_ids), len(input_ids))
        tokenized = self._tokenized(example, input_ids, self._labels(input_ids, [turn]), item.counts)
        if self.options.with_prompts:
            ids = np.asarray(prompt_ids, np.int32)
            tokenized = replace(tokenized, prompt=prompt, prompt_ids=ids, reference=reference)
        if example.unanswered:
            yield _prompt_alone(tokenized)
        else:
            yield from fit_to_row(tokenized, [turn], self.options)

    def _ids(self, example: Example) -> Iterator[TokenizeResult]:
        """Take ids and labels from a record that is already tokenized."""
        ids = np.asarray(example.ids, np.int32)
        labels = np.asarray(example.labels, np.int32)
        reason = ""
        for name, values in (("input_ids", ids), ("labels", labels)):
            if int(values.max()) >= self.vocab_size:
                reason = reason or (
                    f"{name} contains token {values.max()}, but the tokenizer's ids end at {self.vocab_size - 1}; "
                    "tokenize the data with the tokenizer of model.path"
                )
        token = self.processor.image_token if self.processor else ""
        if token and self.backend.token_to_id(token) in ids:
            reason = reason or f"input_ids contain {token}, but the record has no images; remove it"
        if not reason and self.options.stage == "pt" and not np.array_equal(ids, labels):
            reason = "labels differ from input_ids, but stage: pt trains on every token; remove the labels"
        if reason:
            yield Rejected(example.source, example.record, reason)
            return
        yield from self._fit_text(self._tokenized(example, ids, labels))

    def _fit_text(self, tokenized: TokenizedExample) -> Iterator[TokenizeResult]:
        """Fit a text into a row, except in continued pre-training, where the row plan cuts it."""
        if self.options.stage == "pt":
            yield tokenized
        else:
            yield from fit_to_row(tokenized, [(0, len(tokenized.input_ids))], self.options)

    def _tokenized(
        self, example: Example, ids: np.ndarray, labels: np.ndarray, counts: tuple[tuple[str, int], ...] = ()
    ) -> TokenizedExample:
        """Assemble an example that is not a conversation."""
        observations = self.inspector.inspect_ids(ids, labels)
        return TokenizedExample(
            example.source, example.record, ids, labels, example.weight, counts=counts, observations=observations
        )

    def _labels(self, ids: np.ndarray, spans: Sequence[Span], media: Sequence[Span] = ()) -> np.ndarray:
        """[tokens] int32 labels: tokens in the spans, or all with ``data.train_on_prompt``, except those of images."""
        if self.options.train_on_prompt and not media:
            return ids
        labels = np.full(len(ids), IGNORE_INDEX, np.int32)
        for start, end in [(0, len(ids))] if self.options.train_on_prompt else spans:
            labels[start:end] = ids[start:end]
        for start, end in media:
            labels[start:end] = IGNORE_INDEX
        return labels

    def _encode(self, text: str, special: bool = False) -> list[int]:
        return self.backend.encode(text, add_special_tokens=special).ids

    def _with_bos(self, text: str, escape: bool) -> list[int]:
        """Encode a text, preceded by the special tokens that the tokenizer begins with."""
        bos = [token for token in self._encode("", special=True) if token != self.eos]
        return [*bos, *self._encode_text(text, escape)]

    def _encode_text(self, text: str, escape: bool) -> list[int]:
        return (
            self.control_tokens.encode(self.control_tokens.escape(text))[0].tolist() if escape else self._encode(text)
        )

    def _with_eos(self, ids: Sequence[int] | np.ndarray) -> np.ndarray:
        """[tokens] int32 ids with the end-of-text token at the end."""
        return np.asarray(ids if len(ids) and ids[-1] == self.eos else [*ids, self.eos], np.int32)


def _placed(media: Sequence[Medium], spans: Sequence[Span]) -> tuple[TokenizedMedium, ...]:
    return tuple(
        TokenizedMedium(medium.kind, medium.location, medium.digest, medium.width, medium.height, *span, medium.size)
        for medium, span in zip(media, spans, strict=True)
    )


def _prompt_alone(tokenized: TokenizedExample) -> TokenizedExample | Rejected:
    """Drop the stand-in answer of an example. Such an example has no loss, so one token in a row is enough."""
    if not len(tokenized.prompt_ids):
        return Rejected(tokenized.source, tokenized.record, "the prompt has no tokens")
    return replace(
        tokenized,
        input_ids=tokenized.prompt_ids[:1],
        labels=np.full(1, IGNORE_INDEX, np.int32),
        reference="",
        media=(),
        counts=(*tokenized.counts, ("unanswered", 1)),
    )


def _bounds(inside: Sequence[bool]) -> Span:
    """[start, end) of the True values; (0, 0) if there are none."""
    positions = np.flatnonzero(inside)
    return (int(positions[0]), int(positions[-1]) + 1) if len(positions) else (0, 0)
