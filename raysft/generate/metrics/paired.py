"""Intervals of the difference between two models' scores on the same prompts, by paired bootstrap.

Koehn, Statistical Significance Tests for Machine Translation Evaluation (2004), section 4: both models are scored on the
same resamples of the prompts, so that what makes a prompt easy or hard for both does not count as uncertainty. The
intervals of the two scores may overlap although the difference is clear.
"""

from __future__ import annotations

import math
import multiprocessing
import os
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from itertools import repeat
from typing import Any

import numpy as np

from raysft.generate.metrics.bootstrap import intervals, resampled_sums
from raysft.generate.metrics.loading import BUILTIN_METRICS, loaded, named_failure

PARALLEL_FROM = 1000
"""Number of prompts from which all cores score them."""
_BLOCKS = 4
"""Blocks of prompts for each core, so that all end at about the same time."""

Texts = tuple[Sequence[str], Sequence[str]]
"""Predictions and references, an element for each prompt."""
Intervals = dict[tuple[str, str], tuple[float, float]]
"""(source, metric) → the 95% interval; the source is empty for all sources together."""


def paired_intervals(
    names: Sequence[str], sources: Sequence[str], first: Texts, others: Iterable[Texts], seed: int
) -> Iterator[Intervals]:
    """The 95% interval of each other model's score minus the first one's, for built-in metrics.

    Args:
        names: names of metrics, as in ``generate.metrics``; those that are not built in are skipped.
        sources: [prompts] source of each prompt.
        first: texts of the model that the others are compared with.
        others: texts of the other models, with the same prompts in the same order.
        seed: of the resamples.

    Raises:
        RunFailed: a metric failed.
    """
    groups: dict[str, np.ndarray] = {"": np.arange(len(sources))}
    if len(set(sources)) > 1:
        groups |= {name: np.flatnonzero(np.array(sources, dtype=object) == name) for name in sorted(set(sources))}
    base = _scores(names, first, groups, seed)
    for texts in others:
        scores = _scores(names, texts, groups, seed)
        found: Intervals = {}
        for group, resampled in scores.items():
            pairs = zip(resampled, base[group], strict=True)
            differences = [{key: own[key] - with_[key] for key in own.keys() & with_.keys()} for own, with_ in pairs]
            found |= {(group, key): ends for key, ends in intervals(differences).items()}
        yield found


def _scores(
    names: Sequence[str], texts: Texts, groups: dict[str, np.ndarray], seed: int
) -> dict[str, list[dict[str, float]]]:
    """Scores of each resample, by group. The same seed and number of prompts give the same resamples."""
    found: dict[str, list[dict[str, float]]] = {}
    for name in dict.fromkeys(names):
        if name not in BUILTIN_METRICS:
            continue
        with named_failure(name), loaded(name) as module:
            statistics = _statistics(name, module, texts)
            for group, members in groups.items():
                if len(members) < 2:
                    continue  # all resamples of one prompt are equal
                scores = [module.scores(sums, len(members)) for sums in resampled_sums(statistics[members], seed)]
                whole = found.setdefault(group, [{} for _ in scores])
                for row, more in zip(whole, scores, strict=True):
                    row.update({key: value for key, value in more.items() if key not in row})
    return found


def _statistics(name: str, module: Any, texts: Texts) -> np.ndarray:
    """[prompts, statistics] of a built-in metric."""
    prompts, cores = len(texts[0]), len(os.sched_getaffinity(0))
    if prompts < PARALLEL_FROM or cores < 2:
        return _rows(module, texts)
    size = math.ceil(prompts / (_BLOCKS * cores))
    blocks = [tuple(side[start : start + size] for side in texts) for start in range(0, prompts, size)]
    # Forks have imported what the metrics need, which takes longer than a thousand prompts.
    with ProcessPoolExecutor(cores, mp_context=multiprocessing.get_context("fork")) as processes:
        return np.concatenate(list(processes.map(_block, repeat(name), blocks)))


def _block(name: str, texts: Texts) -> np.ndarray:
    with loaded(name) as module:
        return _rows(module, texts)


def _rows(module: Any, texts: Texts) -> np.ndarray:
    return np.asarray(module.statistics(*texts), dtype=np.float64).reshape(len(texts[0]), -1)
