"""What images cost in memory and in waiting: ``python -m tests.benchmarks.images [--images 1000 20000]``.

A tiny LLaVA trains for one epoch on so many pictures, JPEG files of 320 × 240 pixels that are all different, through the command.
Memory is the most that all processes of the run hold for themselves at the same time (unique set size), and the most that Ray's
object store holds, while shards are written and while it trains. Waiting is the time in which the worker had no rows or pixels, as
a share of the time from the end of the tenth step to the end of the last.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import threading
from collections import defaultdict
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path

import numpy as np
import psutil
from PIL import Image

from tests.tiny_vision import tiny_vision_model

WARM_STEPS = 10
SAMPLE_SECONDS = 0.5
CONFIG = """\
stage: sft
run: {{name: images, storage: {folder}/runs}}
model: {{path: {folder}/model, dtype: float32, finetuning: full}}
data: {{train: [{{name: pictures, path: {folder}/data.jsonl}}], sequence_length: 256, cache: {folder}/cache-{images}}}
train: {{epochs: 1, global_batch_size: 8, micro_batch_size: 4, zero_stage: 0}}
scaling: {{num_workers: 1}}
generate: {{enabled: false}}
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, nargs="+", default=(1000, 20000))
    parsed = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        tiny_vision_model(folder / "model", "llava")
        write_pictures(folder, max(parsed.images))
        print(" images |  steps | seconds | MiB of processes (most of each) | MiB in the object store | waiting")
        for images in parsed.images:
            print(measured(folder, images), flush=True)


def write_pictures(folder: Path, images: int) -> None:
    """Write pictures of some 20 KB, each with colours of its own."""
    (folder / "pictures").mkdir()

    def write(index: int) -> None:
        random = np.random.default_rng(index)
        small = Image.fromarray(random.integers(0, 256, (12, 16, 3), np.uint8))
        noise = random.integers(0, 24, (240, 320, 3), np.uint8)
        picture = np.asarray(small.resize((320, 240))) // 2 + noise
        Image.fromarray(picture.astype(np.uint8)).save(folder / f"pictures/{index}.jpg", quality=85)

    with ThreadPoolExecutor() as pool:
        list(pool.map(write, range(images)))


def measured(folder: Path, images: int) -> str:
    """Train on the first pictures; returns a line of the table."""
    lines = []
    for index in range(images):
        parts = [
            {"type": "image", "image": f"pictures/{index}.jpg"},
            {"type": "text", "text": f"What is number {index}?"},
        ]
        turns = [{"role": "user", "content": parts}, {"role": "assistant", "content": f"A picture, {index % 7}."}]
        lines.append(json.dumps({"messages": turns}) + "\n")
    (folder / "data.jsonl").write_text("".join(lines))
    (folder / "c.yaml").write_text(CONFIG.format(folder=folder, images=images))
    command = [sys.executable, "-m", "raysft", "run", str(folder / "c.yaml"), f"run.name=images-{images}"]
    with (folder / f"{images}.log").open("w") as log:
        process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT)
        with sampled(process.pid) as most:
            code = process.wait()
    if code:
        raise SystemExit((folder / f"{images}.log").read_text()[-2000:])
    log_file = folder / f"runs/images-{images}/trainer_log.jsonl"
    steps = [record for record in map(json.loads, log_file.open()) if "step_seconds" in record]
    warm = steps[WARM_STEPS:]
    waited, took = (sum(record[key] for record in warm) for key in ("data_wait_seconds", "step_seconds"))
    kinds = ", ".join(f"{kind} {size >> 20}" for kind, size in sorted(most.items()) if kind not in ("store", "all"))
    return (
        f"{images:7,} | {len(steps):6,} | {took:7.1f} | {most['all'] >> 20:,} ({kinds}) | {most['store'] >> 20:,} "
        f"| {waited / (took + waited):.2%}"
    )


@contextmanager
def sampled(pid: int) -> Iterator[dict[str, int]]:
    """Bytes that a process and its children hold for themselves, by what they do, and together; the most of each."""
    most: dict[str, int] = defaultdict(int)
    over = threading.Event()

    def sample() -> None:
        while not over.wait(SAMPLE_SECONDS):
            now: dict[str, int] = defaultdict(int)
            with suppress(psutil.NoSuchProcess):
                for process in psutil.Process(pid).children(recursive=True):
                    with suppress(psutil.NoSuchProcess, psutil.AccessDenied):
                        memory = process.memory_full_info()
                        now[_kind(process)] += memory.uss
                        if "raylet" in process.name():
                            now["store"] = memory.shared
                now["driver"] += psutil.Process(pid).memory_full_info().uss
            now["all"] = sum(size for kind, size in now.items() if kind != "store")
            for kind, size in now.items():
                most[kind] = max(most[kind], size)

    thread = threading.Thread(target=sample, daemon=True)
    thread.start()
    try:
        yield most
    finally:
        over.set()
        thread.join()


def _kind(process: psutil.Process) -> str:
    command = " ".join(process.cmdline()[:2])
    if "TrainWorker" in command or "RayTrainWorker" in command:
        return "worker"
    return "tasks" if command.startswith("ray::") else "Ray"


if __name__ == "__main__":
    main()
