"""What a sweep costs beside its trainings, and what a scheduler saves: ``python -m tests.benchmarks.tune MODEL FILE``.

1. A random search of eight learning rates, ten steps of LoRA each, on FILE (alpaca, JSON), one trial at a time: the time of the
   whole command, divided by the seconds that the eight trainings spend in their steps, and where the rest goes.
2. Twelve learning rates on a tiny model, as a grid and with ASHA: the steps that each takes, and the best rate that each finds.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import yaml

from tests.tiny import tiny_model
from tests.training import conversations

RATES = [float(f"{10 ** (-5 + 4 * index / 11):.3g}") for index in range(12)]
"""From 1e-5 to 1e-1, evenly in their logarithms; shuffled, since ASHA stops no trial that is better than all before it."""
random.Random(0).shuffle(RATES)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="folder of a model with a chat template")
    parser.add_argument("file", type=Path, help="JSON list of alpaca records")
    parser.add_argument("--trials", type=int, default=8, help="trials of the random search (default 8)")
    parser.add_argument("--steps", type=int, default=10, help="steps of each (default 10)")
    parsed = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        overhead(Path(folder), parsed.model, parsed.file, parsed.trials, parsed.steps)
        savings(Path(folder))


def overhead(folder: Path, model: str, file: Path, trials: int, steps: int) -> None:
    """Measure what a sweep takes beside the steps of its trainings."""
    config = {
        "run": {"name": "search", "storage": str(folder)},
        "model": {"path": model, "dtype": "float32", "finetuning": "lora"},
        "data": {
            "train": [{"name": "a", "path": str(file.absolute())}],
            "holdout": 0.005,
            "sequence_length": 512,
            "on_overflow": "drop",
        },
        "train": {"global_batch_size": 4, "max_steps": steps, "zero_stage": 0, "trackers": []},
        "scaling": {"threads_per_worker": os.cpu_count(), "address": "local"},
        "generate": {"enabled": False},
        "tune": {
            "space": {"train.learning_rate": {"loguniform": [1e-5, 1e-3]}},
            "search": "random",
            "num_samples": trials,
            "max_concurrent": 1,
        },
    }
    seconds = sweep(folder, config)
    results = [json.loads(path.read_text()) for path in folder.glob("search/trials/*/train_results.json")]
    assert len(results) == trials, f"{len(results)} of {trials} trials came to their end"
    training = sum(result["train_runtime"] for result in results)
    print(
        f"{trials} trials of {steps} steps: {seconds:.1f} s, of which steps {training:.1f} s: {seconds / training:.2f}"
    )
    for name in ("to_launch", "to_load_model", "to_wait_for_data", "to_evaluate"):
        mean = sum(result[f"seconds_{name}"] for result in results) / trials
        print(f"  {name.replace('_', ' ')}: {mean:.1f} s a trial")
    print(f"  all but the steps: {(seconds - training) / trials:.1f} s a trial", flush=True)


def savings(folder: Path) -> None:
    """Measure how many steps ASHA takes to find a rate that is as good as the grid's."""
    tiny_model(folder / "tiny")
    for name, count in (("train", 600), ("held", 40)):
        lines = [json.dumps(record) + "\n" for record in conversations(count)]
        (folder / f"{name}.jsonl").write_text("".join(lines))
    found: dict[str, tuple[int, float]] = {}
    for name, scheduler in (("grid", "none"), ("asha", "asha")):
        config = {
            "run": {"name": name, "storage": str(folder), "seed": 1},
            "model": {"path": str(folder / "tiny"), "finetuning": "full"},
            "data": {
                "train": [{"name": "train", "path": str(folder / "train.jsonl")}],
                "eval": [{"name": "held", "path": str(folder / "held.jsonl")}],
                "sequence_length": 128,
            },
            "train": {"max_steps": 27, "epochs": 9, "global_batch_size": 4, "eval_every_steps": 1, "trackers": []},
            "scaling": {"threads_per_worker": 1, "address": "local"},
            "generate": {"enabled": False},
            "tune": {"space": {"train.learning_rate": RATES}, "scheduler": scheduler, "max_concurrent": 1},
        }
        if scheduler == "asha":
            config["tune"] |= {"scheduler_options": {"grace_period": 3, "reduction_factor": 3}}
        seconds = sweep(folder, config)
        trials = {line["trial"]: line for line in map(json.loads, (folder / name / "trials.jsonl").open())}
        best = yaml.safe_load((folder / name / "best.yaml").read_text())["train"]["learning_rate"]
        found[name] = sum(trial["step"] for trial in trials.values()), best
        print(f"{name}: {found[name][0]} steps, best rate {best:g}, {seconds:.1f} s", flush=True)
    (whole, grid), (fewer, asha) = found["grid"], found["asha"]
    print(
        f"ASHA: {fewer / whole:.2f} of the grid's steps, {math.exp(abs(math.log(asha / grid))):.1f} times its best rate"
    )


def sweep(folder: Path, config: dict[str, Any]) -> float:
    """Run a sweep in a process of its own; returns its seconds."""
    file = folder / f"{config['run']['name']}.yaml"
    file.write_text(yaml.safe_dump(config))
    begun = time.perf_counter()
    subprocess.run([sys.executable, "-m", "raysft", "tune", str(file)], check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - begun


if __name__ == "__main__":
    main()
