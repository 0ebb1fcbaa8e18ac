"""The private parts of torch's modules that raysft uses, in one place; ``tests/contracts/test_torch.py`` checks that they exist."""

from __future__ import annotations

from torch import nn


def has_hooks(module: nn.Module) -> bool:
    """Return True if something else runs when the module is called, or when its gradient is computed."""
    return any(
        (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks)  # type: ignore[has-type]
    )
