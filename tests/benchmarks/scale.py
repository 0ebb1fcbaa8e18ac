"""What the driver's side of a training costs with many workers and examples: ``python -m tests.benchmarks.scale``.

Lengths are synthetic (log-normal, 500 tokens on average, in rows of 4,096); no model is needed, and one CPU. Each case runs in a
process of its own; the seconds are those of the call alone, by the clock and on the CPU. Memory is the most that the process
had: all of it, and what is not a mapped file, which the kernel can drop.

- ``plan``: the driver reads the manifest, plans all rows, writes the plan, and sums up the steps.
- ``open``: a worker, a data task or a restarted run maps the plan and looks at a step.
- ``dataset``: what Ray Train's controller does at each start of the workers.
- ``first row``: a data task, or with many workers the reader of the last node, reads the first block of the last worker, with all
  blocks before it.
- ``events``: every worker sends an event; the driver has handled all.
- ``checkpoints``: look for the newest of two checkpoints on an S3 server (moto), as at each start.
- ``prompts``: predictions for so many prompts arrive, are stored, put in order, written and scored.

Lines that begin with ~ were not measured: they continue the straight line through the two largest cases.
"""

from __future__ import annotations

import argparse
import resource
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

from tests.benchmarks import scale_cases

WORKERS = (10, 100, 1000)
EXAMPLES = (1_000_000, 10_000_000)
PROMPTS = (10_000, 100_000, 1_000_000)
FAR = {"workers": 10_000, "examples": 100_000_000, "prompts": 10_000_000}
CONTINUED = ("plan", "open", "events", "checkpoints", "prompts")
"""Cases that do the same work for each example or worker."""
CASES = ("plan", "open", "dataset", "first row", "events", "checkpoints", "prompts")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workers", type=int, nargs="+", default=WORKERS)
    parser.add_argument("--examples", type=int, nargs="+", default=EXAMPLES)
    parser.add_argument("--prompts", type=int, nargs="+", default=PROMPTS)
    parser.add_argument("--only", nargs="+", choices=CASES, default=CASES)
    parser.add_argument("--folder", type=Path, help="where to write the synthetic data (default: a temporary folder)")
    parsed = parser.parse_args()
    print(
        "case         |    examples | workers |  seconds |   on CPU |     memory | not mapped | what else", flush=True
    )
    with tempfile.TemporaryDirectory(dir=parsed.folder) as folder:
        for name in parsed.only:
            sizes = parsed.prompts if name == "prompts" else parsed.examples
            if name in ("plan", "open", "prompts"):
                line(name, [(size, 0) for size in sizes], Path(folder), "prompts" if name == "prompts" else "examples")
            elif name in ("events", "checkpoints"):
                line(name, [(0, workers) for workers in parsed.workers], Path(folder), "workers")
            else:
                for size in sizes:
                    line(name, [(size, workers) for workers in parsed.workers], Path(folder), "workers")


def line(name: str, sizes: list[tuple[int, int]], folder: Path, along: str) -> None:
    """Measure a case at some sizes, print each, and continue the line."""
    measured = []
    for examples, workers in sizes:
        with scale_cases.prepared(name, examples, workers, folder) as given:
            *numbers, more = scale_cases.alone(measure, name, examples, workers, given)
        measured.append((workers if along == "workers" else examples, *numbers))
        show(name, examples, workers, *numbers, more)
    if name in CONTINUED and len(measured) > 1 and FAR[along] > measured[-1][0]:
        (x0, *first), (x1, *second) = measured[-2:]
        there = [max(0.0, b + (b - a) * (FAR[along] - x1) / (x1 - x0)) for a, b in zip(first, second, strict=True)]
        examples, workers = sizes[-1]
        show(f"~{name}", *((examples, FAR[along]) if along == "workers" else (FAR[along], workers)), *there, "")


def show(
    name: str, examples: int, workers: int, seconds: float, cpu: float, memory: float, private: float, more: str
) -> None:
    counts = [f"{number:,}" if number else "" for number in (examples, workers)]
    sizes = [f"{size / 2**20:,.0f} MiB" for size in (memory, private)]
    print(
        f"{name:12} | {counts[0]:>11} | {counts[1]:>7} | {seconds:8.2f} | {cpu:8.2f} | {sizes[0]:>10} | {sizes[1]:>10} | {more}",
        flush=True,
    )


def measure(name: str, examples: int, workers: int, given: Any) -> tuple[float, float, int, int, str]:
    """Seconds by the clock and on the CPU, the most memory in all, the most that is not a mapped file, and a remark."""
    peak, done = 0, threading.Event()

    def watch() -> None:
        nonlocal peak
        while not done.wait(0.02):
            peak = max(peak, private_bytes())

    work = getattr(scale_cases, name.replace(" ", "_"))(examples, workers, given)
    threading.Thread(target=watch, daemon=True).start()
    begun, cpu = time.perf_counter(), time.process_time()
    more = work()
    seconds, cpu = time.perf_counter() - begun, time.process_time() - cpu
    done.set()
    return (
        seconds,
        cpu,
        resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        max(peak, private_bytes()),
        more or "",
    )


def private_bytes() -> int:
    """Bytes of this process that are not a mapped file."""
    status = dict(each.split(":", 1) for each in Path("/proc/self/status").read_text().splitlines())
    return 1024 * sum(int(status[name].split()[0]) for name in ("RssAnon", "RssShmem"))


if __name__ == "__main__":
    main()
