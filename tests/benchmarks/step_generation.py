"""What generation during a training costs: ``python -m tests.benchmarks.step_generation [MODEL FILE]``.

The same training, one after the other: without generation; with engines beside its worker; and with a worker that waits for them
between two steps, because it reserves all CPUs. The worker has one thread in all of them. Time is from the end of the first step to
the end of the last one, with every wait between them; what is generated after the last step does not count.
Without arguments a tiny model trains on made-up conversations.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import multiprocessing
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

from tests.tiny import tiny_model
from tests.training import conversations

WAYS: dict[str, dict[str, Any]] = {
    "none": {"scaling.cpus_per_worker": 0.5},
    "beside": {"scaling.cpus_per_worker": 0.5},
    "between": {"scaling.cpus_per_worker": 1.5},
}


class Clock:
    """Notes when steps end and when scores arrive."""

    def __init__(self) -> None:
        self.steps: dict[int, float] = {}
        self.late: dict[int, int] = {}
        """Step whose model predicted → steps that the training went on meanwhile."""

    def on_step(self, record: Any) -> None:
        self.steps[record.current_steps] = time.perf_counter()

    def on_generate(self, results: Any) -> None:
        self.late[results["current_steps"]] = max(self.steps) - results["current_steps"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", help="folder of a model with a chat template; default: a tiny one")
    parser.add_argument("file", nargs="?", type=Path, help="JSON list of alpaca records")
    parser.add_argument("--steps", type=int, default=300, help="steps of the training (default 300)")
    parser.add_argument("--every", type=int, default=75, help="steps between two generations (default 75)")
    parser.add_argument("--prompts", type=int, default=6, help="prompts of each generation (default 6)")
    parsed = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        model, file = parsed.model or tiny(folder), parsed.file or folder / "chat.jsonl"
        found: dict[str, float] = {}
        for way in WAYS:
            # A process for each: none inherits threads or memory of another.
            with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
                seconds, late, runtime = pool.submit(
                    trained, folder, way, str(model), file, parsed.steps, parsed.every, parsed.prompts
                ).result()
            found[way] = seconds
            line = f"{way:8} | {seconds:6.1f} s | {seconds / found['none']:.2f} times"
            if late:
                line += f" | {len(late)} generations of {runtime:.1f} s, {sum(late) / len(late):.1f} steps meanwhile"
            print(line, flush=True)


def tiny(folder: Path) -> Path:
    """Make a model, and write conversations beside it."""
    lines = [json.dumps(record) + "\n" for record in conversations(600)]
    (folder / "chat.jsonl").write_text("".join(lines))
    return tiny_model(folder / "model")


def trained(
    folder: Path, way: str, model: str, file: Path, steps: int, every: int, prompts: int
) -> tuple[float, list[int], float]:
    """Train in one of the ways.

    Returns:
        Seconds from the first step to the last one; of each generation before the last step, the steps that the training went on
        meanwhile; and the mean seconds of these generations.
    """
    import ray

    import raysft
    from raysft.config import parse, with_overrides
    from raysft.storage.json_files import read_jsonl

    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False)
    config = parse(
        {
            "run": {"name": way, "storage": str(folder / "runs")},
            "model": {"path": model, "dtype": "float32", "finetuning": "lora"},
            "data": {
                "train": [{"name": "a", "path": str(file.absolute())}],
                "holdout": 0.05,
                "sequence_length": 256,
                "on_overflow": "drop",
                "cache": str(folder / "cache"),
            },
            "train": {"global_batch_size": 16, "max_steps": steps, "eval_at_start": False, "save_every_minutes": None},
            "scaling": {"num_workers": 1, "threads_per_worker": 1},
            "generate": {
                "max_examples": prompts,
                "max_new_tokens": 32,
                "do_sample": False,
                "compare_base": False,
                "every_steps": every,
            },
        }
    )
    settings = {**WAYS[way], **({"generate.every_steps": None, "generate.enabled": False} if way == "none" else {})}
    clock = Clock()
    with contextlib.redirect_stdout(io.StringIO()):
        raysft.run_sft(with_overrides(config, settings), callbacks=[clock])
    during = {step: late for step, late in clock.late.items() if step < steps}
    records = [each for each in read_jsonl(folder / "runs" / way / "trainer_log.jsonl") if "predict_runtime" in each]
    runtimes = [each["predict_runtime"] for each in records if each["current_steps"] in during]
    return (
        clock.steps[steps] - clock.steps[1],
        [late for _, late in sorted(during.items())],
        sum(runtimes) / max(1, len(runtimes)),
    )


if __name__ == "__main__":
    main()
