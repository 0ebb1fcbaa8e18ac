"""The frozen model that ASFT keeps the trained one close to."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from raysft.config import Config
from raysft.models.peft_internals import TRAINED, using_adapter
from raysft.train.finetuning import load_frozen
from raysft.train.new_adapter import add_adapter_beside

START = "start"
"""Name of the adapter that preserves the initial state of the trained one."""


class Reference(nn.Module):
    """A separate model, or the trained model with another adapter or with none.

    It computes without dropout and gets no gradients.
    """

    def __init__(self, model: nn.Module | None = None, adapter: str | None = None) -> None:
        """
        Args:
            model: the model, none of whose weights are trained. Default: the trained one.
            adapter: in a trained model, the adapter used instead of the trained one. Default: none.
        """
        super().__init__()
        self.model, self.adapter = model, adapter

    def train(self, mode: bool = True) -> Reference:
        """Stay unchanged."""
        return super().train(False)

    @contextmanager
    def standing_in(self, trained: Any) -> Iterator[Any]:
        """Yield the model to compute with, while no gradients are recorded.

        Args:
            trained: the trained model.
        """
        with torch.no_grad():
            if self.model is not None:
                yield self.model
                return
            training = trained.training
            trained.eval()  # the start adapter has dropout too, also on the head
            try:
                with using_adapter(trained, self.adapter):
                    yield trained
            finally:
                trained.train(training)


def make_reference(config: Config, trained: Any, start: str, given: str | None, device: torch.device) -> Reference:
    """Make the reference of ``train.reference_model``, or of the model that training starts from.

    Args:
        config: the run's config.
        trained: the model from ``load_model``, whose weights no checkpoint has replaced yet.
        start: folder or Hub id that it was loaded from.
        given: the same for ``train.reference_model``, which may be an adapter.
        device: where quantized weights go; the caller moves other weights.
    """
    if given is not None:
        return Reference(load_frozen(config, given, device))
    if not config.copies_start:
        return Reference()
    if hasattr(trained, "peft_config"):
        _keep_start(trained)
        return Reference(adapter=START)
    frozen = load_frozen(config, start, device)
    _share_frozen(frozen, trained)
    return Reference(frozen)


def _keep_start(trained: Any) -> None:
    """Give a model a second adapter that is equal to the trained one and is not trained."""
    wanted = {name: weight for name, weight in trained.named_parameters() if weight.requires_grad}
    adapter_config = copy.deepcopy(trained.peft_config[TRAINED])
    adapter_config.init_lora_weights = True  # its initial weights are replaced
    add_adapter_beside(trained, START, adapter_config)
    weights = dict(trained.named_parameters())
    with torch.no_grad():
        for name, weight in wanted.items():
            before, _, after = name.rpartition(f".{TRAINED}")
            weights[f"{before}.{START}{after}"].data = weight.detach().clone()
    for name, weight in weights.items():
        weight.requires_grad_(name in wanted)


def _share_frozen(frozen: Any, trained: Any) -> None:
    """Let both models share the weights that are not trained."""
    shared = dict(trained.named_parameters(remove_duplicate=False))
    for name, _ in list(frozen.named_parameters(remove_duplicate=False)):
        if not shared[name].requires_grad:
            place, _, last = name.rpartition(".")
            setattr(frozen.get_submodule(place), last, shared[name])
