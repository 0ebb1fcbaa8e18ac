"""Metrics of predictions: ``evaluate`` modules, those in this folder or any other by path or id."""

from __future__ import annotations

import contextlib
import difflib
import logging
import tempfile
import uuid
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from raysft.config import Config, RequestError
from raysft.generate.cluster import quiet_ray_data
from raysft.records import RunFailed

BROUGHT = {"similarity": Path(__file__).with_name("similarity.py")}
"""Metrics that come with raysft. They can score example by example (``per_example=True``), and so in parallel."""
PARALLEL_FROM = 500
"""Examples from which tasks on the cluster are faster than this process: starting them takes seconds."""

Values = dict[str, np.ndarray]


def check(config: Config) -> None:
    """Load every metric that is not raysft's own, so that a wrong name is found before hours of training and generating.

    Raises:
        RequestError: one of them cannot be loaded.
    """
    for name in config.generate.metrics:
        if name in BROUGHT:
            continue
        try:
            with _loaded(name):
                pass
        except Exception as error:
            near = difflib.get_close_matches(name, BROUGHT, n=1)
            remedy = f"did you mean {near[0]}?" if near else f"name one of {sorted(BROUGHT)}, or a path or hub id"
            reason = " ".join(str(error).split())
            raise RequestError(f"generate.metrics: {name!r} cannot be loaded ({reason:.200}); {remedy}") from error


def score(config: Config, rows: Sequence[dict[str, Any]]) -> dict[str, float]:
    """Score predictions over all and, where they come from more than one source, by source.

    Args:
        rows: predictions with at least ``predict``, ``label`` and ``source``.

    Returns:
        ``predict_examples``, ``predict_{key}`` for each number that a metric gives, and with several sources
        ``predict_{source}_examples`` and ``predict_{source}_{key}``.

    Raises:
        RunFailed: a metric failed on these predictions.
    """
    sources = sorted({row["source"] for row in rows})
    groups = {"predict_": np.arange(len(rows))}
    if len(sources) > 1:
        for source in sources:
            groups[f"predict_{source}_"] = np.array([i for i, row in enumerate(rows) if row["source"] == source])
    results: dict[str, float] = {f"{prefix}examples": len(members) for prefix, members in groups.items()}
    predictions, references = [row["predict"] for row in rows], [row["label"] for row in rows]
    for name in config.generate.metrics if rows else []:
        try:
            scored = _by_group(name, predictions, references, groups)
        except Exception as error:
            reason = " ".join(str(error).split())
            raise RunFailed(f"generate.metrics: {name!r} failed on {len(rows)} predictions: {reason:.300}") from error
        for prefix, values in scored.items():
            for key, value in values.items():
                taken = prefix + key in results
                results[f"{prefix}{Path(name).stem}_{key}" if taken else prefix + key] = value
    return results


def _by_group(
    name: str, predictions: list[str], references: list[str], groups: dict[str, np.ndarray]
) -> dict[str, dict[str, float]]:
    """One metric's numbers for each group of examples."""
    if name in BROUGHT:
        values = _per_example(name, predictions, references)
        return {
            prefix: {key: round(float(np.mean(of_key[members])), 4) for key, of_key in values.items()}
            for prefix, members in groups.items()
        }
    # Any other metric may be one of the whole corpus, where the mean of its parts is another number: whole groups then.
    with _loaded(name) as module:
        return {
            prefix: _numbers(
                module.compute(
                    predictions=[predictions[i] for i in members], references=[references[i] for i in members]
                )
            )
            for prefix, members in groups.items()
        }


def _per_example(name: str, predictions: list[str], references: list[str]) -> Values:
    """Values of each example, in order; computed by tasks on the cluster where that is worth it."""
    import ray

    if len(predictions) < PARALLEL_FROM or not ray.is_initialized():
        return _compute_per_example(name, predictions, references)

    def of_batch(batch: Any) -> Any:
        return {"index": batch["index"], **_compute_per_example(name, list(batch["predict"]), list(batch["label"]))}

    with quiet_ray_data():
        triples = zip(range(len(predictions)), predictions, references, strict=True)
        dataset = ray.data.from_items([{"index": i, "predict": p, "label": r} for i, p, r in triples])
        scored = dataset.map_batches(of_batch, batch_size=100).to_pandas().sort_values("index")
    return {str(key): scored[key].to_numpy() for key in scored.columns if key != "index"}


def _compute_per_example(name: str, predictions: list[str], references: list[str]) -> Values:
    """The same in this process."""
    with _loaded(name) as module:
        values = module.compute(predictions=predictions, references=references, per_example=True)
    return {key: np.asarray(of_key, dtype=np.float64) for key, of_key in values.items()}


@contextlib.contextmanager
def _loaded(name: str) -> Iterator[Any]:
    """An ``evaluate`` module whose temporary files are its own, so that two processes do not meet, and go with it."""
    import evaluate

    logging.getLogger("jieba").setLevel(logging.WARNING)
    with tempfile.TemporaryDirectory(prefix="raysft-metric-") as folder:
        yield evaluate.load(str(BROUGHT.get(name, name)), cache_dir=folder, experiment_id=uuid.uuid4().hex)


def _numbers(results: Any) -> dict[str, float]:
    """What of a module's results is a number."""
    found = {}
    for key, value in (results or {}).items():
        number = value.item() if isinstance(value, np.generic) else value
        if isinstance(number, int | float) and not isinstance(number, bool):
            found[str(key)] = number
    return found
