"""Settings of the loss that cannot be combined."""

from __future__ import annotations

from collections.abc import Iterator

from raysft.config.config import Config


def loss_conflicts(config: Config) -> Iterator[str]:
    """Yield what is wrong with the settings of the loss, as ``conflicts`` words it."""
    train = config.train
    if train.label_smoothing and train.loss != "cross_entropy":
        yield (
            f"train.label_smoothing={train.label_smoothing:g} requires train.loss=cross_entropy, but train.loss={train.loss}; "
            "set only one of them"
        )
    if train.reference_model is not None and train.loss != "asft":
        yield (
            f"train.reference_model={train.reference_model} is used only by train.loss=asft, but train.loss={train.loss}; set "
            "train.loss=asft or remove train.reference_model"
        )
