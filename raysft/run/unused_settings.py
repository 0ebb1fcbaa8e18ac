"""Training settings that have no effect given others. They are not errors: the trials of a sweep may differ in the others."""

from __future__ import annotations

from collections.abc import Iterator

from raysft.config import TrainSection

LOSSES = {"asft_alpha": "asft", "eaft_alpha": "eaft"}
"""Key → the loss that reads it."""


def unused_settings(train: TrainSection) -> Iterator[str]:
    """Yield a line for each setting that has no effect.

    >>> list(unused_settings(TrainSection(loss="dft", asft_alpha=0.5)))
    ['train.asft_alpha=0.5 has no effect with train.loss=dft; set train.loss=asft, or remove it']
    """
    for key, loss in LOSSES.items():
        if train.loss != loss and _is_set(train, key):
            yield (
                f"train.{key}={getattr(train, key):g} has no effect with train.loss={train.loss}; set train.loss={loss}, or "
                "remove it"
            )
    warm_up = "warmup_ratio" if train.warmup_steps is None else "warmup_steps"
    if train.schedule == "constant" and getattr(train, warm_up) and _is_set(train, warm_up):
        yield (
            f"train.{warm_up}={getattr(train, warm_up):g} has no effect with train.schedule=constant, which has no warm-up; set "
            "train.schedule=constant_with_warmup, or remove it"
        )


def _is_set(train: TrainSection, key: str) -> bool:
    return getattr(train, key) != TrainSection.model_fields[key].default
