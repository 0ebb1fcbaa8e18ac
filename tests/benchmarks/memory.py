"""The estimate of memory against real trainings: ``python -m tests.benchmarks.memory MODEL``.

For full fine-tuning and LoRA, with and without recomputation, it prints the estimated and the measured peak of torch's tensors in a
training step on this machine (``tests/measured_memory.py`` says how they are measured), and how long the trace took.
"""

from __future__ import annotations

import argparse
import itertools
import tempfile
import time
from contextlib import suppress
from pathlib import Path

from tests.measured_memory import config_of, estimated, measured


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="folder of a model")
    parser.add_argument("--tokens", type=int, default=256, help="tokens of a row (default 256)")
    parser.add_argument("--rows", type=int, default=2, help="rows of a microbatch (default 2)")
    parser.add_argument("--zero", type=int, nargs="+", default=[2], help="ZeRO stages (default 2)")
    parsed = parser.parse_args()
    print(f"{'training':<34}{'estimated':>12}{'measured':>12}{'ratio':>8}{'trace':>9}  most")
    for finetuning, recompute, stage in itertools.product(("full", "lora"), (False, True), parsed.zero):
        settings = {
            "model.finetuning": finetuning,
            "train.gradient_checkpointing": recompute,
            "train.zero_stage": stage,
            "train.global_batch_size": parsed.rows,
            "train.micro_batch_size": parsed.rows,
            "data.sequence_length": parsed.tokens,
        }
        with tempfile.TemporaryDirectory() as folder:
            config = config_of(Path(folder), parsed.model, settings)
            started = time.perf_counter()
            ours = estimated(config)
            seconds = time.perf_counter() - started
            ((found,),) = measured([config])
        name = f"{finetuning}, ZeRO {stage}" + (", recomputation" if recompute else "")
        print(
            f"{name:<34}{ours.tensors / 2**20:>8.1f} MiB{found.peak / 2**20:>8.1f} MiB{ours.tensors / found.peak:>8.3f}"
            f"{seconds:>7.1f} s  {ours.moment}",
            flush=True,
        )


if __name__ == "__main__":
    with suppress(KeyboardInterrupt):
        main()
