"""The images that an estimate counts."""

from __future__ import annotations

from dataclasses import dataclass

from raysft.models.processor import ProcessorFiles


@dataclass(frozen=True)
class ImagesOfRows:
    """The images of the rows of a microbatch."""

    processor: ProcessorFiles
    """Of the model."""
    width: int
    """Pixels of one of the images that have the most tokens."""
    height: int
    per_row: float
    """How many of that size have as many tokens as the images of a row."""
