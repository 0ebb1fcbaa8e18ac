"""How long a command takes before and after its work: ``python -m tests.benchmarks.startup MODEL FILE``.

Each command is a process of its own, on a machine that should do nothing else. The seconds are those from its start until it
prints a line. ``check`` finds its data in the cache. ``prepare`` tokenizes two sizes of data, made of the records of FILE (alpaca,
JSON); the fixed part is what is left for no data. ``run`` trains two steps with LoRA on a few records and generates for two, on a
cluster of its own and on one that is up; all but the first find the evaluation before the first step in the cache.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

from tests.benchmarks.data import write

CONFIG = """
run: {{storage: {folder}/runs}}
model: {{path: {model}, finetuning: lora}}
data:
  train: [{{name: a, path: {folder}/few.jsonl}}]
  holdout: 0.2
  sequence_length: 512
  on_overflow: truncate
train: {{max_steps: 2, global_batch_size: 2}}
generate: {{max_examples: 2, max_new_tokens: 8, do_sample: false}}
scaling: {{num_workers: 1}}
"""
FEW, SIZES = 60, (5_000, 60_000)
RUN_PARTS = {
    "plan": "resources:",
    "first evaluation": "after step 0",
    "first step": "step 1/",
    "trained": "generating with",
    "report": "Measured",
}
"""Part of a run → beginning of the line that it ends with."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="folder of a model with a chat template")
    parser.add_argument("file", type=Path, help="JSON list of alpaca records")
    parser.add_argument("--times", type=int, default=2, help="how often each command runs (default 2)")
    parsed = parser.parse_args()
    records = json.loads(parsed.file.read_text(encoding="utf-8"))
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "c.yaml").write_text(CONFIG.format(folder=folder, model=parsed.model))
        write(folder / "few.jsonl", records, FEW)
        command(folder, "prepare", "run.name=first")  # the cache, and the page cache
        for number in range(parsed.times):
            show(f"check, cached ({number + 1})", command(folder, "check"))
        prepared = [preparation(folder, records, size) for size in SIZES]
        fixed = prepared[0] - SIZES[0] * (prepared[1] - prepared[0]) / (SIZES[1] - SIZES[0])
        print(
            f"prepare: {SIZES[0]:,} records {prepared[0]:.1f} s, {SIZES[1]:,} {prepared[1]:.1f} s, fixed {fixed:.1f} s"
        )
        for number in range(parsed.times):
            show(f"run ({number + 1})", command(folder, "run", f"run.name=own-{number}", parts=RUN_PARTS))
        with_cluster(folder, parsed.times)


def preparation(folder: Path, records: list[dict], size: int) -> float:
    """Seconds to prepare so many records."""
    path = folder / f"{size}.jsonl"
    write(path, records, size)
    source = f"data.train=[{{name: a, path: {path}}}]"
    return command(folder, "prepare", f"run.name=p{size}", source, "generate.enabled=false", "data.holdout=0")["end"]


def with_cluster(folder: Path, times: int) -> None:
    """Runs on a cluster that is up."""
    ray = [str(Path(sys.executable).parent / "ray")]
    start = ["start", "--head", "--port=0", "--num-cpus=2", "--include-dashboard=false", "--disable-usage-stats"]
    subprocess.run([*ray, *start], check=True, capture_output=True, timeout=120)
    try:
        for number in range(times):
            settings = (f"run.name=up-{number}", "scaling.address=auto")
            show(f"run on a cluster that is up ({number + 1})", command(folder, "run", *settings, parts=RUN_PARTS))
    finally:
        subprocess.run([*ray, "stop", "--force"], check=False, capture_output=True, timeout=120)


def command(folder: Path, *arguments: str, parts: Mapping[str, str] | None = None) -> dict[str, float]:
    """Run ``raysft``; gives the seconds until the first line of each part, and until the end."""
    verb, *settings = arguments
    started, seconds = time.perf_counter(), {}
    environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
    with subprocess.Popen(
        [sys.executable, "-m", "raysft", verb, str(folder / "c.yaml"), *settings],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=environment,
    ) as process:
        assert process.stdout is not None
        printed = []
        for line in process.stdout:
            printed.append(line)
            for part, begins in (parts or {}).items():
                if line.startswith(begins):
                    seconds.setdefault(part, time.perf_counter() - started)
    seconds["end"] = time.perf_counter() - started
    if process.returncode:
        raise SystemExit(f"raysft {' '.join(arguments)}: exit code {process.returncode}\n{''.join(printed)}")
    return seconds


def show(name: str, seconds: Mapping[str, float]) -> None:
    """A line of the parts' seconds."""
    print(f"{name}: " + ", ".join(f"{part} {value:.1f} s" for part, value in seconds.items()), flush=True)


if __name__ == "__main__":
    with suppress(KeyboardInterrupt):
        main()
