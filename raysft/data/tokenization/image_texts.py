"""Write the tokens of images into rendered conversations."""

from __future__ import annotations

import re
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate

import numpy as np

from raysft.data.tokenization.image_words import ImageWords
from raysft.data.tokenization.span_search import Span
from raysft.data.tokenization.tokenizer import TokenizingProcessor
from raysft.data.types import MEDIUM, Medium, Message
from raysft.errors import RequestError, one_line
from raysft.models.processor import differs_alone, image_text, processor_ids

CACHED_SIZES = 10_000
"""Sizes of images whose text is remembered."""


@dataclass(frozen=True)
class Written:
    """A conversation with the texts of its images."""

    text: str
    spans: tuple[Span, ...]
    """What the assistant wrote in each of its turns."""
    media: tuple[Span, ...]
    """The images, with the tags around them."""


def media_of(messages: Sequence[Message]) -> tuple[Medium, ...]:
    """Return the media of a conversation, in order."""
    return tuple(medium for message in messages for medium in message.media)


class ImageTexts:
    """The texts that a model's processor puts in place of images."""

    def __init__(self, processor: TokenizingProcessor) -> None:
        self.processor = processor
        self.checked: set[bool] = set()  # with one image (False), with several (True)
        self.text_of_size = lru_cache(CACHED_SIZES)(self._text_of_size)

    def _text_of_size(self, width: int, height: int, beside: bool) -> str:
        return image_text(self.processor.files.load(), width, height, beside)

    def of(self, medium: Medium, beside: bool) -> str:
        """Return the text that stands for an image: its size decides it.

        Args:
            medium: the image.
            beside: True if its conversation has others.

        Raises:
            ValueError: the processor refuses an image of this size.
            RequestError: the processor cannot be loaded.
        """
        try:
            # Most need not be asked about a size twice.
            beside = beside and differs_alone(self.processor.files.load())
            return self.text_of_size(medium.width, medium.height, beside)
        except RequestError:
            raise
        except Exception as error:  # of any type: the processor's code raises it
            size = f"{medium.width} × {medium.height} pixels"
            raise ValueError(
                f"{medium.location}: the processor rejects an image of {size} ({one_line(error)}); remove it"
            ) from None

    def check(self, text: str, media: Sequence[Medium], ids: np.ndarray) -> None:
        """Check the tokens of a conversation with images against those of the processor, for the first with one and with several.

        Args:
            text: the conversation, with the processor's token for each image.
            media: its images.
            ids: its tokens.

        Raises:
            RequestError: the processor does more with a conversation than to put texts in place of images.
        """
        if (several := len(media) > 1) in self.checked:
            return
        processor = self.processor.files.load()
        sizes = [(medium.width, medium.height) for medium in media]
        if processor_ids(processor, text, sizes) != ids.tolist():
            raise RequestError(
                f"model: {type(processor).__name__} tokenizes conversations with images differently from the text that it "
                f"inserts in place of {self.processor.image_token}; such a model cannot be trained on images; use another model"
            )
        self.checked.add(several)

    def written(self, media: Sequence[Medium], words: ImageWords) -> list[str]:
        """Return all that is written for each image of a conversation: its text, with the tags that the template puts around it."""
        return [words.words.replace(words.token, self.of(medium, len(media) > 1)) for medium in media]

    def differ_alone(self, media: Sequence[Medium]) -> bool:
        """True if an image of a conversation with several would have another text if it were the only one."""
        return any(self.of(medium, True) != self.of(medium, False) for medium in media)


def write_media(
    text: str, spans: Sequence[Span], written: Sequence[str]
) -> tuple[str, tuple[Span, ...], tuple[Span, ...]]:
    """Write texts where ``MEDIUM`` stands, one for each.

    Returns:
        The text, its spans at their new places, and the spans of what was written.

    >>> write_media(f"a{MEDIUM}b", [(1, 3)], ["<i><i>"])
    ('a<i><i>b', ((1, 8),), ((1, 7),))
    """
    places = [match.start() for match in re.finditer(MEDIUM, text)]
    gains = [0, *accumulate(len(each) - len(MEDIUM) for each in written)]
    media = tuple(
        (place + gain, place + gain + len(each)) for place, gain, each in zip(places, gains, written, strict=False)
    )
    moved = tuple(
        (start + gains[bisect_left(places, start)], end + gains[bisect_left(places, end)]) for start, end in spans
    )
    pieces = text.split(MEDIUM)
    whole = "".join(piece for pair in zip(pieces, written, strict=False) for piece in pair) + pieces[-1]
    return whole, moved, media
