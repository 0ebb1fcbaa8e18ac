"""Batch inference: prompts through a pool of engines on the cluster, to predictions on disk and their metrics."""

from __future__ import annotations

import contextlib
import functools
import sys
import time
import traceback
from collections.abc import Generator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import ray.data
from ray.exceptions import RayError

from raysft.config import Config, RequestError
from raysft.generate import cluster, metrics
from raysft.generate.engines import Engine, create_engine
from raysft.generate.journal import Journal, fingerprint
from raysft.generate.progress import GenerationProgress
from raysft.records import RunFailed, read_jsonl

COLUMNS = ("id", "source", "prompt", "input_ids", "label")
RESTARTS = 3
"""How often an engine whose process died is started again, and a batch is tried again."""


def generate(config: Config, *, model: str, prompts: Path, output: Path, progress: bool = True) -> dict[str, float]:
    """Predict what follows each prompt, write the predictions in the order of the prompts, and score them.

    Ray must be initialised. Predictions are kept as they come: when this is killed and called again with the same
    model, prompts and settings, only what is missing is generated; a complete ``output`` is only scored again.

    Args:
        model: folder of a Hugging Face model, or of a peft adapter whose base is a local folder.
        prompts: Parquet with the columns id (unique), source, prompt, input_ids and label.
        output: JSON lines to write: ``{"prompt", "predict", "label", "id", "source"}``.
        progress: say on stderr how far it is.

    Returns:
        The metrics (``predict_rouge-1``, …, by source as well where there are several), ``predict_examples``, and of
        the call that generated: ``predict_runtime`` in seconds, ``predict_tokens_per_second`` without the engines'
        start.

    Raises:
        RequestError: the model, the prompts, a metric or the size of the pool cannot be, said before anything starts.
        RunFailed: an engine failed; what it had predicted stays on disk.
    """
    metrics.check(config)
    output = Path(output)
    table = _read_prompts(Path(prompts))
    journal = Journal(output, fingerprint(config, model, Path(prompts)))
    facts = journal.finished()
    if facts is None:
        facts = _generate_missing(config, model, table, journal, name=output.stem, shown=progress)
    results = metrics.score(config, list(read_jsonl(output)))
    results["predict_runtime"] = facts["runtime"]
    results["predict_tokens_per_second"] = facts["tokens_per_second"]
    return results


def _generate_missing(
    config: Config, model: str, table: pa.Table, journal: Journal, *, name: str, shown: bool
) -> dict[str, Any]:
    """Complete the prompts that the journal does not have, and finish it; gives the facts of this."""
    with contextlib.closing(journal):
        entries = journal.open()
        missing = table.filter(pa.array([id not in entries for id in table["id"].to_pylist()], pa.bool_()))
        use_gpu = config.scaling.use_gpu
        state = GenerationProgress(
            name, total=table.num_rows, done=len(entries), waiting=lambda: cluster.free_now(use_gpu), shown=shown
        )
        with state, contextlib.closing(_completions(config, model, missing)) as batches:
            for batch in batches:
                journal.append(batch)
                entries.update((entry["id"], entry) for entry in batch)
                state.advance(len(batch), sum(entry["tokens"] for entry in batch), batch[0]["seconds"])
        facts = {"runtime": round(state.seconds, 3), "tokens_per_second": round(state.tokens_per_second, 3)}
        journal.finish(_rows(table, entries), facts)
    cut = sum(1 for entry in entries.values() if entry["cut"])
    if cut:
        print(f"{name}: {cut} of {table.num_rows} prompts lost their beginning, which with generate.max_new_tokens="
              f"{config.generate.max_new_tokens} has no room in the model's positions", file=sys.stderr)  # fmt: skip
    return facts


def _read_prompts(path: Path) -> pa.Table:
    try:
        table = pq.read_table(path)
    except (OSError, pa.ArrowInvalid) as error:
        raise RequestError(f"{path}: the prompts cannot be read as Parquet ({error}); write them anew") from None
    lacking = [column for column in COLUMNS if column not in table.column_names]
    if lacking:
        raise RequestError(f"{path}: the prompts lack the column {lacking[0]!r} (of {table.column_names}); add it")
    if len(set(table["id"].to_pylist())) != table.num_rows:
        raise RequestError(f"{path}: two of {table.num_rows} prompts have the same id; give each its own")
    return table.select(list(COLUMNS))


def _rows(table: pa.Table, entries: dict[str, dict[str, Any]]) -> list[dict[str, Any]]:
    """The predictions as the output has them, in the order of the prompts."""
    columns = (table[column].to_pylist() for column in ("prompt", "label", "id", "source"))
    return [
        {"prompt": prompt, "predict": entries[id]["predict"], "label": label, "id": id, "source": source}
        for prompt, label, id, source in zip(*columns, strict=True)
    ]


def _completions(config: Config, model: str, missing: pa.Table) -> Generator[list[dict[str, Any]], None, None]:
    """Batches of entries ({id, predict, tokens, cut, seconds}) as the engines finish them, in any order."""
    if not missing.num_rows:
        return
    batches = _batches(missing, config.generate.batch_size)
    pool = cluster.size_pool(config, cluster.nodes(), len(batches))
    with cluster.quiet_ray_data():
        dataset = ray.data.from_arrow(batches).map_batches(
            _EngineActor,
            fn_constructor_args=(config, model, pool.engines_per_node),
            batch_size=config.generate.batch_size,  # a block holds just that many
            batch_format="pyarrow",
            zero_copy_batch=True,
            # One batch each at a time, or the engine that is up first would take those of the others.
            compute=ray.data.ActorPoolStrategy(size=pool.engines, max_tasks_in_flight_per_actor=1),
            num_cpus=pool.cpus,
            num_gpus=pool.gpus,
            # Ray Data's own choice is without end: an engine killed for its memory would be started for ever.
            max_restarts=RESTARTS,
            max_task_retries=RESTARTS,
        )
        try:
            batch: Any
            for batch in dataset.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=0):
                entries = batch.to_pylist()
                if "error" in entries[0]:
                    raise _failed(entries[0]["error"], config) from RuntimeError(entries[0]["traceback"])
                yield entries
        except RayError as error:
            raise _failed(
                str(error).partition("The actor is dead because ")[2] or str(error), config, died=True
            ) from error


def _batches(prompts: pa.Table, size: int) -> list[pa.Table]:
    """Prompts of like length together, so that little of a batch is padding; longest first, so that the last batches,
    for which some engines wait for others, are short and too much for the memory shows at once.
    """
    lengths = np.asarray(pa.compute.list_value_length(prompts["input_ids"]))  # pyright: ignore
    order = np.argsort(-lengths, kind="stable")
    ordered = prompts.select(["id", "input_ids"]).take(pa.array(order))
    return [ordered.slice(start, size).combine_chunks() for start in range(0, ordered.num_rows, size)]


class _EngineActor:
    """An engine in a process of its own, as Ray Data calls it.

    What an engine raises comes back as data: Ray would print it three times over, a hundred lines each.
    """

    def __init__(self, config: Config, model: str, engines_per_node: int) -> None:
        threads = None if config.scaling.use_gpu else cluster.threads(config, engines_per_node)
        self._make = functools.partial(create_engine, config, model, threads)
        self._engine: Engine | None = None

    def __call__(self, batch: pa.Table) -> pa.Table:
        start = time.monotonic()
        ids = batch["id"].to_pylist()
        try:
            self._engine = self._engine or self._make()
            start = time.monotonic()
            completions = self._engine.complete(ids, batch["input_ids"].to_pylist())
        except Exception as error:
            line = " ".join(f"{type(error).__name__}: {error}".split())
            return pa.table({"error": [line], "traceback": [traceback.format_exc()]})
        seconds = time.monotonic() - start
        return pa.table(
            {
                "id": ids,
                "predict": [completion.text for completion in completions],
                "tokens": [completion.tokens for completion in completions],
                "cut": [completion.cut for completion in completions],
                "seconds": [seconds] * len(ids),
            }
        )


def _failed(reason: str, config: Config, *, died: bool = False) -> RunFailed:
    """One line for what went wrong in an engine, with a remedy where there is one."""
    reason = " ".join(reason.split())
    remedy = ""
    if died or "outofmemory" in reason.lower().replace(" ", ""):
        remedy = f"; if memory ran out, lower generate.batch_size={config.generate.batch_size}"
    what = f"an engine died {RESTARTS + 1} times: " if died else ""
    return RunFailed(f"generation failed: {what}{reason:.500}{remedy}")
