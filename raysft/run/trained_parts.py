"""Whether the data reaches the parts of a model that are trained."""

from __future__ import annotations

from collections.abc import Iterable

from raysft.config import Config
from raysft.data.shards.manifest import Manifest
from raysft.errors import RequestError, as_yaml


def check_images(config: Config, manifests: Iterable[Manifest]) -> None:
    """Refuse to train the parts that process images on text alone: they would stay unchanged.

    Args:
        config: the run's config.
        manifests: of the training sources.
    """
    parts = config.model.train_parts
    beside = [part for part in parts if part != "language"]
    if not beside or any(manifest.media for manifest in manifests):
        return
    raise RequestError(
        f"model.train_parts={as_yaml(parts)} trains {' and '.join(beside)} on images, but data.train has none; set "
        "model.train_parts=[language], or add data with images"
    )


def refuse_shared_images(config: Config, manifests: Iterable[Manifest]) -> None:
    """Refuse images in rows that several workers compute together.

    Args:
        config: the run's config.
        manifests: of all data that goes through the model in rows.
    """
    size = config.scaling.sequence_parallel
    if size > 1 and (name := next((each.name for each in manifests if each.media), "")):
        raise RequestError(
            f"scaling.sequence_parallel={size} only supports text, but {name} has images; use scaling.sequence_parallel=1, or "
            "text-only data"
        )
