"""Trainings of models for text and images beside a plain loop over single examples."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import numpy as np
from transformers import AutoModelForImageTextToText

from tests.training import Result


def is_language(name: str) -> bool:
    """True for a weight of the language model, told by its name in the families of ``tiny_vision``."""
    return not any(part in name for part in ("vis", "projector", "connector", "newline"))


def weights_of(model: Any) -> dict[str, np.ndarray]:
    """Copies of all weights."""
    return {name: weight.detach().clone().numpy() for name, weight in model.named_parameters()}


def assert_as_plain(
    result: Result,
    plain: tuple[Sequence[float], Sequence[float], Mapping[str, np.ndarray]],
    begun: Mapping[str, np.ndarray],
    trained: Collection[str],
) -> None:
    """Compare a training with a plain loop, and the model that it saved.

    Args:
        result: of the training.
        plain: losses, norms of gradients and weights of the loop.
        begun: weights at the start, which all others than the trained ones keep.
        trained: names of the trained weights.
    """
    losses, norms, weights = plain
    assert not result.failure
    assert 0 < len(trained) <= len(begun)
    np.testing.assert_allclose(result.losses, losses, rtol=1e-5)
    np.testing.assert_allclose(result.norms, norms, rtol=1e-4)
    saved = weights_of(AutoModelForImageTextToText.from_pretrained(result.model))
    assert saved.keys() == begun.keys()
    for name, weight in saved.items():
        expected = weights[name] if name in trained else begun[name]
        np.testing.assert_allclose(weight, expected, rtol=1e-5, atol=1e-5, err_msg=name)
