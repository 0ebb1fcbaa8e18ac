"""Trainings without Ray, in process groups of their own, and the plain loop that they are compared with."""

import contextlib
import itertools
import json
import multiprocessing
import os
import queue
import random
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, NamedTuple
from unittest.mock import patch

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from raysft.config import Config, parse, with_overrides
from raysft.config.optimizer_settings import OWN_EPSILON
from raysft.data.rows.packed_dataset import PackedDataset
from raysft.data.shards.manifest import Manifest
from raysft.data.types import IGNORE_INDEX
from raysft.errors import RequestError, RunFailed
from raysft.storage.path import StoragePath
from raysft.storage.run_directory import RunDirectory
from raysft.telemetry.events import StepRecord, TrainingEnded
from raysft.train.faults import Fault
from raysft.train.job import TrainJob
from raysft.train.phases import Phases
from raysft.train.read_ahead import ReadAhead
from raysft.train.sequence_group import group_of
from tests.processes import forks
from tests.shards import the_set, written
from tests.tiny import SENTENCES, tiny_model

TOLERANCE = 1e-5
SEQUENCE_LENGTH = 96
STEPS = 4
WITHIN_SECONDS = 300
"""How long one training may take before it counts as hanging; on a busy machine processes take a minute to start."""


def conversations(count: int) -> list[dict]:
    draw = random.Random(5)
    words = " ".join(SENTENCES).split()
    return [
        {
            "messages": [
                {"role": "user", "content": " ".join(draw.choices(words, k=draw.randint(1, 6)))},
                {"role": "assistant", "content": " ".join(draw.choices(words, k=draw.randint(1, 8)))},
            ]
        }
        for _ in range(count)
    ]


def write_conversations(file: Path, count: int) -> None:
    file.write_text("".join(json.dumps(record) + "\n" for record in conversations(count)))


def prepare(folder: Path) -> tuple[Path, Path, Manifest]:
    """Make a tiny model, and shards of some conversations: (folder, model, manifest)."""
    model = tiny_model(folder / "model")
    write_conversations(folder / "data.jsonl", 60)
    config = make_config(folder, model)
    return folder, model, written(the_set(config, str(model)), str(model))


def make_config(folder: Path, model: Path, settings: dict[str, Any] | None = None, **train) -> Config:
    """Make the config of a training of a few steps.

    Args:
        folder: of the run and its data.
        model: the model to start from.
        settings: dotted keys and their values.
        train: keys of the section ``train``, and ``finetuning`` of ``model``.
    """
    finetuning = train.pop("finetuning", "full")
    optimizer = (settings or {}).get("train.optimizer", train.get("optimizer", "adamw"))
    config = parse(
        {
            "run": {"name": "r", "storage": str(folder), "seed": 3},
            "model": {"path": str(model), "dtype": "float32", "finetuning": finetuning},
            "data": {
                "train": [{"name": "d", "path": str(folder / "data.jsonl")}],
                "sequence_length": SEQUENCE_LENGTH,
            },
            "train": {
                "global_batch_size": 4,
                "learning_rate": 1e-2,
                "warmup_ratio": 0.0,
                "max_steps": STEPS,
                "zero_stage": 0,
                # Adam divides by the root of the second moment, which turns rounding of gradients near 0 into steps.
                **({} if optimizer in OWN_EPSILON else {"epsilon": 1e-4}),
                **train,
            },
        }
    )
    return with_overrides(config, settings) if settings else config


def rows_of(
    manifest: Manifest, global_batch_size: int = 4, packing: bool = True, steps: int = STEPS, epochs: int = 1
) -> PackedDataset:
    path = f"{manifest.directory}/manifest.parquet"
    return PackedDataset(
        (path,),
        SEQUENCE_LENGTH,
        global_batch_size,
        seed=3,
        epochs=epochs,
        max_steps=steps,
        layout="packed" if packing else "single",
    )


@dataclass(frozen=True)
class Case:
    """One of several trainings in a process group."""

    config: Config
    rows: PackedDataset
    adapter: str | None = None
    reference: str | None = None
    resume: Path | None = None
    """The checkpoint to resume from."""
    keep: Path | None = None
    """Folder for checkpoints (``checkpoint_2`` after two steps). Default: none are written."""
    leaves_in: int | None = None
    """The step in which the last worker learns that its machine will be preempted."""
    eval_rows: PackedDataset | None = None
    """Rows to evaluate on. Default: the training rows."""
    chunk_tokens: int = 1024
    """Loss tokens per chunk of logits."""
    evaluations: Path | None = None
    """Folder of evaluations before the first step, to take them from and to keep them in. Default: none are kept."""
    decisions: dict[int, tuple[str, ...]] | None = None
    """By step of an evaluation, what a scheduler decides there in turn (names of ``Decision``); elsewhere it lets train on."""
    clocks: tuple[float, ...] = ()
    """Minutes by which each worker's clock advances whenever it is read. Default: real clocks."""
    asked: tuple[int, ...] = ()
    """By worker, from which of its questions on the answer is that the training is to stop; 0: from none. The first worker asks in
    each step, and here before each batch of an evaluation. Default: no worker is told to."""
    asked_once_saved: int | None = None
    """The step whose checkpoint makes the first worker be asked to stop. Default: none."""
    steps_with_rows: int | None = None
    """Steps whose rows come to the last worker; it waits for those of the next one for ever. Default: all."""
    steps_to_read: int | None = None
    """Steps whose rows the last worker can read; those of the next one raise an error. Default: all."""
    slow: tuple[str, float] = ("", 0.0)
    """What the last worker does too slowly, ``forward``, ``data`` or ``pixels``, and by how many seconds each time."""
    compiler: str = "inductor"
    """What compiles layers; ``aot_eager`` makes their graphs, and leaves out what takes most of the time: to write C++ for them."""
    writes_until_saved: bool = False
    """True if the model is not written before there is a checkpoint of the last step; all workers look for requests meanwhile."""


class Result(NamedTuple):
    """Result of a training."""

    losses: list[float]
    norms: list[float]
    weights: dict[str, np.ndarray]
    evaluation: dict[str, float]
    events: list[Any]
    """All events, in order."""
    model: Path
    """Folder of the trained model."""
    failure: str = ""
    asked_in: Sequence[str] = ()
    """What the first worker did whenever it was asked whether to stop."""


def worker(rank: int, world: int, port: int, cases: Sequence[Case], out, device: str = "cpu") -> None:
    """Run the trainings one after another in one process; rank 0 puts their results into ``out``."""
    os.environ.update(
        MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), RANK=str(rank), WORLD_SIZE=str(world), LOCAL_RANK=str(rank)
    )
    torch.set_num_threads(1)
    place = torch.device(device, rank) if device == "cuda" else torch.device(device)
    if place.type == "cuda":
        torch.cuda.set_device(place)
    backend = "nccl" if place.type == "cuda" else "gloo"
    torch.distributed.init_process_group(backend, rank=rank, world_size=world, timeout=timedelta(seconds=60))
    for number, case in enumerate(cases):
        result = _trained(case, rank, world, f"{world}-{port}-{number}", place)
        if result.failure:  # which another worker may not have
            print(f"training {number}, worker {rank}: {result.failure}", file=sys.stderr)
        if rank == 0:
            out.put(result)
        torch.distributed.barrier()
    torch.distributed.destroy_process_group()


def timeless(results: Mapping[str, Any]) -> dict[str, Any]:
    """Results without those that differ from run to run: times and speeds."""
    return {name: value for name, value in results.items() if not name.endswith(("runtime", "_per_second"))}


def _trained(case: Case, rank: int, world: int, name: str, device: torch.device) -> Result:
    from safetensors.torch import load_file

    from raysft.train import compilation, decisions, evaluation, export, loop, loss, stragglers, waiting, watched_write
    from raysft.train.checkpoint import parts, state, triggers
    from raysft.train.checkpoint.cursor import Cursor
    from raysft.train.checkpoint.resume import ResumePoint
    from raysft.train.pixels import ImageInputs

    loss.CHUNK_TOKENS, compilation.BACKEND = case.chunk_tokens, case.compiler
    readings = itertools.count(1)
    triggers.monotonic = (lambda: 60 * case.clocks[rank] * next(readings)) if case.clocks else time.monotonic
    evaluation.LOOK_SECONDS = 0.0
    stragglers.EVERY_STEPS = 2

    def save(engine: Any, cursor: Cursor, log: list[Any]) -> None:
        if case.keep:
            parts.write(state.snapshot(engine, cursor, log), case.keep / f"checkpoint_{cursor.step}")

    calls, questions = itertools.count(1), itertools.count(1)
    phases, asked_in = Phases(), []

    def notice() -> str:
        return "going" if case.leaves_in and rank == world - 1 and next(calls) >= case.leaves_in else ""

    def stop() -> str:
        asked_in.append(phases.moment)
        saved = case.keep and case.asked_once_saved and (case.keep / f"checkpoint_{case.asked_once_saved}").exists()
        asked = case.asked and case.asked[rank] and next(questions) >= case.asked[rank]
        return "asked to" if saved or asked else ""

    config, rows = case.config, case.rows
    events: list[Any] = []
    run = RunDirectory(config.run_directory / name)
    run.path.mkdir(parents=True, exist_ok=True)
    job = TrainJob(
        config=config,
        model=config.model.path,
        run=run,
        train_rows=rows,
        eval_rows={"d": case.eval_rows or rows},
        adapter=case.adapter,
        reference=case.reference,
        evaluations=StoragePath.of(case.evaluations) if case.evaluations else None,
    )
    failure = ""
    resume = ResumePoint.of(case.resume) if case.resume else None
    share = group_of(rank, world, config.scaling.sequence_parallel)
    batches = rows.steps(resume.cursor.step if resume else 0, *share)
    slow, seconds = case.slow if rank == world - 1 else ("", 0.0)
    waits_for_rows = bool(case.steps_with_rows is not None or case.slow[0] == "data")
    # Else how often a worker is asked would depend on the time that its rows take.
    loop.ReadAhead = ReadAhead if waits_for_rows else _Patient
    waiting.LOOK_SECONDS = 0.05
    if case.steps_with_rows is not None and rank == world - 1:
        batches = itertools.chain(itertools.islice(batches, case.steps_with_rows), _never())
    if case.steps_to_read and rank == world - 1:
        batches = itertools.chain(itertools.islice(batches, case.steps_to_read), _broken())
    if slow == "data":
        batches = (time.sleep(seconds) or batch for batch in batches)
    outside = decisions.Outside(notice, stop, _scheduler(case, rank))
    watched_write.LOOK_SECONDS = 0.05 if case.writes_until_saved else 60.0
    waits = patch.object(export, "save", _after(case.keep / f"checkpoint_{STEPS}", export.save)) if case.keep else None
    try:
        with (
            _delayed(loss.TokenLoss, "forward", seconds) if slow == "forward" else contextlib.nullcontext(),
            _delayed(ImageInputs, "__call__", seconds) if slow == "pixels" else contextlib.nullcontext(),
            waits if waits and case.writes_until_saved else contextlib.nullcontext(),
        ):
            loop.train(job, batches, device, events.append, save, resume, outside, phases)
    except (RunFailed, RequestError, Fault) as error:
        failure = str(error)
    steps = [event for event in events if isinstance(event, StepRecord)]
    weights = {}
    if rank == 0 and not failure and (run.path / "model").exists():
        (file,) = (run.path / "model").glob("*model.safetensors")
        weights = {key: value.float().numpy() for key, value in load_file(file).items()}
    last = next((timeless(event.eval) for event in events if isinstance(event, TrainingEnded)), {})
    losses, norms = [step.loss for step in steps], [step.grad_norm for step in steps]
    return Result(losses, norms, weights, last, events, run.path / "model", failure, asked_in)


class _Patient(ReadAhead[Any]):
    """Says that it has the next rows when it has."""

    @property
    def ready(self) -> bool:
        self.wait(60)
        return super().ready


def _never() -> Iterator[Any]:
    """An iterator whose first item never comes."""
    threading.Event().wait()
    yield


def _broken() -> Iterator[Any]:
    """An iterator whose first item cannot be read."""
    raise KeyError("no such column")
    yield


def _after(folder: Path, function: Callable[..., Any]) -> Callable[..., Any]:
    """Call a function once a folder exists."""

    def later(*arguments: Any) -> Any:
        limit = time.monotonic() + WITHIN_SECONDS
        while not folder.exists():
            assert time.monotonic() < limit, f"{folder} does not come to exist"
            time.sleep(0.01)
        return function(*arguments)

    return later


@contextlib.contextmanager
def _delayed(kind: Any, name: str, seconds: float) -> Iterator[None]:
    """Let each call of a class's method take longer."""
    method = getattr(kind, name)

    def slow(*inputs: Any, **options: Any) -> Any:
        time.sleep(seconds)
        return method(*inputs, **options)

    with patch.object(kind, name, slow):
        yield


def _scheduler(case: Case, rank: int) -> Any:
    """What decides in this worker; only the first one's decision may count."""
    from raysft.train.decisions import Decision

    if case.decisions is None:
        return None
    left = {step: list(names) for step, names in case.decisions.items()}

    def decide(step: int) -> Decision:
        assert rank == 0, "another worker asks, too"
        return Decision[left[step].pop(0)] if left.get(step) else Decision.GO_ON

    return decide


def train(config: Config, rows: PackedDataset, world: int = 1) -> Result:
    """Train with ``world`` workers."""
    return train_all([Case(config, rows)], world)[0]


def train_all(cases: Sequence[Case], world: int = 1, device: str = "cpu") -> list[Result]:
    """Run trainings with ``world`` workers, one after another in the same new processes.

    On CPUs, the processes are forks; a fork cannot use CUDA if the imports have asked for GPUs.
    """
    context: Any = forks() if device == "cpu" else multiprocessing.get_context("spawn")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    out = context.Queue()
    processes = [context.Process(target=worker, args=(rank, world, port, cases, out, device)) for rank in range(world)]
    for process in processes:
        process.start()
    try:
        results = _results(out, processes, len(cases))
        for process in processes:
            process.join(timeout=60)
            assert process.exitcode == 0
    finally:
        for process in processes:
            process.kill()  # after a failure, one may be waiting for another
    return results


def _results(out: Any, processes: Sequence[Any], count: int) -> list[Result]:
    results: list[Result] = []
    limit = time.monotonic() + WITHIN_SECONDS
    while len(results) < count:
        assert time.monotonic() < limit, f"training {len(results)} of {count} did not finish in {WITHIN_SECONDS} s"
        assert not any(process.exitcode for process in processes), "a worker failed; its error is above"
        with contextlib.suppress(queue.Empty):
            results.append(out.get(timeout=0.5))
            limit = time.monotonic() + WITHIN_SECONDS
    return results


def assert_same(one: Sequence[Any], other: Sequence[Any], tolerance: float = TOLERANCE) -> None:
    np.testing.assert_allclose(one[0], other[0], rtol=tolerance, atol=tolerance, err_msg="losses")
    np.testing.assert_allclose(one[1], other[1], rtol=10 * tolerance, atol=tolerance, err_msg="gradient norms")
    assert one[2].keys() == other[2].keys()
    for name in one[2]:
        np.testing.assert_allclose(one[2][name], other[2][name], rtol=tolerance, atol=tolerance, err_msg=name)
    for key in one[3]:
        assert one[3][key] == pytest.approx(other[3][key], rel=tolerance), key


def adamw(model: nn.Module) -> torch.optim.Optimizer:
    """The optimizer that ``make_config`` asks for."""
    return torch.optim.AdamW(model.parameters(), lr=1e-2, eps=1e-4, weight_decay=0.0)


def plain_model(path: Path) -> nn.Module:
    """The model in float32, for full fine-tuning."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)


def plain_loss(model: nn.Module, batch: Any) -> torch.Tensor:
    """Compute the loss of a step of four rows example by example."""
    total, count = torch.zeros(()), 0
    for row in range(4):
        for ids, labels in examples_of(batch, row):
            logits = model(input_ids=ids[None], use_cache=False).logits[0]
            total = total + F.cross_entropy(logits[:-1], labels[1:], ignore_index=IGNORE_INDEX, reduction="sum")
            count += int((labels[1:] != IGNORE_INDEX).sum())
    return total / count


def plain_training(model: nn.Module, rows: PackedDataset, make: Callable[[nn.Module], torch.optim.Optimizer] = adamw):
    """Train with a plain loop over single examples, which uses nothing of raysft but its rows."""
    from transformers import get_scheduler

    model.train()
    optimizer = make(model)
    schedule = get_scheduler("cosine", optimizer, num_warmup_steps=0, num_training_steps=rows.row_plan.steps)
    losses, norms = [], []
    for step in range(rows.row_plan.steps):
        batch = rows.batch(rows.rows_for_rank(step, 0, 1))
        loss = plain_loss(model, batch)
        loss.backward()
        norms.append(float(torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)))
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    weights = {name: parameter.detach().numpy() for name, parameter in model.named_parameters()}
    return losses, norms, weights


def examples_of(batch, row: int):
    """Yield the examples of a packed row: (ids, labels)."""
    tokens = int(batch["tokens"][row])
    starts = [*np.flatnonzero(batch["position_ids"][row, :tokens] == 0).tolist(), tokens]
    for start, end in itertools.pairwise(starts):
        yield tuple(torch.as_tensor(batch[name][row, start:end], dtype=torch.long) for name in ("input_ids", "labels"))
