"""A check before training that images only affect their own examples, whatever is packed next to them."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from raysft.errors import RequestError, one_line
from raysft.models.attention import NoPositions, use_plain, without_adapters
from raysft.models.media_inputs import has_planes, image_tokens, kinds_argument, media_inputs, rope_planes
from raysft.train.check_states import difference_of
from raysft.train.loss import TokenLoss

SIZES = ((60, 90), (150, 60))
"""Pixels of the images of two examples: (width, height)."""
TEXTS = ((3, 4), (6, 2))
"""Tokens before and after the image of each."""
ROUNDING = 1e-3
"""The most that rounding changes, as a share of the largest hidden state: rows of a different length are summed in a different
order, which many layers amplify. Real errors change a quarter or more."""


@torch.no_grad()
def check_images(model: TokenLoss, processor: Any, device: torch.device, packed: bool) -> None:
    """Check that examples with images have the same hidden states side by side as alone.

    Args:
        model: with its towers, on the device.
        processor: of the model.
        device: where the model is.
        packed: True if rows hold several examples.

    Raises:
        RequestError: they do not, or the model cannot be given images in this way.
    """
    whole = without_adapters(model.model)
    name, decoder = type(whole).__name__, whole.base_model
    if getattr(whole, "is_loaded_in_8bit", False):
        return  # LLM.int8 rounds each token depending on the whole batch
    try:
        difference = _difference(model, decoder, processor, device, packed)
    except NoPositions:
        use_plain(whole)
        difference = _difference(model, decoder, processor, device, packed)
    except Exception as error:  # of any type: raised by the code of the model and its processor
        raise RequestError(
            f"{name} cannot be trained on images ({type(error).__name__}: {one_line(error)}); use another model, or text-only "
            "data"
        ) from error
    if difference:
        remedy = "set data.packing=false" if packed else "use another model, or text-only data"
        raise RequestError(
            f"{name} does not keep the examples of a row apart if they have images: hidden states differ by {difference:.2g} "
            f"from those of single examples; {remedy}"
        )


def _difference(model: TokenLoss, decoder: Any, processor: Any, device: torch.device, packed: bool) -> float:
    """Return the largest difference in hidden states between examples alone and side by side in two rows; 0 if it is rounding."""
    from PIL import Image

    draw, pictures, examples, starts = np.random.default_rng(0), [], [], []
    for (width, height), (before, after) in zip(SIZES, TEXTS, strict=True):
        pictures.append(Image.fromarray(draw.integers(0, 256, (height, width, 3), np.uint8)))
        image = image_tokens(processor, pictures[-1])
        examples.append(torch.tensor([*range(before), *image, *range(after)], device=device))
        starts.append(before)
    alone = [
        _alone(decoder, ids[None], start, _to(media_inputs(processor, [[picture]]), device))
        for ids, start, picture in zip(examples, starts, pictures, strict=True)
    ]
    rows = [[0, 1], [1, 0]] if packed else [[0], [1]]
    width = max(sum(len(examples[number]) for number in row) for row in rows)
    input_ids = torch.zeros(len(rows), width, dtype=torch.long, device=device)
    position_ids = torch.arange(width, device=device).repeat(len(rows), 1)
    places: list[tuple[int, int, int]] = []
    for index, row in enumerate(rows):
        begin = 0
        for number in row:
            end = begin + len(examples[number])
            input_ids[index, begin:end] = examples[number]
            position_ids[index, begin:] = torch.arange(width - begin, device=device)
            places.append((index, begin, number))
            begin = end
        position_ids[index, begin:] = torch.arange(width - begin, device=device)
    images = media_inputs(processor, [[pictures[number]] for _, _, number in places])
    if has_planes(decoder):
        of_rows = [
            [begin + starts[number] for index, begin, number in places if index == row] for row in range(len(rows))
        ]
        cpu = rope_planes(decoder, input_ids.cpu(), position_ids.cpu(), of_rows, images["image_grid_thw"])
        position_ids = cpu.to(device)
    together = model.hidden_states(decoder, input_ids, position_ids, _to(images, device))
    model.hidden_states(decoder, torch.arange(8, device=device)[None], torch.arange(8, device=device)[None])
    differences = [
        difference_of(
            alone[number].float(), together[index, begin : begin + len(examples[number])].float(), decoder, ROUNDING
        )
        for index, begin, number in places
    ]
    return max(differences)


def _alone(decoder: Any, ids: torch.Tensor, start: int, images: dict[str, Any]) -> torch.Tensor:
    """Compute the hidden states of one example as transformers does: [tokens, size]."""
    positions = torch.arange(ids.shape[1], device=ids.device)[None]
    kinds = {}
    if has_planes(decoder):
        grids = images["image_grid_thw"].cpu()
        positions = rope_planes(decoder, ids.cpu(), positions.cpu(), [[start]], grids).to(ids.device)
    elif name := kinds_argument(decoder):
        kinds[name] = (ids == decoder.config.image_token_id).long()
    output = decoder(input_ids=ids, **images, **kinds, position_ids=positions, use_cache=False)
    return output.last_hidden_state[0]  # type: ignore[no-any-return]


def _to(images: dict[str, Any], device: torch.device) -> dict[str, Any]:
    return {name: values.to(device) for name, values in images.items()}
