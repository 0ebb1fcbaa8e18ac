"""The private parts of peft that raysft uses, in one place; ``tests/contracts/test_peft.py`` checks that they exist."""

from __future__ import annotations

from typing import Any


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
