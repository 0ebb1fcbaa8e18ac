"""Loading of ``evaluate`` modules: the built-in ones, a file, a folder, or an id on the Hugging Face Hub."""

from __future__ import annotations

import contextlib
import difflib
import logging
import tempfile
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

from huggingface_hub import constants

from raysft.config import Config
from raysft.errors import RequestError, RunFailed, one_line
from raysft.generate.metrics.script import ScriptNotFound, find_script
from raysft.metric_names import METRIC_KEYS

BUILTIN_METRICS = {name: Path(__file__).with_name(f"{name}.py") for name in METRIC_KEYS}
"""Metrics that come with raysft. Each is a file for ``evaluate.load`` with an ``AdditiveMetric``."""


def check(config: Config) -> None:
    """Load every metric that is not built in, so that a wrong name fails before hours of training and generation.

    Raises:
        RequestError: a metric cannot be loaded.
    """
    for name in config.generate.metrics:
        if name in BUILTIN_METRICS:
            continue
        try:
            with loaded(name):
                pass
        except Exception as error:
            close = difflib.get_close_matches(name, BUILTIN_METRICS, n=1)
            remedy = f"did you mean {close[0]}?" if close else f"built-in metrics: {', '.join(sorted(BUILTIN_METRICS))}"
            fact = str(error) if isinstance(error, ScriptNotFound) else f"cannot be loaded ({one_line(error)})"
            raise RequestError(f"generate.metrics: {name!r} {fact}; {remedy}") from error


@contextlib.contextmanager
def loaded(name: str) -> Iterator[Any]:
    """Load an ``evaluate`` module with its own temporary folder, so that processes do not share files."""
    from raysft.generate.metrics.evaluate_import import evaluate  # before its parts
    from evaluate import config as evaluate_config  # isort: skip
    from evaluate.loading import import_main_class  # isort: skip

    logging.getLogger("jieba").setLevel(logging.WARNING)
    evaluate_config.HF_EVALUATE_OFFLINE |= constants.HF_HUB_OFFLINE  # evaluate only reads its own variable
    with tempfile.TemporaryDirectory(prefix="raysft-metric-") as folder:
        options: dict[str, Any] = {"cache_dir": folder, "experiment_id": uuid.uuid4().hex}
        if name in BUILTIN_METRICS:
            # evaluate.load would copy the file into the home folder, which a container may not have.
            yield cast(Any, import_main_class(f"{__package__}.{name}"))(**options)
        else:
            yield evaluate.load(find_script(name), **options)


@contextlib.contextmanager
def named_failure(name: str) -> Iterator[None]:
    """Turn any error into one line that names the metric.

    Raises:
        RunFailed: the metric failed.
    """
    try:
        yield
    except RunFailed:
        raise
    except Exception as error:
        raise RunFailed(
            f"generate.metrics: {name!r} failed: {one_line(error, 300)}; remove it from generate.metrics or fix it"
        ) from error
