"""Statistics of many predictions, block by block: by tasks on all nodes, if there are enough predictions."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import islice
from typing import TYPE_CHECKING

import numpy as np
import ray

from raysft.errors import RunFailed
from raysft.generate.metrics.loading import loaded, named_failure

if TYPE_CHECKING:  # importing evaluate takes seconds, and checking a config does not need it
    from raysft.generate.metrics.additive import AdditiveMetric

PARALLEL_FROM = 500
"""Number of examples from which Ray tasks are faster than this process: starting them takes seconds."""
_BLOCK = 100
"""Fewest examples that a task scores."""
_LARGEST = 2000
"""Most examples that a task scores."""
_AHEAD = 2
"""Tasks for each CPU whose results are waited for at a time."""

Block = list[tuple[str, str]]
"""Predictions and their references."""


def in_blocks(
    modules: Mapping[str, AdditiveMetric], texts: Iterable[tuple[str, str]], by_tasks: bool = True
) -> dict[str, np.ndarray]:
    """Compute the statistics of built-in metrics.

    Args:
        modules: the metrics, by name.
        texts: each prediction and its reference; taken one at a time.
        by_tasks: let tasks compute them if there are many; they need CPUs that nobody has reserved.

    Returns:
        [examples, statistics] float64 of each metric.

    Raises:
        RunFailed: a metric failed.
    """
    blocks = _blocks(iter(texts))
    parts: dict[str, list[np.ndarray]] = {name: [] for name in modules}
    for first in blocks:
        parallel = by_tasks and bool(modules) and len(first) >= PARALLEL_FROM and ray.is_initialized()
        found = _by_tasks(list(modules), _cut(first), blocks) if parallel else _here(modules, first, blocks)
        for statistics in found:
            for name, values in statistics.items():
                parts[name].append(values)
    return {name: np.concatenate(values) for name, values in parts.items()}


def _blocks(texts: Iterator[tuple[str, str]]) -> Iterator[Block]:
    """Yield ``PARALLEL_FROM`` examples, and then blocks that grow with the number of examples."""
    done, size = 0, PARALLEL_FROM
    while block := list(islice(texts, size)):
        yield block
        done += len(block)
        size = min(_LARGEST, max(_BLOCK, done // 20))


def _cut(block: Block) -> list[Block]:
    return [block[start : start + _BLOCK] for start in range(0, len(block), _BLOCK)]


def _here(
    modules: Mapping[str, AdditiveMetric], first: Block, others: Iterator[Block]
) -> Iterator[dict[str, np.ndarray]]:
    """Yield the statistics of each block, computed in this process."""
    for block in _chained([first], others):
        found = {}
        for name, module in modules.items():
            with named_failure(name):
                found[name] = _statistics(module, block)
        yield found


def _by_tasks(names: Sequence[str], first: Sequence[Block], others: Iterator[Block]) -> Iterator[dict[str, np.ndarray]]:
    """Yield the statistics of each block, computed by tasks of which only some are on their way."""
    score = ray.remote(_score_block)
    most = _AHEAD * max(1, int(ray.cluster_resources().get("CPU", 1.0)))
    waiting = deque()
    with named_failure(", ".join(names)):
        for block in _chained(first, others):
            waiting.append(score.remote(names, block))
            if len(waiting) >= most:
                yield _result(ray.get(waiting.popleft()))
        while waiting:
            yield _result(ray.get(waiting.popleft()))


def _chained(first: Sequence[Block], others: Iterator[Block]) -> Iterator[Block]:
    yield from first
    yield from others


def _score_block(names: Sequence[str], block: Block) -> dict[str, np.ndarray] | str:
    """Ray task: the statistics of a block, or the line about a failure, which Ray would print with its stack."""
    try:
        found = {}
        for name in names:
            with named_failure(name), loaded(name) as module:
                found[name] = _statistics(module, block)
        return found
    except RunFailed as error:
        return str(error)


def _result(found: dict[str, np.ndarray] | str) -> dict[str, np.ndarray]:
    if isinstance(found, str):
        raise RunFailed(found)
    return found


def _statistics(module: AdditiveMetric, block: Block) -> np.ndarray:
    predictions, references = [prediction for prediction, _ in block], [reference for _, reference in block]
    values = np.asarray(module.statistics(predictions, references), dtype=np.float64)
    return values.reshape(len(block), -1)
