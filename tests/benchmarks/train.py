"""How fast a training is: ``python -m tests.benchmarks.train MODEL FILE``.

Trains the same packed rows of FILE (alpaca, JSON) in one run, on all cores in float32, or on a GPU in bfloat16 (``--gpu``): (a)
with raysft through Ray, (b) with the same worker loop without Ray, (c) with transformers' Trainer, LoRA and full, and (d) as (b),
but with the layers as transformers and peft compute them, which ``raysft.models.fused_layers`` replaces on CPUs, and
if ``--ways`` names it (e) as (b), but with ``train.compile``. Each has a process
of its own, one after the other; a rate is the tokens of all steps but the first, without padding, divided by the time from the end
of the first to the end of the last. "First" is the time to the end of the first step, since the model was loaded.
Then it says where the seconds from the command to the first step of (a) went.
"""

from __future__ import annotations

import argparse
import contextlib
import logging
import multiprocessing
import os
import socket
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

RATE = 1e-4


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="folder of a model with a chat template")
    parser.add_argument("file", type=Path, help="JSON list of alpaca records")
    parser.add_argument("--steps", type=int, default=8, help="steps of each training (default 8)")
    parser.add_argument(
        "--rounds", type=int, default=2, help="how often each is trained, in turns; the best counts (default 2)"
    )
    parser.add_argument("--finetuning", nargs="+", default=["lora", "full"], help="default: lora full")
    parser.add_argument("--sequence-length", type=int, default=512, help="tokens of a row (default 512)")
    parser.add_argument("--rows", type=int, default=4, help="rows of a step (default 4)")
    parser.add_argument("--gpu", action="store_true", help="train on a GPU, in bfloat16")
    parser.add_argument("--ways", nargs="+", choices="abcde", default=list("abcd"), help="default: a b c d")
    parsed = parser.parse_args()
    shape = (parsed.sequence_length, parsed.rows, parsed.gpu)
    works = {
        "a": through_ray,
        "b": without_ray,
        "c": with_transformers,
        "d": with_plain_layers,
        "e": with_compiled_layers,
    }
    ways = {name: works[name] for name in parsed.ways}
    started: dict[str, Any] = {}
    for finetuning in parsed.finetuning:
        best: dict[str, float] = {}
        losses: dict[str, float] = {}
        first: dict[str, float] = {}
        trained = 0.0
        for _ in range(parsed.rounds):
            for name, work in ways.items():
                with tempfile.TemporaryDirectory() as folder:
                    raw = settings(parsed.model, parsed.file, Path(folder), finetuning, parsed.steps, *shape)
                    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
                        found = pool.submit(work, raw).result()
                best[name] = max(best.get(name, 0.0), found["rate"])
                losses[name], trained = found["loss"], found["trained"]
                first[name] = max(first.get(name, 0.0), found["first"])  # later ones find compiled code on the disk
                started = found.get("timings") or started
        print(f"{finetuning}: {trained:.1%} of the tokens trained")
        for name, work in ways.items():
            beside = ", ".join(f"{best[name] / best[other]:.2f} × ({other})" for other in ways if other != name)
            print(
                f"  ({name}) {work.__name__.replace('_', ' '):<22}{best[name]:9.1f} tokens/s, first {first[name]:6.1f} s, "
                f"first loss {losses[name]:.5f}; {beside}",
                flush=True,
            )
    if started:
        print("\nseconds from the command to the first step, of (a):")
    for name, seconds in started.items():
        print(f"  {name.replace('seconds_', '').replace('_', ' ')}: {seconds:.1f}")


def settings(
    model: str,
    file: Path,
    folder: Path,
    finetuning: str,
    steps: int,
    sequence_length: int = 512,
    rows: int = 4,
    gpu: bool = False,
) -> dict[str, Any]:
    """One training's config."""
    cores = {"cpus_per_worker": 1, "threads_per_worker": os.cpu_count()}
    return {
        "run": {"name": "r", "storage": str(folder), "seed": 1},
        "model": {"path": model, "dtype": "bfloat16" if gpu else "float32", "finetuning": finetuning},
        "data": {
            "train": [{"name": "a", "path": str(file.absolute())}],
            "sequence_length": sequence_length,
            "on_overflow": "drop",
        },
        "train": {
            "global_batch_size": rows,
            "learning_rate": RATE,
            "warmup_ratio": 0.0,
            "max_steps": steps,
            "zero_stage": 0,
            "trackers": [],
        },
        "scaling": {"use_gpu": gpu, "address": "local", **({} if gpu else cores)},
    }


class Clock:
    """When each step ended, and what it came to."""

    def __init__(self) -> None:
        self.began = time.perf_counter()
        self.ends: list[float] = []
        self.losses: list[float] = []

    def begin(self) -> None:
        self.began = time.perf_counter()

    def on_step(self, record: Any) -> None:
        self.tick(record.loss)

    def tick(self, loss: float) -> None:
        self.ends.append(time.perf_counter())
        self.losses.append(loss)

    def result(self, schedule: Any) -> dict[str, Any]:
        seconds = self.ends[-1] - self.ends[0]
        return {
            "rate": float(schedule.step_tokens[1 : len(self.ends)].sum()) / seconds,
            "loss": self.losses[0],
            "first": self.ends[0] - self.began,
            "trained": float(schedule.step_loss_tokens.sum() / schedule.step_tokens.sum()),
        }


def prepared_rows(raw: dict[str, Any]) -> tuple[Any, Any]:
    """The config, and its packed rows, tokenized with a Ray that is gone afterwards."""
    import ray

    from raysft.config import parse
    from raysft.data.prepare import prepare

    config = parse(raw)
    for name in ("ray", "ray.data"):
        logging.getLogger(name).setLevel(logging.ERROR)
    ray.init(address="local", include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR)
    rows = prepare(config, config.model.path).train_rows
    _ = rows.row_plan
    ray.shutdown()
    return config, rows


def through_ray(raw: dict[str, Any]) -> dict[str, Any]:
    from raysft.config import parse
    from raysft.run.context import open_run
    from raysft.run.pipeline import train_model

    clock, config = Clock(), parse(raw)
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere), open_run(config) as it:
        train_model(it, [clock])
        schedule = it.prepared.train_rows.row_plan
        results = it.directory.read_results("train")
    return clock.result(schedule) | {"timings": {key: value for key, value in results.items() if "seconds_" in key}}


def without_ray(raw: dict[str, Any]) -> dict[str, Any]:
    import torch

    from raysft.storage.run_directory import RunDirectory
    from raysft.telemetry.events import SetupDone, StepRecord
    from raysft.train import loop
    from raysft.train.job import TrainJob

    config, rows = prepared_rows(raw)
    one_process()
    gpu = config.scaling.use_gpu
    torch.distributed.init_process_group("nccl" if gpu else "gloo", rank=0, world_size=1)
    clock = Clock()

    def emit(event: Any) -> None:
        if isinstance(event, SetupDone):
            clock.begin()
        if isinstance(event, StepRecord):
            clock.on_step(event)

    run = RunDirectory(config.run_directory)
    run.path.mkdir(parents=True)
    job = TrainJob(config=config, model=config.model.path, run=run, train_rows=rows, eval_rows={})
    device = torch.device("cuda", 0) if gpu else torch.device("cpu")
    loop.train(job, rows.steps(0, 0, 1), device, emit, lambda *state: None)
    return clock.result(rows.row_plan)


def with_plain_layers(raw: dict[str, Any]) -> dict[str, Any]:
    from raysft.train import engine

    engine.fuse_layers = lambda model: None
    return without_ray(raw)


def with_compiled_layers(raw: dict[str, Any]) -> dict[str, Any]:
    return without_ray({**raw, "train": {**raw["train"], "compile": True}})


def with_transformers(raw: dict[str, Any]) -> dict[str, Any]:
    import torch
    from transformers import Trainer, TrainerCallback, TrainingArguments

    from raysft.train.finetuning import load_model

    config, rows = prepared_rows(raw)
    clock = Clock()
    rows_per_step = rows.row_plan.global_batch_size
    batch = rows.batch(range(min(rows.row_plan.rows, config.train.max_steps * rows_per_step)))
    names = ("input_ids", "labels", "position_ids")
    examples = [
        {name: torch.as_tensor(batch[name][row], dtype=torch.long) for name in names}
        for row in range(len(batch["row"]))
    ]

    class Ticks(TrainerCallback):
        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
            if logs and "loss" in logs:
                clock.tick(float(logs["loss"]))

    class InOrder(Trainer):
        def _get_train_sampler(self, *arguments: Any, **options: Any) -> Any:
            return torch.utils.data.SequentialSampler(examples)

    trainer = InOrder(
        model=load_model(config, config.model.path),
        args=TrainingArguments(
            output_dir=str(config.run_directory),
            per_device_train_batch_size=config.micro_batch_size,
            gradient_accumulation_steps=rows_per_step // config.micro_batch_size,
            learning_rate=RATE,
            lr_scheduler_type="cosine",
            max_steps=config.train.max_steps,
            max_grad_norm=1.0,
            weight_decay=0.0,
            logging_steps=1,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            use_cpu=not config.scaling.use_gpu,
            seed=1,
        ),
        train_dataset=examples,  # type: ignore[arg-type]
        callbacks=[Ticks()],
    )
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
        trainer.train()
    return clock.result(rows.row_plan)


def one_process() -> None:
    """Addresses for a process group of one."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), RANK="0", WORLD_SIZE="1", LOCAL_RANK="0")


if __name__ == "__main__":
    sys.exit(main())
