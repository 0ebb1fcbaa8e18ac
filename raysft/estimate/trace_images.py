"""What encoding images needs, measured on the real classes of a model's tower and projector without their memory.

Unlike the decoder, they are traced whole, on torch's device ``meta``: some towers lay out their work by the sizes of the images,
which are tensors that need values.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from raysft.config import Config
from raysft.estimate.fake_attention import NAME, fake_attention
from raysft.estimate.images_of_rows import ImagesOfRows
from raysft.estimate.sizes import Images, Line
from raysft.estimate.trace import forget_gradient
from raysft.models.attention import without_adapters
from raysft.models.media_inputs import media_inputs
from raysft.models.model_parts import whole_modules
from raysft.models.torch_internals import LiveMetaBytes, all_chosen
from raysft.models.transformers_internals import attention_implementation, can_set_attention
from raysft.train.towers import features_of


def trace_images(config: Config, model: Any, images: ImagesOfRows) -> Images:
    """Trace the tower and the projector of a model of ``model_without_weights``.

    Args:
        config: the run's config.
        model: on the device ``meta``.
        images: what it is given.

    Raises:
        Exception: of any type; the model or its processor cannot be used without values.
    """
    from PIL import Image

    whole, processor = without_adapters(model), images.processor.load()
    model.train()
    hooks = [
        weight.register_post_accumulate_grad_hook(forget_gradient)
        for weight in model.parameters()
        if weight.requires_grad
    ]
    try:
        with _fake_attention(whole, config), all_chosen():
            blank = Image.new("RGB", (images.width, images.height))
            one, two = (_run(whole, media_inputs(processor, [[blank]] * count)) for count in (1, 2))
    finally:
        for hook in hooks:
            hook.remove()
    pixels, saved, forward, backward = map(Line.through, one, two)
    return Images(pixels, saved, forward, backward)


@contextmanager
def _fake_attention(whole: Any, config: Config) -> Iterator[None]:
    """Give the towers kernels that need the memory of the training's; they have no mask."""
    from transformers import AttentionInterface

    used = attention_implementation(whole)
    if used == "eager" or not can_set_attention(whole):
        yield
        return
    AttentionInterface.register(NAME, fake_attention(masked=False, copies=False, drops=config.scaling.use_gpu))
    whole.set_attn_implementation(NAME)
    try:
        yield
    finally:
        whole.set_attn_implementation(used)


def _run(whole: Any, inputs: dict[str, torch.Tensor]) -> tuple[float, float, float, float]:
    """Run forward and backward once; returns the bytes of ``Images``."""
    pixels = sum(values.nbytes for values in inputs.values())
    inputs = {name: values.to("meta") if values.is_floating_point() else values for name, values in inputs.items()}
    live = LiveMetaBytes()
    live.ignore([*whole.parameters(), *whole.buffers(), *inputs.values()])
    with live:
        features = _features(whole, inputs)
        trained = [each for each in features if each.requires_grad]
        saved, forward = live.now if trained else 0, live.peak
        live.peak = live.now
        torch.autograd.backward(trained, [torch.empty_like(each) for each in trained])
    return pixels, saved, forward, live.peak if trained else 0


def _features(whole: Any, inputs: dict[str, torch.Tensor]) -> list[torch.Tensor]:
    """Encode images; returns what the decoder takes."""
    projected: list[torch.Tensor] = []
    modules = [whole.get_submodule(name) for name in whole_modules(whole, "projector")]
    hooks = [module.register_forward_hook(lambda module, given, made: projected.append(made)) for module in modules]
    try:
        return features_of(whole.base_model, inputs)
    except Exception:  # of models that then sort the features by values of their inputs
        if not projected:
            raise
        return projected[-1:]
    finally:
        for hook in hooks:
            hook.remove()
