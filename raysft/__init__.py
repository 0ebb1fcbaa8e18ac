"""Fine-tune and continue pre-training language models on Ray clusters, exactly once per example.

The public API is ``run_sft`` and ``run_pt``, with ``load_config``, ``Config``, ``Callback`` and the errors that they raise.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from raysft.garbage import postpone_collection

if TYPE_CHECKING:
    from raysft.config import Config
    from raysft.config import load as load_config
    from raysft.errors import RequestError, RunFailed, RunStopped
    from raysft.run.pipeline import run_pt, run_sft
    from raysft.telemetry.callback import Callback

postpone_collection()

__version__ = "0.1.0"
__all__ = ["Callback", "Config", "RequestError", "RunFailed", "RunStopped", "load_config", "run_pt", "run_sft"]

_MODULES = {
    "Callback": ("raysft.telemetry.callback", "Callback"),
    "Config": ("raysft.config", "Config"),
    "RequestError": ("raysft.errors", "RequestError"),
    "RunFailed": ("raysft.errors", "RunFailed"),
    "RunStopped": ("raysft.errors", "RunStopped"),
    "load_config": ("raysft.config", "load"),
    "run_pt": ("raysft.run.pipeline", "run_pt"),
    "run_sft": ("raysft.run.pipeline", "run_sft"),
}


def __getattr__(name: str) -> Any:
    # Lazy, so that `import raysft` does not import torch and ray.
    if name not in _MODULES:
        raise AttributeError(f"module 'raysft' has no attribute {name!r}")
    module, attribute = _MODULES[name]
    return getattr(import_module(module), attribute)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
