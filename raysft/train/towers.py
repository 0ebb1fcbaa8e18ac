"""The parts of a model that only images go through, called for every microbatch where all workers must call them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from raysft.errors import RunFailed
from raysft.models.attention import without_adapters
from raysft.models.media_inputs import kinds_argument, media_inputs
from raysft.models.model_parts import part_of
from raysft.models.processor import NEIGHBOUR
from raysft.train.objective import embedding_noise

FEATURES = ("pooler_output", "deepstack_features")
"""What a decoder takes from ``get_image_features``."""


class Towers:
    """Knows what a model needs besides tokens, positions and pixels.

    With ZeRO-3, calling a tower gathers its weights from all workers; with trained weights in a tower, each worker must have
    gradients for them. So where either holds, a microbatch without images sends one blank image through the towers, and adds 0
    times their output to the embeddings. Nothing enters the rows.
    """

    def __init__(self, model: Any, processor: Any, device: torch.device, partitioned: bool) -> None:
        """
        Args:
            model: the transformers or peft model.
            processor: of the model.
            device: where it computes.
            partitioned: with ZeRO-3.

        Raises:
            RunFailed: the model takes no images.
        """
        whole = without_adapters(model)
        decoder = whole.base_model
        if not hasattr(decoder, "get_image_features"):
            raise RunFailed(
                f"{type(whole).__name__} does not accept images, but the data has some; use a vision-language model"
            )
        part = part_of(whole)
        trained = any(weight.requires_grad and part(name) != "language" for name, weight in whole.named_parameters())
        self._blank = (
            {name: values.to(device) for name, values in _blank(processor).items()} if partitioned or trained else None
        )
        self._kinds, self._image = kinds_argument(decoder), getattr(decoder.config, "image_token_id", None)

    def kinds(self, input_ids: torch.Tensor) -> dict[str, torch.Tensor]:
        """Return the kind of each token, for a model in which the tokens of an image attend to each other both ways."""
        return {} if self._kinds is None else {self._kinds: (input_ids == self._image).long()}

    def called(self, decoder: Any, embedded: torch.Tensor) -> torch.Tensor:
        """Return the embeddings of rows without images, after calling the towers if all workers call them."""
        if self._blank is None:
            return embedded
        total = torch.stack([part.float().sum() for part in features_of(decoder, self._blank)]).sum()
        return embedded + (0 * total).to(embedded.dtype)


def features_of(decoder: Any, images: dict[str, torch.Tensor]) -> list[torch.Tensor]:
    """Return what a decoder takes from the features of images (``media_inputs``)."""
    features = decoder.get_image_features(**images)
    return [part for name in FEATURES for part in _tensors(getattr(features, name, None))]


@contextmanager
def changed_embeddings(
    decoder: Any, towers: Towers | None, text_alone: bool, noise: tuple[float, torch.Tensor] | None
) -> Iterator[None]:
    """Add noise to the embeddings that a model looks up in the block, and call the towers where nothing else does.

    Args:
        decoder: the model without its output head.
        towers: None if the data has no images.
        text_alone: the microbatch has no images.
        noise: its strength, and the length of the example of each token, in the shape of the tokens; None for none.
    """

    def changed(module: Any, arguments: Any, embedded: torch.Tensor) -> torch.Tensor:
        if noise is not None:
            alpha, lengths = noise
            added = embedding_noise(lengths, embedded.shape[-1], alpha)
            embedded = embedded + added.to(embedded.dtype).reshape(embedded.shape)
        return towers.called(decoder, embedded) if text_alone and towers is not None else embedded

    if noise is None and towers is None:
        yield
        return
    hook = decoder.get_input_embeddings().register_forward_hook(changed)
    try:
        yield
    finally:
        hook.remove()


def _blank(processor: Any) -> dict[str, torch.Tensor]:
    from PIL import Image

    return media_inputs(processor, [[Image.new("RGB", NEIGHBOUR)]])


def _tensors(values: Any) -> Iterator[torch.Tensor]:
    """Yield the tensors in nested lists."""
    if isinstance(values, torch.Tensor):
        yield values
    elif isinstance(values, list | tuple):
        for value in values:
            yield from _tensors(value)
