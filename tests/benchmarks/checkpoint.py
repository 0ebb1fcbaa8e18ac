"""How long a checkpoint keeps a step waiting: ``python -m tests.benchmarks.checkpoint MODEL FILE``.

Trains MODEL whole on rows of FILE (alpaca, JSON) for some steps, in one worker without Ray, and writes a checkpoint after each, in
turns: waited for, and while the training goes on. A stall is the time from the end of a step to the begin of the next; a step
beside which a checkpoint is written is slower, which counts too.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import torch

from tests.benchmarks.train import one_process, prepared_rows, settings


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="folder of a model with a chat template")
    parser.add_argument("file", type=Path, help="JSON list of alpaca records")
    parser.add_argument("--rounds", type=int, default=3, help="checkpoints of each kind (default 3)")
    parsed = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        measured = measure(parsed.model, parsed.file, Path(folder), parsed.rounds)
    stalls = {kind: statistics.median(measured[kind]) for kind in ("waited for", "meanwhile")}
    print(f"checkpoint of {measured['bytes'] / 2**30:.2f} GiB, median of {parsed.rounds}")
    print(f"  stall, waited for        {stalls['waited for']:6.2f} s")
    print(
        f"  stall, meanwhile         {stalls['meanwhile']:6.2f} s   {stalls['meanwhile'] / stalls['waited for']:.2f} of it"
    )
    print(f"  a step alone             {statistics.median(measured['alone']):6.2f} s")
    print(f"  a step beside the writing {statistics.median(measured['beside']):5.2f} s")


def measure(model: str, file: Path, folder: Path, rounds: int) -> dict[str, Any]:
    """Seconds of each stall and step."""
    from raysft.train.checkpoint import parts, state
    from raysft.train.checkpoint.cursor import Cursor
    from raysft.train.engine import make_engine
    from raysft.train.step import train_step

    steps = 2 * rounds + 2
    config, rows = prepared_rows(settings(model, file, folder, "full", steps))
    one_process()
    torch.set_num_threads(os.cpu_count() or 1)
    torch.distributed.init_process_group("gloo", rank=0, world_size=1)
    engine, _ = make_engine(config, config.model.path, 1, steps, torch.device("cpu"))
    batches, weights = rows.steps(0, 0, 1), iter(rows.row_plan.step_weight)

    def step() -> float:
        begun = time.perf_counter()
        train_step(engine, next(batches), float(next(weights)))
        return time.perf_counter() - begun

    measured: dict[str, Any] = {"waited for": [], "meanwhile": [], "alone": [], "beside": []}
    step()
    for number in range(rounds):
        cursor = Cursor(number, 0, 0, {})
        begun = time.perf_counter()
        part = state.snapshot(engine, cursor)
        parts.write(part, folder / f"checkpoint_{number}_waited")
        measured["waited for"].append(time.perf_counter() - begun)
        measured["alone"].append(step())
        begun = time.perf_counter()
        part = state.snapshot(engine, cursor)
        writing = threading.Thread(target=parts.write, args=(part, folder / f"checkpoint_{number}"))
        writing.start()
        measured["meanwhile"].append(time.perf_counter() - begun)
        measured["beside"].append(step())
        writing.join()
        measured["bytes"] = part.size_bytes
    return measured


if __name__ == "__main__":
    main()
