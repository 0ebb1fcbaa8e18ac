"""``evaluate`` without transformers' pipelines, which its evaluators of whole models import: 2 s of CPU time, for nothing.

A metric may import the pipelines itself; only ``evaluate.evaluator`` is without them.
"""

from __future__ import annotations

import sys

_PIPELINES = "transformers.pipelines"
_without_pipelines = _PIPELINES not in sys.modules
if _without_pipelines:
    sys.modules[_PIPELINES] = None  # pyright: ignore[reportArgumentType]  # an import of it fails, and the evaluators continue
try:
    import evaluate
finally:
    if _without_pipelines:
        del sys.modules[_PIPELINES]

__all__ = ["evaluate"]
