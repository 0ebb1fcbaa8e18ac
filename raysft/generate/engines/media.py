"""Images of prompts, read and made into the inputs of a model by a thread, ahead of the model."""

from __future__ import annotations

import functools
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import torch

from raysft.data.types import TokenizedMedium
from raysft.media.files import Unreadable, read
from raysft.media.images import open_image, resized
from raysft.models.adapter_files import adapter_base
from raysft.models.media_inputs import media_inputs
from raysft.models.processor import has_processor, image_text, load_processor

READERS = 4
"""Threads that read and open the images of a batch: files on another machine take longer to come than to open."""
PIXEL_BYTES = 24
"""Bytes that a pixel takes as an input of a model: three float32 colours, twice for models that see videos as well."""
SIZES = 10_000
"""Sizes of images whose tokens are remembered."""
TOKEN_TYPES = ("mm_token_type_ids", "token_type_ids")
"""Inputs that say which tokens stand for an image; a processor makes at most one of them."""
_Item = TypeVar("_Item")
_Made = TypeVar("_Made")


@dataclass(frozen=True)
class BatchImages:
    """The images of a batch of prompts, as a model takes them."""

    faults: dict[int, str]
    """Why the images of a prompt cannot be used, by its number in the batch."""
    inputs: dict[tuple[int, ...], dict[str, torch.Tensor]]
    """For prompts that are read together: what the model takes besides their tokens. By their numbers among those without fault."""


class ImageInputs:
    """Make what a model takes besides the tokens of prompts with images.

    Args:
        folder: of the model, or of an adapter.
        runs_code: True if code that comes with the model may run.
        by_row: keep the images of each prompt together, as a beam search needs it to repeat them; else all are one after another.
    """

    def __init__(self, folder: Path, runs_code: bool, by_row: bool) -> None:
        self._folder, self._runs_code, self._by_row = folder, runs_code, by_row

    @functools.cached_property
    def processor(self) -> Any:
        """The model's, or that of its base if an adapter brings none."""
        return load_processor(processor_folder(self._folder), self._runs_code)

    def batch(
        self, media: Sequence[Sequence[TokenizedMedium]], groups: Callable[[list[int]], list[list[int]]]
    ) -> BatchImages:
        """Read and prepare the images of a batch.

        Args:
            media: of each prompt.
            groups: given the numbers of the prompts whose images can be used, says which of these, renumbered, are read together.
        """
        with ThreadPoolExecutor(READERS) as readers:
            read_prompts = list(readers.map(_images_of, media))
        faults = {number: images for number, images in enumerate(read_prompts) if isinstance(images, str)}
        usable = [images for images in read_prompts if not isinstance(images, str)]
        inputs = {}
        for members in groups([number for number in range(len(media)) if number not in faults]):
            shown = [usable[member] for member in members if usable[member]]
            if shown:
                inputs[tuple(members)] = self._made(shown)
        return BatchImages(faults, inputs)

    def _made(self, images: list[list[Any]]) -> dict[str, Any]:
        """Return what the model takes for prompts with these images."""
        return media_inputs(self.processor, images, apart=self._by_row)

    def token_types(self, rows: torch.Tensor) -> dict[str, torch.Tensor]:
        """Return which tokens of [rows, tokens] stand for an image, if the processor makes that."""
        name = self._token_types
        return {name: torch.tensor(self.processor.create_mm_token_type_ids(rows.tolist()))} if name else {}

    @functools.cached_property
    def _token_types(self) -> str:
        from PIL import Image

        processor = self.processor
        made = processor(text=[processor.image_token], images=[[Image.new("RGB", (64, 64))]])
        return next((name for name in TOKEN_TYPES if name in made), "")


def processor_folder(folder: Path) -> Path:
    """Return the folder of a model's processor: the model's own, or that of its base if an adapter brings none."""
    base = adapter_base(folder)
    return folder if base is None or has_processor(folder) else base


def _images_of(media: Sequence[TokenizedMedium]) -> list[Any] | str:
    """Return the images of a prompt, or why one of them cannot be used."""
    try:
        return [opened(medium) for medium in media]
    except Unreadable as error:
        return str(error)


def opened(medium: TokenizedMedium) -> Any:
    """Read an image, and bring it to the size that its tokens are for.

    Raises:
        Unreadable: it cannot be read, or has changed since its prompt was tokenized.
    """
    if medium.kind != "image":
        raise Unreadable(f"{medium.location}: is a {medium.kind}, but generation reads only images")
    content = read(medium.location, medium.digest)
    try:
        return resized(open_image(content), medium.width, medium.height)
    except Unreadable as error:
        raise Unreadable(f"{medium.location}: {error}") from None


def kept_media(
    prompt: Sequence[int], kept: Sequence[int], media: Sequence[TokenizedMedium], differs_alone: bool = False
) -> tuple[Sequence[int], list[TokenizedMedium]]:
    """Cut a prompt whose beginning was cut again if that left a part of an image; returns its tokens and images.

    Args:
        prompt: the whole prompt.
        kept: its tail.
        media: images of the whole prompt.
        differs_alone: an image that is left alone would have other tokens, so that it goes as well.

    >>> picture = TokenizedMedium("image", "a.png", "", 8, 8, start=1, stop=3)
    >>> kept_media([5, 9, 9, 6, 7], [9, 6, 7], [picture])
    ([6, 7], [])
    """
    cut = max(0, len(prompt) - len(kept))
    cut = next((each.stop for each in media if each.start < cut < each.stop), cut)
    whole = [each for each in media if each.start >= cut]
    if differs_alone and len(whole) == 1 < len(media):
        cut, whole = whole[0].stop, []
    return prompt[cut:], [replace(each, start=each.start - cut, stop=each.stop - cut) for each in whole]


class ImageWords:
    """What a chat template writes for images, in place of what the processor has made of it.

    Args:
        processor: of the model.
    """

    def __init__(self, processor: Any) -> None:
        self._processor = processor
        self._token: int = processor.tokenizer.convert_tokens_to_ids(processor.image_token)
        self._of_size = functools.lru_cache(SIZES)(self._tokens)

    def collapsed(self, prompt: Sequence[int], media: Sequence[TokenizedMedium]) -> list[int]:
        """Return a prompt with one token in place of those that stand for an image; tags around these stay."""
        tokens, end = [], 0
        for each in media:
            written = self._written(list(prompt[each.start : each.stop]), each, len(media) > 1)
            tokens += [*prompt[end : each.start], *written]
            end = each.stop
        return [*tokens, *prompt[end:]]

    def _written(self, tokens: list[int], medium: TokenizedMedium, beside: bool) -> list[int]:
        made = self._of_size(medium.width, medium.height, beside)
        starts = (at for at in range(len(tokens) - len(made) + 1) if tokens[at : at + len(made)] == made)
        start = next(starts, None)
        return [self._token] if start is None else [*tokens[:start], self._token, *tokens[start + len(made) :]]

    def _tokens(self, width: int, height: int, beside: bool) -> list[int]:
        text = image_text(self._processor, width, height, beside)
        return self._processor.tokenizer.encode(text, add_special_tokens=False)


def ahead(make: Callable[[_Item], _Made], items: Sequence[_Item]) -> Iterator[_Made]:
    """Yield what is made of each item, in order; a thread makes the next one meanwhile."""
    coming: deque[Future[_Made]] = deque()
    with ThreadPoolExecutor(1, "images") as thread:
        for item in items:
            coming.append(thread.submit(make, item))
            if len(coming) > 1:
                yield coming.popleft().result()
        while coming:
            yield coming.popleft().result()
