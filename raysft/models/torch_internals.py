"""The private parts of torch's modules that raysft uses, in one place; ``tests/contracts/test_torch.py`` checks that they exist."""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map


def has_hooks(module: nn.Module) -> bool:
    """Return True if something else runs when the module is called, or when its gradient is computed."""
    return any(
        (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks)  # type: ignore[has-type]
    )


def mark_dynamic(tensor: torch.Tensor, dimensions: list[int]) -> None:
    """Let torch.compile make code for any size of some of a tensor's dimensions, if it can."""
    from torch._dynamo import maybe_mark_dynamic

    maybe_mark_dynamic(tensor, dimensions)


def allow_graphs(number: int) -> None:
    """Let torch.compile make at least this many graphs of one function; beyond its limit it logs a warning, and runs uncompiled.

    All layers of a class have one function.
    """
    from torch._dynamo import config

    config.recompile_limit = max(config.recompile_limit, number)
    config.accumulated_recompile_limit = max(config.accumulated_recompile_limit, number)


def fake_tensors() -> Any:
    """Return a context in which new tensors have a shape and a type, but no memory, and operators compute only these."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    return FakeTensorMode()


def is_fake(tensor: Any) -> bool:
    """Return True for a tensor that ``fake_tensors`` made."""
    from torch._subclasses.fake_tensor import FakeTensor

    return isinstance(tensor, FakeTensor)


def all_chosen() -> Any:
    """Return a context in which choosing by a mask of the device ``meta``, whose values are unknown, chooses everything."""
    from torch.fx.experimental import _config

    settings: Any = _config
    return settings.patch(meta_nonzero_assume_all_nonzero=True)


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of all tensors that operators return inside its context, each storage once and as long as it lives."""

    def __init__(self) -> None:
        super().__init__()
        self.now = 0
        """Bytes alive."""
        self.peak = 0
        """Most bytes alive at a time since the start, or since it was set."""
        self._sizes: dict[int, int] = {}
        self._references: dict[int, Any] = {}
        self._ignored: list[Any] = []

    def ignore(self, tensors: Iterable[torch.Tensor]) -> None:
        """Never count the storages of these tensors, such as weights."""
        for tensor in tensors:
            storage = tensor.untyped_storage()
            self._ignored.append(storage)  # alive, so that no other storage gets its address
            self._sizes[storage._cdata] = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for value in tree_leaves(result):
            if isinstance(value, torch.Tensor):
                self._add(value.untyped_storage())
        return result

    def _add(self, storage: Any) -> None:
        key = storage._cdata
        if key in self._sizes:
            return
        self._sizes[key] = storage.nbytes()
        self._references[key] = weakref.ref(storage, lambda _: self._remove(key))
        self.now += self._sizes[key]
        self.peak = max(self.peak, self.now)

    def _remove(self, key: int) -> None:
        del self._references[key]
        self.now -= self._sizes.pop(key)


class LiveMetaBytes(LiveBytes):
    """Counts tensors of the device ``meta``, and lets operators take some of them together with others that have values."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        tensors = [each for each in tree_leaves((args, kwargs)) if isinstance(each, torch.Tensor)]
        if len({each.is_meta for each in tensors}) > 1:
            args, kwargs = tree_map(_without_values, (args, kwargs))
        return super().__torch_dispatch__(func, types, args, kwargs)


def _without_values(value: Any) -> Any:
    return torch.empty_like(value, device="meta") if isinstance(value, torch.Tensor) and not value.is_meta else value
