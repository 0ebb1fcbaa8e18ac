"""Metrics of predictions: ``evaluate`` modules, those in this folder or any other by path or id."""

from __future__ import annotations

import contextlib
import difflib
import logging
import tempfile
import uuid
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import pyarrow as pa
import ray
import ray.data
from huggingface_hub import constants

from raysft.config import Config
from raysft.errors import RequestError, RunFailed
from raysft.generate.engine_pool import quiet_ray_data
from raysft.generate.metrics.bootstrap import RESAMPLES, intervals, resampled_sums, totals
from raysft.generate.metrics.script import NotGiven, script_of

if TYPE_CHECKING:  # it imports evaluate, which takes seconds, and a config is checked without
    from raysft.generate.metrics.additive import AdditiveMetric

BUILTIN_METRICS = {
    name: Path(__file__).with_name(f"{name}.py")
    for name in ("similarity", "rouge", "bleu", "bleu_zh", "chrf", "exact_match")
}
"""Metrics that come with raysft; each is a file for ``evaluate.load`` with an ``AdditiveMetric``."""
PARALLEL_FROM = 500
"""Examples from which tasks on the cluster are faster than this process: starting them takes seconds."""
_BLOCK = 100
"""Examples that a task scores at least."""
_MOST_BLOCKS = 2000


def check(config: Config) -> None:
    """Load every metric that is not raysft's own, so that a wrong name is found before hours of training and generating.

    Raises:
        RequestError: one of them cannot be loaded.
    """
    for name in config.generate.metrics:
        if name in BUILTIN_METRICS:
            continue
        try:
            with _loaded(name):
                pass
        except Exception as error:
            near = difflib.get_close_matches(name, BUILTIN_METRICS, n=1)
            remedy = (
                f"did you mean {near[0]}?"
                if near
                else f"those that come with raysft are {', '.join(sorted(BUILTIN_METRICS))}"
            )
            reason = " ".join(str(error).split()) or type(error).__name__
            fault = reason if isinstance(error, NotGiven) else f"cannot be loaded ({reason:.200})"
            raise RequestError(f"generate.metrics: {name!r} {fault}; {remedy}") from error


def score(config: Config, rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Score predictions over all and, where they come from more than one source, by source.

    Args:
        rows: predictions with at least ``predict``, ``label`` and ``source``.

    Returns:
        ``predict_examples``; ``predict_{key}`` for each number that a metric gives, and of additive metrics (all that come
        with raysft), from two examples on, ``predict_{key}_low`` and ``predict_{key}_high``, its 95% interval; with
        several sources all of these as ``predict_{source}_…`` too. ``predict_{metric}_signature`` where it has one.

    Raises:
        RunFailed: a metric failed on these predictions.
    """
    groups = _groups([row["source"] for row in rows])
    results: dict[str, Any] = {f"{prefix}examples": len(members) for prefix, members in groups.items()}
    if not rows:
        return results
    from raysft.generate.metrics.additive import AdditiveMetric

    texts = [row["predict"] for row in rows], [row["label"] for row in rows]
    with contextlib.ExitStack() as stack:
        modules: dict[str, Any] = {}
        for name in dict.fromkeys(config.generate.metrics):
            with _blaming(name):
                modules[name] = stack.enter_context(_loaded(name))
        additive = {name: module for name, module in modules.items() if isinstance(module, AdditiveMetric)}
        statistics = _statistics(additive, *texts)
        for prefix, members in groups.items():
            figures = _additive_figures(additive, {n: s[members] for n, s in statistics.items()}, config.run.seed)
            figures |= _other_figures({n: m for n, m in modules.items() if n not in additive}, texts, members)
            for name in modules:
                _add(results, figures[name], prefix, Path(name).stem)
        results.update({f"predict_{Path(n).stem}_signature": m.signature for n, m in additive.items() if m.signature})
    return results


def _groups(sources: Sequence[str]) -> dict[str, np.ndarray]:
    """Which examples are scored together, by the beginning of their results' keys.

    >>> {prefix: members.tolist() for prefix, members in _groups(["x", "y", "x"]).items()}
    {'predict_': [0, 1, 2], 'predict_x_': [0, 2], 'predict_y_': [1]}
    """
    groups = {"predict_": np.arange(len(sources))}
    names = sorted(set(sources))
    if len(names) > 1:
        of_each = np.array(sources, dtype=object)
        groups.update({f"predict_{name}_": np.flatnonzero(of_each == name) for name in names})
    return groups


def _add(results: dict[str, Any], figures: dict[str, float], prefix: str, metric: str) -> None:
    """Add a metric's figures to the results, with its name in a key that is taken."""
    for key, value in figures.items():
        results[f"{prefix}{metric}_{key}" if prefix + key in results else prefix + key] = value


def _additive_figures(
    modules: dict[str, AdditiveMetric], statistics: dict[str, np.ndarray], seed: int
) -> dict[str, dict[str, float]]:
    """Each metric's figures of one group of examples, with intervals: all metrics over the same resamples.

    Args:
        statistics: [examples, statistics] of each metric.
    """
    if not modules:
        return {}
    examples = len(next(iter(statistics.values())))
    # Of one example every resample is the same, which is no interval.
    resampled = resampled_sums(np.hstack(list(statistics.values())), seed, RESAMPLES if examples > 1 else 0)
    ends = np.cumsum([each.shape[1] for each in statistics.values()])
    found = {}
    for (name, module), sums in zip(modules.items(), np.split(resampled, ends[:-1], axis=1), strict=True):
        with _blaming(name):
            figures = module.figures(totals(statistics[name]), examples)
            found[name] = {**figures, **intervals([module.figures(each, examples) for each in sums])}
    return found


def _other_figures(
    modules: dict[str, Any], texts: tuple[list[str], list[str]], members: np.ndarray
) -> dict[str, dict[str, float]]:
    """Figures by metrics of any kind: of the whole group, since the mean of its parts may be another number."""
    predictions, references = ([side[i] for i in members] for side in texts)
    found = {}
    for name, module in modules.items():
        with _blaming(name):
            found[name] = _numbers(module.compute(predictions=predictions, references=references))
    return found


def _statistics(
    modules: dict[str, AdditiveMetric], predictions: list[str], references: list[str]
) -> dict[str, np.ndarray]:
    """[examples, statistics] of each metric; by tasks on the cluster where that is worth it."""
    found: dict[str, np.ndarray] = {}
    brought = [name for name in modules if name in BUILTIN_METRICS]  # the file of another may not be on every node
    if brought and len(predictions) >= PARALLEL_FROM and ray.is_initialized():
        with _blaming(", ".join(brought)):
            found = _by_tasks(brought, predictions, references)
    for name, module in modules.items():
        if name not in found:
            with _blaming(name):
                of_examples = np.asarray(module.statistics(predictions, references), dtype=np.float64)
                found[name] = of_examples.reshape(len(predictions), -1)
    return {name: found[name] for name in modules}


def _by_tasks(names: list[str], predictions: list[str], references: list[str]) -> dict[str, np.ndarray]:
    """The same by tasks of Ray Data.

    Raises:
        RunFailed: a metric failed.
    """

    def of_block(block: pa.Table) -> dict[str, np.ndarray]:
        texts = block["predict"].to_pylist(), block["label"].to_pylist()
        found = {"index": block["index"].to_numpy()}
        try:
            for name in names:
                with _blaming(name), _loaded(name) as module:
                    found[name] = module.statistics(*texts)
        except RunFailed as error:
            return {"error": np.array([str(error)])}  # of what is raised Ray Data tells only where
        return found

    table = pa.table({"index": np.arange(len(predictions)), "predict": predictions, "label": references})
    size = max(_BLOCK, len(predictions) // _MOST_BLOCKS)
    with quiet_ray_data():
        blocks = ray.data.from_arrow([table.slice(start, size) for start in range(0, len(predictions), size)])
        done = blocks.map_batches(of_block, batch_size=None, batch_format="pyarrow")
        parts: list[Any] = list(done.iter_batches(batch_size=None, batch_format="numpy"))
    for part in parts:
        if "error" in part:
            raise RunFailed(str(part["error"][0]))
    order = np.argsort(np.concatenate([part["index"] for part in parts]))
    return {name: np.concatenate([part[name] for part in parts])[order] for name in names}


@contextlib.contextmanager
def _loaded(name: str) -> Iterator[Any]:
    """An ``evaluate`` module whose temporary files are its own, so that two processes do not meet, and go with it."""
    import evaluate
    from evaluate import config as of_evaluate
    from evaluate.loading import import_main_class

    logging.getLogger("jieba").setLevel(logging.WARNING)
    of_evaluate.HF_EVALUATE_OFFLINE |= constants.HF_HUB_OFFLINE  # by itself evaluate heeds only its own variable
    with tempfile.TemporaryDirectory(prefix="raysft-metric-") as folder:
        own: dict[str, Any] = {"cache_dir": folder, "experiment_id": uuid.uuid4().hex}
        if name in BUILTIN_METRICS:
            # evaluate.load would copy the file into the home folder, which a container may not have, to do the same.
            yield cast(Any, import_main_class(f"{__name__}.{name}"))(**own)
        else:
            yield evaluate.load(script_of(name), **own)


@contextlib.contextmanager
def _blaming(name: str) -> Iterator[None]:
    """Make any error one line that names the metric."""
    try:
        yield
    except RunFailed:
        raise
    except Exception as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise RunFailed(f"generate.metrics: {name!r} failed: {reason:.300}") from error


def _numbers(results: Any) -> dict[str, float]:
    """What of a module's results is a number."""
    found = {}
    for key, value in (results or {}).items():
        number = value.item() if isinstance(value, np.generic) else value
        if isinstance(number, int | float) and not isinstance(number, bool):
            found[str(key)] = number
    return found
