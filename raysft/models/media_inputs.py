"""What a vision-language model is given besides the tokens."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Sequence
from itertools import groupby, pairwise
from typing import TYPE_CHECKING, Any

import numpy as np

from raysft.models.processor import differs_alone, image_text

if TYPE_CHECKING:
    import torch

OF_TEXT = ("input_ids", "attention_mask", "token_type_ids", "mm_token_type_ids")
"""What a processor makes of the text."""


def media_inputs(processor: Any, examples: Iterable[Sequence[Any]], apart: bool = False) -> dict[str, Any]:
    """Make the inputs for the images of some examples as the processor does.

    Args:
        processor: of the model (``models.processor``).
        examples: the PIL images of each, in RGB.
        apart: give the processor one text for each example, even if it makes the same of one text with all images. Some then
            give all examples as many images as one has.

    Returns:
        Tensors by name: ``pixel_values`` and what else the model takes.
    """
    shown = [list(images) for images in examples if images]
    if not (apart or differs_alone(processor)):
        shown = [[image for images in shown for image in images]]
    texts = [processor.image_token * len(images) for images in shown]
    # The texts stay lists: padding is a setting of the tokenizer, which other threads use at the same time.
    made = processor(text=texts, images=shown, images_kwargs={"return_tensors": "pt"}, verbose=False)
    return {name: values for name, values in made.items() if name not in OF_TEXT}


def by_example(media: Sequence[Any], position_ids: Any) -> list[list[Any]]:
    """Return the media of a row (``RowMedium``) example by example.

    Args:
        media: in order of position.
        position_ids: [tokens], starting at 0 in each example.
    """
    begins = np.flatnonzero(np.asarray(position_ids) == 0)
    return [list(group) for _, group in groupby(media, lambda medium: np.searchsorted(begins, medium.start, "right"))]


def image_tokens(processor: Any, image: Any) -> list[int]:
    """Return the placeholder tokens of an image."""
    text = image_text(processor, *image.size)
    return [int(token) for token in processor.tokenizer(text, add_special_tokens=False)["input_ids"]]


def kinds_argument(decoder: Any) -> str | None:
    """Return the name under which a model takes the kind of each token (1: of an image), if it has no positions for that."""
    if has_planes(decoder):
        return None
    known = inspect.signature(decoder.forward).parameters
    return next((name for name in ("token_type_ids", "mm_token_type_ids") if name in known), None)


def has_planes(decoder: Any) -> bool:
    """True if a model has positions in time, height and width."""
    return hasattr(decoder, "get_rope_index")


def rope_planes(
    decoder: Any,
    input_ids: torch.Tensor,
    position_ids: torch.Tensor,
    starts: Sequence[Sequence[int]],
    grids: torch.Tensor,
) -> torch.Tensor:
    """Make the positions of rows with images for a model that has them in time, height and width.

    Args:
        decoder: the model without its output head.
        input_ids: [rows, tokens].
        position_ids: [rows, tokens], starting at 0 in each example.
        starts: for each row the first token of each of its images, in order.
        grids: [images of all rows, 3] their patches in time, height and width.

    Returns:
        [4, rows, tokens]: the given positions, which keep examples apart, and those in time, height and width, of each example as
        if it were alone.
    """
    planes, used = position_ids.repeat(4, 1, 1), 0
    for row, images in enumerate(starts):
        begins = [*(position_ids[row] == 0).nonzero().flatten().tolist(), position_ids.shape[1]]
        for begin, end in pairwise(begins):
            count = sum(begin <= start < end for start in images)
            if not count:
                continue
            ids = input_ids[row : row + 1, begin:end]
            kinds = (ids == decoder.config.image_token_id).int()
            of_example, _ = decoder.get_rope_index(
                ids, mm_token_type_ids=kinds, image_grid_thw=grids[used : used + count]
            )
            planes[1:, row, begin:end] = of_example[:, 0]
            used += count
    return planes
