"""The cases of ``tests.benchmarks.scale``: each returns a function that is measured."""

from __future__ import annotations

import multiprocessing
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

CAPACITY, MEAN, SHARD_EXAMPLES = 4096, 500, 10_000
"""Tokens in a row, mean tokens of an example, examples in a shard."""
ROWS_PER_WORKER = 2
"""Rows of each worker in a step."""
NODE_WORKERS = 8
"""Workers of a node."""
PROMPT_TOKENS = 100
"""Mean tokens of a prompt."""


def alone(function: Callable[..., Any], *arguments: Any) -> Any:
    """Call a function in a process of its own."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(function, *arguments).result()


@contextmanager
def prepared(name: str, examples: int, workers: int, folder: Path) -> Iterator[Any]:
    """Make what a case needs, in processes of their own."""
    if name == "checkpoints":
        from tests.objects import s3_server

        with s3_server() as server:
            alone(write_checkpoints, server.uri("checkpoints"), workers)
            server.requests.clear()
            yield server.uri("checkpoints")
        return
    if name == "prompts":
        place = folder / f"prompts-{examples}"
        if not place.exists():
            alone(write_prompts, place, examples)
        yield place
        return
    place = folder / f"set-{examples}"
    if name != "events" and not place.exists():
        alone(write_lengths, place, examples)
    if name != "plan" and name != "events":
        alone(planned, place, workers, name == "first row")
    yield place


def write_lengths(place: Path, examples: int) -> None:
    from tests.synthetic import write_set

    random = np.random.default_rng(0)
    lengths = np.empty(examples, np.int32)
    for first in range(0, examples, 1 << 20):
        part = lengths[first : first + (1 << 20)]
        part[:] = np.exp(random.normal(np.log(MEAN) - 0.5, 1.0, len(part))).clip(2, CAPACITY)
    write_set(place, lengths, shard_examples=SHARD_EXAMPLES, with_tokens=False)


def dataset_of(place: Path, workers: int) -> Any:
    from raysft.data.rows.packed_dataset import PackedDataset

    return PackedDataset((str(place / "manifest.parquet"),), CAPACITY, max(32, ROWS_PER_WORKER * workers))


def planned(place: Path, workers: int, with_tokens: bool) -> None:
    """Plan the rows, and write the shards that the first rows of all workers need."""
    from raysft.data.rows.ray_stream import plan_pieces
    from raysft.data.shards.manifest import load_manifest, load_shard_files
    from raysft.storage.path import StoragePath
    from tests.synthetic import write_shard

    rows = dataset_of(place, workers)
    if not rows.row_plan.rows or not with_tokens:
        return
    piece = next(plan_pieces(rows.row_plan, 0, workers))
    numbers = np.arange(piece.stop_step * rows.global_batch_size)
    path = StoragePath(rows.manifests[0])
    manifest, files = load_manifest(path), load_shard_files(path)
    for shard in np.unique(rows._find_slices(numbers).shards).tolist():
        first = shard * SHARD_EXAMPLES
        write_shard(files.paths()[shard], 0, first, manifest.lengths[first : first + SHARD_EXAMPLES])


def plan(examples: int, workers: int, place: Path) -> Callable[[], str]:
    for stored in place.glob("rows-*"):
        stored.unlink()
    rows = dataset_of(place, workers)

    def work() -> str:
        row_plan = rows.row_plan
        packed, trained = row_plan.packing_efficiency, row_plan.step_loss_tokens.sum()
        return f"{row_plan.steps:,} steps, {packed:.2%} packed, {trained:,} loss tokens"

    return work


def open(examples: int, workers: int, place: Path) -> Callable[[], str]:
    import pickle

    rows = dataset_of(place, workers)
    _ = rows.row_plan
    sent = pickle.dumps(rows)
    return lambda: f"{pickle.loads(sent).row_plan.step_tokens[-1]:,} tokens in the last step"


def dataset(examples: int, workers: int, place: Path) -> Callable[[], str]:
    start_ray()
    import ray

    from raysft.data.rows.ray_stream import plan_pieces
    from raysft.train.job import SPLIT_WORKERS

    rows = dataset_of(place, workers)

    def split() -> str:
        assert rows.dataset(0, workers) is not None
        return f"{sum(1 for _ in plan_pieces(rows.row_plan, 0, workers)):,} pieces"

    def node() -> str:
        shards = rows.node_shards(0, [ray.get_runtime_context().get_node_id()] * workers)
        return f"{len(shards):,} shards of one node"

    return split if workers <= SPLIT_WORKERS else node


def start_ray() -> None:
    import logging

    import ray.data  # which configures its loggers when it is imported

    for name in ("ray", "ray.data"):
        logging.getLogger(name).setLevel(logging.ERROR)
    ray.init(address="local", num_cpus=1, include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR)


def first_row(examples: int, workers: int, place: Path) -> Callable[[], str]:
    from dataclasses import asdict

    from raysft.data.rows.node_reader import NodeReader
    from raysft.data.rows.ray_stream import plan_pieces, read_pieces, steps_per_block
    from raysft.train.job import SPLIT_WORKERS

    rows = dataset_of(place, workers)

    def split() -> str:
        columns = {
            name: np.array([value]) for name, value in asdict(next(plan_pieces(rows.row_plan, 0, workers))).items()
        }
        tables = read_pieces(columns, rows, workers)
        for _ in range(workers):
            table = next(tables)
        return f"{table.nbytes / 2**20:.1f} MiB in a block"

    def node() -> str:
        reader = NodeReader(rows, range(workers - NODE_WORKERS, workers), workers)
        table = reader.block(0, steps_per_block(rows.row_plan, workers), workers - 1)
        return f"{table.nbytes / 2**20:.1f} MiB in a block"

    return split if workers <= SPLIT_WORKERS else node


def events(examples: int, workers: int, place: Path) -> Callable[[], str]:
    start_ray()
    from concurrent.futures import ThreadPoolExecutor

    from raysft.telemetry.events import Waiting
    from raysft.train.controller import Controller
    from raysft.train.event_pump import EventPump, emitter
    from raysft.train.mailbox import Mailbox

    mailbox, handled, all_there = Mailbox(), [], threading.Event()

    def handle(event: Any) -> None:
        handled.append(event)
        if len(handled) == workers:
            all_there.set()

    def work() -> str:
        with EventPump(mailbox, handle, Controller()), ThreadPoolExecutor(min(workers, 200)) as pool:
            list(pool.map(lambda number: emitter(mailbox)(Waiting(f"worker {number}")), range(workers)))
            assert all_there.wait(300)
            return f"{len(handled):,} events"

    return work


def write_checkpoints(location: str, workers: int) -> None:
    """Two checkpoints of small parts, as ``async_writer`` leaves them."""
    import hashlib
    import json
    from concurrent.futures import ThreadPoolExecutor
    from dataclasses import asdict

    from raysft.storage.path import StoragePath
    from raysft.train.checkpoint.catalog import folder_name
    from raysft.train.checkpoint.cursor import Cursor

    for step in (100, 200):
        folder = StoragePath.of(location) / folder_name(step, "a")
        cursor = json.dumps(asdict(Cursor(step, step * 8, step * 1000, {}, workers=workers))).encode()
        digest = {"sha256": hashlib.sha256(cursor).hexdigest(), "bytes": len(cursor)}
        files = {"cursor.json": cursor}
        for rank in range(workers):
            files |= {f"part_{rank}.safetensors": b"w", f"state_{rank}.pt": b"s"}
            files[f"part_{rank}.json"] = json.dumps({"cursor.json": digest} if rank == 0 else {}).encode()
        with ThreadPoolExecutor(8) as pool:
            list(pool.map(StoragePath.write_bytes, [folder / name for name in files], files.values()))


def checkpoints(examples: int, workers: int, location: str) -> Callable[[], str]:
    from raysft.storage.path import StoragePath
    from raysft.train.checkpoint import catalog

    place = StoragePath.of(location)

    def work() -> str:
        found = catalog.newest(place)
        assert found is not None
        assert found.cursor.step == 200
        return ""

    return work


def write_prompts(place: Path, examples: int) -> None:
    """A file of prompts as ``raysft.data.shards.prompts`` writes it, and a model."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    from raysft.data.shards.prompts import SCHEMA
    from tests.tiny import tiny_model

    tiny_model(place / "model")
    random = np.random.default_rng(0)
    with pq.ParquetWriter(place / "prompts.parquet", SCHEMA) as writer:
        for first in range(0, examples, 8192):
            numbers = range(first, min(first + 8192, examples))
            lengths = np.exp(random.normal(np.log(PROMPT_TOKENS) - 0.5, 1.0, len(numbers))).clip(1, 1000).astype(int)
            columns = {
                "id": [f"source/file.jsonl:{number}" for number in numbers],
                "source": ["one" if number % 3 else "two" for number in numbers],
                "prompt": [
                    f"question {number} ".ljust(4 * int(n), "?") for number, n in zip(numbers, lengths, strict=True)
                ],
                "input_ids": [np.arange(n, dtype=np.int32) for n in lengths],
                "label": [answer(number) for number in numbers],
            }
            writer.write_table(pa.table(columns, SCHEMA))


def answer(number: int) -> str:
    return f"answer {number} ".ljust(400, "!")


def prompts(examples: int, workers: int, place: Path) -> Callable[[], str]:
    """Engines that answer at once; all else is as in a run."""
    start_ray()
    import ray

    from raysft.config import parse
    from raysft.generate import batch_inference
    from raysft.generate.engine_actor import batch_row

    generate = {"metrics": ["exact_match"], "max_new_tokens": 8}
    data = {"train": [{"name": "a", "path": "a"}]}
    config = parse({"model": {"path": str(place / "model")}, "data": data, "generate": generate})

    def completions(config: Any, asked: Any, ends: Any) -> Any:
        refs = [ray.put(batch_row(batch, 0)) for batch in asked[0].batches(256)]
        for ref in refs:
            entries = []
            for id in ray.get(ref)["id"][0].as_py():
                number = int(id.rpartition(":")[2])
                predict = answer(number + (number % 2))
                entries.append(
                    {"id": id, "predict": predict, "tokens": 100, "cut": 0, "stop": "eos", "error": "", "seconds": 1}
                )
            yield 0, entries

    batch_inference.completions = completions  # pyright: ignore[reportAttributeAccessIssue]
    output = place / "predictions.jsonl"
    for left in (output, output.with_name(f".{output.name}.done")):
        left.unlink(missing_ok=True)

    def work() -> str:
        outputs = [batch_inference.Output(str(place / "model"), output)]
        rows = batch_inference.generate(config, place / "prompts.parquet", outputs, progress=False)
        found = {(row.metric, row.source): row for row in rows}
        row = found["exact_match", None]
        return f"exact match {row.value} ({row.low} to {row.high}), {output.stat().st_size / 2**20:,.0f} MiB of predictions"

    return work
