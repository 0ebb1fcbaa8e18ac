"""DeepSpeed without MLflow, which its autotuner imports if it is installed: 0.9 s of CPU time in every worker, for nothing."""

from __future__ import annotations

import sys

_without_mlflow = "mlflow" not in sys.modules
if _without_mlflow:
    sys.modules["mlflow"] = None  # pyright: ignore[reportArgumentType]  # an import of it fails, and the autotuner continues
try:
    import deepspeed
finally:
    if _without_mlflow:
        del sys.modules["mlflow"]

__all__ = ["deepspeed"]
