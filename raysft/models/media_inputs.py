"""What a model for text and images is given beside the tokens."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

OF_TEXT = ("input_ids", "attention_mask", "token_type_ids", "mm_token_type_ids")
"""What a processor makes of the text."""


def media_inputs(processor: Any, images: Sequence[Any]) -> dict[str, Any]:
    """Make the inputs for some images as the processor does for one text that has them in this order.

    Args:
        processor: of the model (``models.processor``).
        images: PIL images in RGB.

    Returns:
        Tensors by name: ``pixel_values`` and what else the model takes.
    """
    made = processor(text=[processor.image_token * len(images)], images=[list(images)], return_tensors="pt")
    return {name: values for name, values in made.items() if name not in OF_TEXT}
