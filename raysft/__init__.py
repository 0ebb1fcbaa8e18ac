"""Fine-tune and continue pre-training language models on Ray clusters, exactly once per example."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from raysft.run.pipeline import run_pt, run_sft

__version__ = "0.1.0"
__all__ = ["run_pt", "run_sft"]


def __getattr__(name: str) -> Any:
    # Ray and torch are imported when a run starts, not when raysft is.
    if name in __all__:
        from raysft.run import pipeline

        return getattr(pipeline, name)
    raise AttributeError(f"module 'raysft' has no attribute {name!r}")
