"""An engine in an actor of Ray Data, which loads one model after the other."""

from __future__ import annotations

import gc
import time
import traceback
from collections.abc import Callable, Sequence
from contextlib import nullcontext

import pyarrow as pa

from raysft.config import Config
from raysft.data.types import TokenizedMedium
from raysft.generate import engine_pool
from raysft.generate.engines import Engine, create_engine
from raysft.generate.engines.interface import failure
from raysft.generate.prompts import MEDIA, media_of
from raysft.generate.signs_of_life import SignsOfLife


def batch_row(prompts: pa.Table, model: int) -> pa.Table:
    """Return a batch of prompts (columns id, input_ids and perhaps media) as the one row that ``EngineActor`` takes.

    Args:
        prompts: the batch.
        model: an index in the actor's ``models``.
    """
    columns = {name: _one(prompts[name]) for name in prompts.column_names}
    return pa.table({**columns, "model": pa.array([model], pa.int32())})


def _one(column: pa.ChunkedArray) -> pa.Array:
    """Return a column as one list."""
    return pa.array([column.to_pylist()], pa.list_(column.type))


def _media(batch: pa.Table) -> list[tuple[TokenizedMedium, ...]]:
    """Return the images of a batch's prompts; empty if none has any."""
    return media_of(pa.table({MEDIA: batch[MEDIA][0].values})) if MEDIA in batch.column_names else []


class EngineActor:
    """Complete batches, each of them a ``batch_row``, with one model in memory at a time.

    An exception is returned as data; Ray would print it three times, a hundred lines each.
    """

    def __init__(
        self,
        config: Config,
        models: Sequence[str],
        ends: Sequence[int],
        engines_per_node: int,
        threads: int | None = None,
        alive: Callable[[], None] | None = None,
    ) -> None:
        self._config, self._models, self._ends = config, models, ends
        self._engines_per_node = engines_per_node
        self._threads = None if config.scaling.use_gpu else threads or engine_pool.threads(config, engines_per_node)
        self._engine: Engine | None = None
        self._loaded: int | None = None
        self._signs = SignsOfLife(alive, config.train.hang_minutes) if alive else None

    def _load(self, index: int) -> Engine:
        """Return the engine with a model, which is loaded if another one is."""
        if self._engine is not None and self._loaded == index:
            return self._engine
        if self._engine is not None:
            import torch

            # The next model may need the memory, and an engine's parts refer to each other.
            self._engine = None
            gc.collect()
            torch.cuda.empty_cache()
        model, engines = self._models[index], self._engines_per_node
        self._engine, self._loaded = create_engine(self._config, model, self._threads, self._ends, engines), index
        return self._engine

    def __call__(self, batch: pa.Table) -> pa.Table:
        from raysft.generate.engines.bisection import (
            complete,  # imports torch, which the pipeline itself does not need
        )

        start = time.monotonic()
        [ids], [prompts], [index] = (batch[name].to_pylist() for name in ("id", "input_ids", "model"))
        media = _media(batch)
        try:
            with self._signs.loading() if self._signs else nullcontext():
                engine = self._load(index)
            start = time.monotonic()
            with self._signs.computing(lambda: engine.steps) if self._signs else nullcontext():
                completions = complete(engine, ids, prompts, media)
        except Exception as error:
            return pa.table({"failed": [failure(error).error], "traceback": [traceback.format_exc()]})
        seconds = time.monotonic() - start
        return pa.table(
            {
                "id": ids,
                "predict": [completion.text for completion in completions],
                "tokens": [completion.tokens for completion in completions],
                "cut": [completion.cut for completion in completions],
                "stop": [completion.stop for completion in completions],
                "error": [completion.error for completion in completions],
                "seconds": [seconds] * len(ids),
                "model": [index] * len(ids),
            }
        )
