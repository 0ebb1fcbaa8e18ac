"""Run prompts through a pool of engine actors with Ray Data, and survive nodes that die."""

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
from ray.exceptions import RayError

from raysft.cluster.connect import alive_nodes
from raysft.cluster.ray_internals import split_coordinator
from raysft.config import Config
from raysft.errors import RunFailed
from raysft.generate import engine_pool
from raysft.generate.engines import Engine, batching, create_engine
from raysft.generate.engines.interface import failure

RESTARTS = 3
"""How often an engine is restarted after its process died."""
SUPPLY = 4
"""Batches that an engine with continuous batching receives at a time. More keep it full for longer before its last prompts run
out; fewer lose less when it dies."""
_Read = Callable[[list[dict[str, Any]]], list[dict[str, Any]]]
STALL_SECONDS = 60.0
"""Time without a batch (and at least three times the longest batch so far) after which the engines of a dead node are given up."""


def completions(
    config: Config, model: str, prompts: pa.Table, ends: Sequence[int] = ()
) -> Generator[list[dict[str, Any]], None, None]:
    """Yield batches of entries ({id, predict, tokens, cut, stop, error, seconds}) as the engines finish them, in any order.

    When a node dies, the remaining prompts go to engines on the nodes that are alive.

    Args:
        prompts: a table with the columns id and input_ids.
        ends: tokens that end an answer, besides those of the model and the config.

    Raises:
        RequestError: the cluster cannot place an engine.
        RunFailed: an engine failed, but not because its node died.
    """
    shrinks = False
    while prompts.num_rows:
        nodes_at_start, done = _alive_ids(), set[str]()
        try:
            for entries in _pass(config, model, prompts, ends, nodes_at_start, shrinks):
                done.update(entry["id"] for entry in entries)
                yield entries
            return
        except RayError as error:
            dead = len(nodes_at_start - _alive_ids())
            if not dead:
                reason = str(error).partition("The actor is dead because ")[2] or str(error)
                raise _failed(reason, config, died=True) from error
        shrinks = True
        prompts = without(prompts, done)
        nodes = f"{dead} node{'' if dead == 1 else 's'}"
        print(f"generate: {nodes} died; continuing with {prompts.num_rows} prompts on the others", file=sys.stderr)


def _alive_ids() -> set[str]:
    return {node.id for node in alive_nodes()}


def without(prompts: pa.Table, done: Container[str]) -> pa.Table:
    """Filter out the prompts that are done."""
    return prompts.filter(pa.array([id not in done for id in prompts["id"].to_pylist()], pa.bool_()))


def _pass(
    config: Config, model: str, prompts: pa.Table, ends: Sequence[int], nodes_at_start: set[str], shrinks: bool
) -> Generator[list[dict[str, Any]], None, None]:
    """Send all prompts through one pool of engines."""
    rows, size = prompts.num_rows, config.generate.batch_size
    pool = engine_pool.size_pool(config, alive_nodes(), math.ceil(rows / size), shrinks)
    if config.generate.engine == "transformers" and batching(config, model) == "continuous":
        # Keep enough batches for every engine.
        size = max(size, min(SUPPLY * size, math.ceil(rows / pool.engines)))
    batches = _batches(prompts, size)
    with engine_pool.quiet_ray_data():
        pipeline = _by_vllm if config.generate.engine == "vllm" else _by_actors
        dataset, read = pipeline(config, model, ends, batches, pool)
        # The pipeline runs in an actor, which can be killed when it waits for an engine that never comes back.
        [split] = dataset.streaming_split(1)
        with _StallGuard(split_coordinator(split), nodes_at_start) as guard:
            batch: Any
            for batch in split.iter_batches(batch_size=cast(Any, None), batch_format="pyarrow", prefetch_batches=0):
                entries = read(batch.to_pylist())
                guard.received(entries[0]["seconds"])
                yield entries


def _by_actors(
    config: Config, model: str, ends: Sequence[int], batches: Sequence[pa.Table], pool: engine_pool.Pool
) -> tuple[ray.data.Dataset, _Read]:
    """Build a pipeline with the engines of this package, and the function that reads its rows."""

    def read(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
        if "failed" in rows[0]:
            raise _failed(rows[0]["failed"], config) from RuntimeError(rows[0]["traceback"])
        return rows

    dataset = ray.data.from_arrow(list(batches)).map_batches(
        _EngineActor,
        fn_constructor_args=(config, model, ends, pool.engines_per_node),
        batch_size=None,  # one block is one batch
        batch_format="pyarrow",
        zero_copy_batch=True,
        # One batch per engine at a time; otherwise the first engine to start would take them all.
        compute=ray.data.ActorPoolStrategy(size=pool.engines, max_tasks_in_flight_per_actor=1),
        num_cpus=pool.cpus,
        num_gpus=pool.gpus,
        # Ray Data restarts without limit by default: an engine killed for its memory would restart forever.
        max_restarts=RESTARTS,
        # Without limit: Ray needs 15 seconds to tell a dead node from a passing disturbance.
        max_task_retries=-1,
    )
    return dataset, read


def _by_vllm(
    config: Config, model: str, ends: Sequence[int], batches: Sequence[pa.Table], pool: engine_pool.Pool
) -> tuple[ray.data.Dataset, _Read]:
    """Build a pipeline with vLLM, and the function that reads its rows."""
    from raysft.generate.engines import vllm

    vllm_model = vllm.VllmModel.of(config, model, ends)

    def read(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
        entries = vllm.entries(rows, vllm_model.stops)
        if len(entries) > 1 and all(entry["error"] for entry in entries):  # not the fault of one prompt
            raise _failed(entries[0]["error"], config)
        return entries

    return vllm.completed(config, vllm_model, batches, pool, RESTARTS), read


class _StallGuard:
    """Stop a pipeline that waits for an engine whose node died and which fits on no other node."""

    def __init__(self, pipeline: Any, nodes_at_start: set[str]) -> None:
        self._pipeline, self._nodes_at_start = pipeline, nodes_at_start
        self._last, self._longest = time.monotonic(), 0.0
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> _StallGuard:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        ray.kill(self._pipeline)

    def received(self, seconds: float) -> None:
        """A batch, for which an engine took so long."""
        self._last, self._longest = time.monotonic(), max(self._longest, seconds)

    def _watch(self) -> None:
        while not self._done.wait(5.0):
            waited = time.monotonic() - self._last
            if waited > max(STALL_SECONDS, 3 * self._longest) and not self._nodes_at_start <= _alive_ids():
                ray.kill(self._pipeline)
                return


def _batches(prompts: pa.Table, size: int) -> list[pa.Table]:
    """Group prompts of similar length, longest first.

    Similar lengths leave little padding. With the longest first, a lack of memory shows early, and the last batches, for which
    some engines wait for others, are short. A batch that is not full comes first, because the longest prompts differ most in
    length.
    """
    lengths = np.asarray(pa.compute.list_value_length(prompts["input_ids"]))  # pyright: ignore
    order = np.argsort(-lengths, kind="stable")
    ordered = prompts.select(["id", "input_ids"]).take(pa.array(order))
    ends = range(ordered.num_rows % size or size, ordered.num_rows + 1, size)
    return [ordered.slice(max(0, end - size), min(size, end)).combine_chunks() for end in ends]


class _EngineActor:
    """Engine in an actor of Ray Data.

    An exception is returned as data; Ray would print it three times, a hundred lines each.
    """

    def __init__(self, config: Config, model: str, ends: Sequence[int], engines_per_node: int) -> None:
        threads = None if config.scaling.use_gpu else engine_pool.threads(config, engines_per_node)
        self._make = functools.partial(create_engine, config, model, threads, ends)
        self._engine: Engine | None = None

    def __call__(self, batch: pa.Table) -> pa.Table:
        from raysft.generate.engines.bisection import (
            complete,  # imports torch, which the pipeline itself does not need
        )

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


def _failed(reason: str, config: Config, *, died: bool = False) -> RunFailed:
    """Describe the failure of an engine in one line, with a remedy if there is one."""
    reason = " ".join(reason.split())
    remedy = ""
    if died or "outofmemory" in reason.lower().replace(" ", ""):
        remedy = f"; if memory ran out, lower generate.batch_size={config.generate.batch_size}"
        if config.generate.engine == "vllm":  # which never runs more prompts at a time than fit
            remedy = f"; if memory ran out, raise generate.gpus_per_engine={config.generate.gpus_per_engine}"
        elif config.scaling.use_gpu:
            remedy += ", or raise generate.gpus_per_engine"
    what = f"an engine died {RESTARTS + 1} times: " if died else ""
    return RunFailed(f"generation failed: {what}{reason:.500}{remedy}")
