"""The private parts of peft that raysft uses, in one place; ``tests/contracts/test_peft.py`` checks that they exist."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

TRAINED = "default"
"""The name that peft gives to a model's first adapter, which is trained."""


def fit_to_model(adapter_config: Any, model: Any, conversions: Any) -> None:
    """Change an adapter's configuration as ``get_peft_model`` does, for experts whose weights transformers has merged.

    Args:
        adapter_config: peft's configuration, changed in place.
        model: the transformers model.
        conversions: how transformers merges its weights.
    """
    from peft.utils.transformers_weight_conversion import convert_peft_config_for_transformers

    convert_peft_config_for_transformers(adapter_config, model=model, conversions=conversions)


def parameter_adapters(model: Any) -> list[Any]:
    """Return the modules whose parameters, rather than layers, have adapters, as those of experts do."""
    from peft.tuners.lora.layer import ParamWrapper

    return [module for module in model.modules() if isinstance(module, ParamWrapper)]


@contextmanager
def using_adapter(model: Any, name: str | None) -> Iterator[None]:
    """Compute with another of a model's adapters, or with none: modules that are trained in full then have their original form.

    peft's own ways to switch also change which weights are trained, which an engine that holds them would not notice.
    """
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils.other import AuxiliaryTrainingWrapper

    layers: list[Any] = [
        each for each in model.modules() if isinstance(each, BaseTunerLayer | AuxiliaryTrainingWrapper)
    ]
    before = [(layer._disable_adapters, layer._active_adapter) for layer in layers]
    for layer in layers:
        layer._disable_adapters, layer._active_adapter = name is None, layer._active_adapter if name is None else [name]
    try:
        yield
    finally:
        for layer, (disabled, active) in zip(layers, before, strict=True):
            layer._disable_adapters, layer._active_adapter = disabled, active
