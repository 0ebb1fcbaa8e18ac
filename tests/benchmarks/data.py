"""How fast files become packed rows, against the bare tokenizer: ``python -m tests.benchmarks.data MODEL FILE``.

Makes files of 20,000 and 200,000 examples from the records of FILE (alpaca, JSON), each made different by a number in it. In one
run it measures, on all cores: the bare Rust tokenizer on the rendered texts; files → tokenized shards → packed rows through Ray
Data, the start of the task processes included; and the peak memory of all processes together. Each size has a process and a Ray
of its own, so that none inherits memory. Ray is started, and the driver's tokenizer loaded, before the clocks run.
"""

from __future__ import annotations

import argparse
import json
import logging
import multiprocessing
import tempfile
import threading
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import psutil

SIZES = (20_000, 200_000)
SEQUENCE_LENGTH = 2048


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="folder with a tokenizer and a chat template")
    parser.add_argument("file", type=Path, help="JSON list of alpaca records")
    parser.add_argument("--sizes", type=int, nargs="+", default=SIZES, help="examples (default 20000 200000)")
    parsed = parser.parse_args()
    print("examples |   tokens | bare tokenizer | file to rows | ratio | rows alone | peak memory | packed")
    for size in parsed.sizes:
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
            measured = pool.submit(measure, parsed.model, parsed.file, size).result()
        print(
            f"{size:8,} | {measured['tokens'] / 1e6:7.1f}M | {measured['bare'] / 1e3:10,.0f}k/s | "
            f"{measured['whole'] / 1e3:8,.0f}k/s | {measured['whole'] / measured['bare']:5.2f} | "
            f"{measured['rows'] / 1e6:6.1f}M/s | {measured['memory'] / 2**30:7.2f} GiB | {measured['packing_efficiency']:.2%}",
            flush=True,
        )


def measure(model: str, records: Path, size: int) -> dict[str, float]:
    """Tokens per second and bytes of memory, with so many examples."""
    import ray.data  # which configures its loggers when it is imported

    for name in ("ray", "ray.data"):
        logging.getLogger(name).setLevel(logging.ERROR)
    ray.init(address="local", include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "data.jsonl"
        write(path, json.loads(records.read_text(encoding="utf-8")), size)
        return _measure(model, path, Path(folder))


def write(path: Path, records: list[dict[str, Any]], size: int) -> None:
    """A file of so many records, each different from all others."""
    with path.open("w", encoding="utf-8") as file:
        for index in range(size):
            record = records[index % len(records)]
            numbered = {**record, "instruction": f"{record['instruction']} ({index})"}
            file.write(json.dumps(numbered, ensure_ascii=False) + "\n")


def _measure(model: str, path: Path, folder: Path) -> dict[str, float]:
    from raysft.config import parse
    from raysft.data.prepare import prepare
    from raysft.models.tokenizer import load_tokenizer

    tokenizer = load_tokenizer(model)
    config = parse(
        {
            "run": {"storage": str(folder)},
            "model": {"path": model},
            "data": {
                "train": [{"name": "a", "path": str(path)}],
                "sequence_length": SEQUENCE_LENGTH,
                "on_overflow": "drop",
            },
        }
    )

    def work() -> tuple[Any, float, float]:
        begun = time.perf_counter()
        rows = prepare(config, model).train_rows
        made = time.perf_counter()
        seen = 0
        tables = rows.dataset(0, 1).iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=2)
        for batch in rows.batches(tables, 1):
            seen += int(batch["tokens"].sum())
        done = time.perf_counter()
        assert seen == rows.row_plan.step_tokens.sum()
        return rows, seen / (done - begun), seen / (done - made)

    (rows, whole, alone), memory = with_peak_memory(work)
    tokens = float(rows.row_plan.step_tokens.sum())
    return {
        "tokens": tokens,
        "whole": whole,
        "rows": alone,
        "memory": memory,
        "packing_efficiency": rows.row_plan.packing_efficiency,
        "bare": bare(tokenizer, path, tokens),
    }


def bare(tokenizer: Any, path: Path, tokens: float) -> float:
    """Tokens per second of the tokenizer alone, on all cores, on the same texts, which are rendered before."""
    seconds = 0.0
    with path.open(encoding="utf-8") as file:
        while lines := [json.loads(line) for _, line in zip(range(20_000), file, strict=False)]:
            conversations = [
                [
                    {
                        "role": "user",
                        "content": f"{line['instruction']}\n{line['input']}" if line["input"] else line["instruction"],
                    },
                    {"role": "assistant", "content": line["output"]},
                ]
                for line in lines
            ]
            texts = tokenizer.apply_chat_template(conversations, tokenize=False)
            begun = time.perf_counter()
            tokenizer.backend_tokenizer.encode_batch_fast(texts, add_special_tokens=False)
            seconds += time.perf_counter() - begun
    return tokens / seconds


def with_peak_memory(work: Callable[[], Any]) -> tuple[Any, float]:
    """What some work gives, and the most memory that this process and its children had at one time meanwhile.

    Counted by proportional set size, so that what processes share counts once.
    """
    peak, done = 0, threading.Event()

    def watch() -> None:
        nonlocal peak
        while not done.wait(0.5):
            used = 0
            for process in [psutil.Process(), *psutil.Process().children(recursive=True)]:
                try:
                    used += process.memory_full_info().pss
                except psutil.Error:
                    continue
            peak = max(peak, used)

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        return work(), peak
    finally:
        done.set()
        watcher.join()


if __name__ == "__main__":
    main()
