"""Prompts through a pool of engine actors, as Ray Data runs them, on whatever nodes live."""

from __future__ import annotations

import functools
import math
import sys
import threading
import time
import traceback
from collections.abc import Callable, Container, Generator, Sequence
from typing import Any, cast

import numpy as np
import pyarrow as pa
import ray
import ray.data
import torch
from ray.exceptions import RayError

from raysft.cluster.connect import alive_nodes
from raysft.config import Config
from raysft.errors import RunFailed
from raysft.generate import engine_pool
from raysft.generate.engines import Completion, Engine, batching, create_engine
from raysft.generate.engines.interface import failure

RESTARTS = 3
"""How often an engine whose process died is started again."""
SUPPLY = 4
"""Batches that an engine of continuous batching is given at a time. When it runs out of prompts, some time passes in which fewer
and fewer run; and what it was given is what is lost when it dies."""
_Read = Callable[[list[dict[str, Any]]], list[dict[str, Any]]]
STALL_SECONDS = 60.0
"""After so long without a batch, and three times as long as the longest took, engines of a node that died are given up."""


def completions(
    config: Config, model: str, prompts: pa.Table, ends: Sequence[int] = ()
) -> Generator[list[dict[str, Any]], None, None]:
    """Batches of entries ({id, predict, tokens, cut, stop, error, seconds}) as the engines finish them, in any order.

    When a node dies the prompts that are left go to engines on those that live.

    Args:
        prompts: a table with the columns id and input_ids.
        ends: tokens that end an answer, besides those that the model and the config name.

    Raises:
        RequestError: no engine finds a place.
        RunFailed: an engine failed, and not because its node died.
    """
    shrinks = False
    while prompts.num_rows:
        began, done = _alive_ids(), set[str]()
        try:
            for entries in _pass(config, model, prompts, ends, began, shrinks):
                done.update(entry["id"] for entry in entries)
                yield entries
            return
        except RayError as error:
            gone = len(began - _alive_ids())
            if not gone:
                reason = str(error).partition("The actor is dead because ")[2] or str(error)
                raise _failed(reason, config, died=True) from error
        shrinks = True
        prompts = without(prompts, done)
        nodes = f"{gone} node{'' if gone == 1 else 's'}"
        print(f"generate: {nodes} died; going on with {prompts.num_rows} prompts on those that live", file=sys.stderr)


def _alive_ids() -> set[str]:
    return {node.id for node in alive_nodes()}


def without(prompts: pa.Table, done: Container[str]) -> pa.Table:
    """The prompts that are left."""
    return prompts.filter(pa.array([id not in done for id in prompts["id"].to_pylist()], pa.bool_()))


def _pass(
    config: Config, model: str, prompts: pa.Table, ends: Sequence[int], began: set[str], shrinks: bool
) -> Generator[list[dict[str, Any]], None, None]:
    """All prompts through one pool of engines."""
    rows, size = prompts.num_rows, config.generate.batch_size
    pool = engine_pool.size_pool(config, alive_nodes(), math.ceil(rows / size), shrinks)
    if config.generate.engine == "transformers" and batching(config, model) == "continuous":
        # Not so many that an engine has nothing to do.
        size = max(size, min(SUPPLY * size, math.ceil(rows / pool.engines)))
    batches = _batches(prompts, size)
    with engine_pool.quiet_ray_data():
        pipeline = _by_vllm if config.generate.engine == "vllm" else _by_actors
        dataset, read = pipeline(config, model, ends, batches, pool)
        # The pipeline has a process of its own, which can be stopped when it waits for what never comes.
        [split] = dataset.streaming_split(1)
        with _Patience(split._coord_actor, began) as patience:  # pyright: ignore
            batch: Any
            for batch in split.iter_batches(batch_size=cast(Any, None), batch_format="pyarrow", prefetch_batches=0):
                entries = read(batch.to_pylist())
                patience.came(entries[0]["seconds"])
                yield entries


def _by_actors(
    config: Config, model: str, ends: Sequence[int], batches: Sequence[pa.Table], pool: engine_pool.Pool
) -> tuple[ray.data.Dataset, _Read]:
    """Batches through engines of this package, and how to read what they give."""

    def read(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
        if "failed" in rows[0]:
            raise _failed(rows[0]["failed"], config) from RuntimeError(rows[0]["traceback"])
        return rows

    dataset = ray.data.from_arrow(list(batches)).map_batches(
        _EngineActor,
        fn_constructor_args=(config, model, ends, pool.engines_per_node),
        batch_size=None,  # a block is a batch
        batch_format="pyarrow",
        zero_copy_batch=True,
        # One batch each at a time, or the engine that is up first would take those of the others.
        compute=ray.data.ActorPoolStrategy(size=pool.engines, max_tasks_in_flight_per_actor=1),
        num_cpus=pool.cpus,
        num_gpus=pool.gpus,
        # Ray Data's own choice is without end: an engine killed for its memory would be started for ever.
        max_restarts=RESTARTS,
        # As often as Ray can: of a node that died it takes 15 seconds to know that it is no passing disturbance.
        max_task_retries=-1,
    )
    return dataset, read


def _by_vllm(
    config: Config, model: str, ends: Sequence[int], batches: Sequence[pa.Table], pool: engine_pool.Pool
) -> tuple[ray.data.Dataset, _Read]:
    """Batches through vLLM, and how to read what it gives."""
    from raysft.generate.engines import vllm

    served = vllm.VllmModel.of(config, model, ends)

    def read(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
        entries = vllm.entries(rows, served.stops)
        if len(entries) > 1 and all(entry["error"] for entry in entries):  # that is no matter of a prompt
            raise _failed(entries[0]["error"], config)
        return entries

    return vllm.completed(config, served, batches, pool, RESTARTS), read


class _Patience:
    """Stops a pipeline that waits for an engine whose node died and which finds no place on another one."""

    def __init__(self, pipeline: Any, began: set[str]) -> None:
        self._pipeline, self._began = pipeline, began
        self._last, self._longest = time.monotonic(), 0.0
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> _Patience:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        ray.kill(self._pipeline)

    def came(self, seconds: float) -> None:
        """A batch, for which an engine took so long."""
        self._last, self._longest = time.monotonic(), max(self._longest, seconds)

    def _watch(self) -> None:
        while not self._done.wait(5.0):
            waited = time.monotonic() - self._last
            if waited > max(STALL_SECONDS, 3 * self._longest) and not self._began <= _alive_ids():
                ray.kill(self._pipeline)
                return


def _batches(prompts: pa.Table, size: int) -> list[pa.Table]:
    """Prompts of like length together, so that little of a batch is padding; longest first, so that the last batches,
    for which some engines wait for others, are short and too much for the memory shows early.

    A batch that is not full comes first: the longest prompts differ most in length, and the fewer share them the better.
    """
    lengths = np.asarray(pa.compute.list_value_length(prompts["input_ids"]))  # pyright: ignore
    order = np.argsort(-lengths, kind="stable")
    ordered = prompts.select(["id", "input_ids"]).take(pa.array(order))
    ends = range(ordered.num_rows % size or size, ordered.num_rows + 1, size)
    return [ordered.slice(max(0, end - size), min(size, end)).combine_chunks() for end in ends]


class _EngineActor:
    """An engine in a process of its own, as Ray Data calls it.

    What an engine raises comes back as data: Ray would print it three times over, a hundred lines each.
    """

    def __init__(self, config: Config, model: str, ends: Sequence[int], engines_per_node: int) -> None:
        threads = None if config.scaling.use_gpu else engine_pool.threads(config, engines_per_node)
        self._make = functools.partial(create_engine, config, model, threads, ends)
        self._engine: Engine | None = None

    def __call__(self, batch: pa.Table) -> pa.Table:
        start = time.monotonic()
        ids = batch["id"].to_pylist()
        try:
            self._engine = self._engine or self._make()
            start = time.monotonic()
            completions = complete(self._engine, ids, batch["input_ids"].to_pylist())
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
            }
        )


def complete(engine: Engine, ids: Sequence[str], prompts: Sequence[Sequence[int]]) -> list[Completion]:
    """A batch, and where that fails its halves: what cannot be completed alone costs no other prompt.

    Raises:
        Exception: what the engine raised, where several prompts fail, each of them; that is no matter of a prompt.
    """
    completions, first = _complete(engine, ids, prompts)
    # Of prompts that are too large, which are all in the first batch, the memory of the others knows nothing.
    matter_of_prompts = isinstance(first, torch.OutOfMemoryError)
    if first and len(ids) > 1 and not matter_of_prompts and all(completion.error for completion in completions):
        raise first
    return completions


def _complete(
    engine: Engine, ids: Sequence[str], prompts: Sequence[Sequence[int]]
) -> tuple[list[Completion], Exception | None]:
    try:
        return engine.complete(ids, prompts), None
    except Exception as error:
        caught = error
    # Outside, so that the memory which the failure holds is free again.
    torch.cuda.empty_cache()
    if len(ids) == 1:
        return [failure(caught)], caught
    half = len(ids) // 2
    left, first = _complete(engine, ids[:half], prompts[:half])
    right, second = _complete(engine, ids[half:], prompts[half:])
    return left + right, first or second


def _failed(reason: str, config: Config, *, died: bool = False) -> RunFailed:
    """One line for what went wrong in an engine, with a remedy where there is one."""
    reason = " ".join(reason.split())
    remedy = ""
    if died or "outofmemory" in reason.lower().replace(" ", ""):
        remedy = f"; if memory ran out, lower generate.batch_size={config.generate.batch_size}"
        if config.generate.engine == "vllm":  # which has no more prompts at a time than it has memory for
            remedy = f"; if memory ran out, raise generate.gpus_per_engine={config.generate.gpus_per_engine}"
        elif config.scaling.use_gpu:
            remedy += ", or raise generate.gpus_per_engine"
    what = f"an engine died {RESTARTS + 1} times: " if died else ""
    return RunFailed(f"generation failed: {what}{reason:.500}{remedy}")
