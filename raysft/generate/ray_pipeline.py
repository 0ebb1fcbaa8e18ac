"""Run prompts through a pool of engine actors with Ray Data, and survive nodes that die."""

from __future__ import annotations

import math
import sys
import threading
import time
from collections.abc import Callable, Generator, Iterator, Sequence
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
from raysft.generate.engine_actor import EngineActor, batch_row
from raysft.generate.engines import batching
from raysft.generate.prompts import ModelPrompts
from raysft.stopping import current

RESTARTS = 3
"""How often an engine is restarted after its process died, whichever model it has loaded."""
SUPPLY = 4
"""Batches that an engine receives at a time if it batches continuously, or prepares the images of a batch during the one before.
More keep it busy for longer before its last prompts run out; fewer lose less when it dies."""
WORTH = 64
"""Prompts that another engine is started for, though a batch may hold more."""
_Entries = list[dict[str, Any]]
_Read = Callable[[_Entries], tuple[int, _Entries]]
STALL_SECONDS = 60.0
"""Time without a batch (and at least three times the longest batch so far) after which the engines of a dead node are given up."""


def completions(
    config: Config,
    asked: Sequence[ModelPrompts],
    ends: Sequence[int] = (),
    room: engine_pool.Room | None = None,
    alive: Callable[[], None] | None = None,
) -> Generator[tuple[int, _Entries], None, None]:
    """Yield batches of entries as the engines finish them, each with the index in ``asked`` that it belongs to.

    An entry is {id, predict, tokens, cut, stop, error, seconds}. One pool of engines completes the prompts of all models: it
    starts with those of the first, and an engine loads the next model when nothing is left to take for the one before. Batches
    of a model come in any order, and its last ones may come after the first ones of the next. vLLM gets a pool for each model.
    When a node dies, the remaining prompts go to engines on the nodes that are alive.

    Args:
        ends: tokens that end an answer, besides those of the model and the config.
        room: what the engines may use. Default: the whole cluster.
        alive: as ``Listener.engine``.

    Raises:
        RequestError: the cluster cannot place an engine.
        RunFailed: an engine failed, but not because its node died; or that, and the engines had a room.
    """
    if config.generate.engine != "vllm":
        yield from _on_living_nodes(config, asked, ends, room, alive)
        return
    for index, each in enumerate(asked):
        for _, entries in _on_living_nodes(config, [each], ends, room, alive):
            yield index, entries


def _on_living_nodes(
    config: Config,
    asked: Sequence[ModelPrompts],
    ends: Sequence[int],
    room: engine_pool.Room | None,
    alive: Callable[[], None] | None,
) -> Generator[tuple[int, _Entries], None, None]:
    """Send the prompts through a pool of engines, and what is missing through another whenever nodes have died."""
    shrinks, stopping = False, current()
    while any(map(len, asked)):
        nodes_at_start, done = _alive_ids(), [np.zeros(len(each.prompts), bool) for each in asked]
        try:
            for index, entries in _pass(config, asked, ends, nodes_at_start, shrinks, room, alive):
                done[index][[asked[index].prompts.index[entry["id"]] for entry in entries]] = True
                yield index, entries
            return
        except RayError as error:
            stopping.check()
            dead = len(nodes_at_start - _alive_ids())
            if not dead or room is not None:
                reason = str(error).partition("The actor is dead because ")[2] or str(error)
                raise _failed(reason, config, died=True) from error
        shrinks = True
        asked = [each.without(finished) for each, finished in zip(asked, done, strict=True)]
        nodes, left = f"{dead} node{'' if dead == 1 else 's'}", sum(map(len, asked))
        print(f"generate: {nodes} died; continuing with {left} prompts on the others", file=sys.stderr)


def _alive_ids() -> set[str]:
    return {node.id for node in alive_nodes()}


def _pass(
    config: Config,
    asked: Sequence[ModelPrompts],
    ends: Sequence[int],
    nodes_at_start: set[str],
    shrinks: bool,
    room: engine_pool.Room | None,
    alive: Callable[[], None] | None,
) -> Generator[tuple[int, _Entries], None, None]:
    """Send all prompts through one pool of engines."""
    number = sum(math.ceil(len(each) / min(config.generate.batch_size, WORTH)) for each in asked)
    pool = room.pool(config, number) if room else engine_pool.size_pool(config, alive_nodes(), number, shrinks)
    batches = [each.batches(_block_size(config, each, pool)) for each in asked]
    with engine_pool.quiet_ray_data():
        models = [each.model for each in asked]
        if config.generate.engine == "vllm":
            dataset, read = _by_vllm(config, models, ends, batches, pool)
        else:
            dataset, read = _by_actors(config, models, ends, batches, pool, alive)
        # The pipeline runs in an actor, which can be killed when it waits for an engine that never comes back.
        [split] = dataset.streaming_split(1)
        with _StallGuard(split_coordinator(split), nodes_at_start) as guard:
            batch: Any
            for batch in split.iter_batches(batch_size=cast(Any, None), batch_format="pyarrow", prefetch_batches=0):
                index, entries = read(batch.to_pylist())
                guard.received(entries[0]["seconds"])
                yield index, entries


def _block_size(config: Config, asked: ModelPrompts, pool: engine_pool.Pool) -> int:
    """Number of prompts that an engine receives at a time."""
    size = most = config.generate.batch_size
    if config.generate.engine == "transformers" and (
        asked.prompts.media is not None or batching(config, asked.model) == "continuous"
    ):
        most = SUPPLY * size
    # Keep enough batches for every engine.
    return min(most, max(min(size, WORTH), math.ceil(len(asked) / pool.engines)))


def _by_actors(
    config: Config,
    models: Sequence[str],
    ends: Sequence[int],
    batches: Sequence[Iterator[pa.Table]],
    pool: engine_pool.Pool,
    alive: Callable[[], None] | None,
) -> tuple[ray.data.Dataset, _Read]:
    """Build a pipeline with the engines of this package, and the function that reads its rows."""

    def read(rows: _Entries) -> tuple[int, _Entries]:
        if "failed" in rows[0]:
            raise _failed(rows[0]["failed"], config) from RuntimeError(rows[0]["traceback"])
        index = int(rows[0]["model"])
        return index, [{key: value for key, value in row.items() if key != "model"} for row in rows]

    rows = (batch_row(batch, index) for index, of_model in enumerate(batches) for batch in of_model)
    if pool.options:
        source = ray.data.from_blocks(list(rows))  # looks at the rows here: tasks may find no CPU
    else:
        # One at a time into the object store, so that this process never holds the tokens of all prompts.
        source = ray.data.from_arrow_refs(cast(Any, [ray.put(row) for row in rows]))
    dataset = source.map_batches(
        EngineActor,
        fn_constructor_args=(config, models, ends, pool.engines_per_node, pool.threads, alive),
        # Ray Data takes a number alone for GPUs, and to reach it merges blocks.
        batch_size=1,
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
        **pool.options,
    )
    return dataset, read


def _by_vllm(
    config: Config,
    models: Sequence[str],
    ends: Sequence[int],
    batches: Sequence[Iterator[pa.Table]],
    pool: engine_pool.Pool,
) -> tuple[ray.data.Dataset, _Read]:
    """Build a pipeline with vLLM for one model, and the function that reads its rows."""
    from raysft.generate.engines import vllm

    [model], [of_model] = models, batches
    vllm_model = vllm.VllmModel.of(config, model, ends)

    def read(rows: _Entries) -> tuple[int, _Entries]:
        entries = vllm.entries(rows, vllm_model.stops)
        if len(entries) > 1 and all(entry["error"] for entry in entries):  # not the fault of one prompt
            raise _failed(entries[0]["error"], config)
        return 0, entries

    return vllm.completed(config, vllm_model, list(of_model), pool, RESTARTS), read


class _StallGuard:
    """Stop a pipeline that waits for an engine whose node died and which fits on no other node, or whose run is to stop."""

    def __init__(self, pipeline: Any, nodes_at_start: set[str]) -> None:
        self._pipeline, self._nodes_at_start = pipeline, nodes_at_start
        self._last, self._longest = time.monotonic(), 0.0
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        # Batches under way are dropped: they may take longer than there is time.
        self._telling = current().telling(lambda request: ray.kill(self._pipeline))

    def __enter__(self) -> _StallGuard:
        self._telling.__enter__()
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._telling.__exit__(None, None, None)
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


def _failed(reason: str, config: Config, *, died: bool = False) -> RunFailed:
    """Describe the failure of an engine in one line, with a remedy if there is one."""
    reason = " ".join(reason.split())
    remedy = ""
    if died or "outofmemory" in reason.lower().replace(" ", ""):
        remedy = f"; if memory ran out, lower generate.batch_size={config.generate.batch_size}"
        if config.generate.engine == "vllm":  # which never runs more prompts at a time than fit
            remedy = f"; if memory ran out, raise generate.gpus_per_engine={config.generate.gpus_per_engine}"
            if not config.scaling.use_gpu:
                remedy = "; if memory ran out, lower VLLM_CPU_KVCACHE_SPACE, the GiB of its cache, on every node"
        elif config.scaling.use_gpu:
            remedy += ", or raise generate.gpus_per_engine"
    what = f"an engine died {RESTARTS + 1} times: " if died else ""
    return RunFailed(f"generation failed: {what}{reason:.500}{remedy}")
