"""The longest row that fits into a memory, by option: ``python -m tests.benchmarks.long_rows MODEL``.

For each option it searches the longest row whose training step, of one row, is estimated to keep the tensors of each worker within
the memory, and trains a step of that row on this machine. Every token has a loss. Columns, all per worker:

- *estimated* and *measured*: most bytes of torch's tensors at a time in the step, which ``torch.cuda.max_memory_allocated`` would
  count on a GPU (``tests/measured_memory.py`` says how they are measured).
- *beside it*: what waits "on the CPU" with ``train.offload.activations``, measured, and as estimated in brackets. Without a GPU,
  device and node have the same memory, so this is kept where torch's allocator does not count it.
- *process*: most resident memory of the worker's process in the step, with all of these, libraries, and what the profiler notes.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from raysft.config import Config
from raysft.estimate.memory import Memory
from raysft.models.resolve import find_model
from raysft.storage.path import StoragePath
from raysft.train import loss
from tests.measured_memory import config_of, estimated, measured

WHOLE = 1 << 30
"""Tokens of a chunk of logits that no row fills."""
STEP, MOST = 64, 1 << 18
"""Rows are a multiple of the first, up to the second."""


@dataclass(frozen=True)
class Option:
    """A row of the table."""

    name: str
    settings: dict[str, Any]
    workers: int = 1
    chunk: int = loss.CHUNK_TOKENS
    """Most tokens whose logits exist at a time."""


def options(layers: int, heads: int) -> list[Option]:
    """The rows of the table for a model with so many layers and query heads."""
    recomputed: dict[str, Any] = {"train.gradient_checkpointing": True}
    half = {**recomputed, "train.recompute_layers": layers // 2}
    offloaded = {**recomputed, "train.offload.activations": "cpu"}
    parts = next((parts for parts in range(2, 9) if heads % parts == 0), 1)
    shared = {"scaling.num_workers": parts, "scaling.sequence_parallel": parts}
    return [
        Option("plain, logits at once", {}, chunk=WHOLE),
        Option("plain", {}),
        Option(f"sequence_parallel: {parts}", shared, parts),
        Option(f"recompute_layers: {layers // 2}", half),
        Option("gradient_checkpointing, logits at once", recomputed, chunk=WHOLE),
        Option("gradient_checkpointing", recomputed),
        Option(f"… and sequence_parallel: {parts}", {**recomputed, **shared}, parts),
        Option("… and offload.activations", offloaded),
        Option("… and both", {**offloaded, **shared}, parts),
    ]


def longest(memory_of: Callable[[int], Memory], limit: float, step: int) -> tuple[int, Memory | None]:
    """Return the longest row whose estimate is at most the limit, and its estimate; (0, None) if none is."""
    low, high, best = 0, MOST // step, None
    doubling = 8
    while low < high:
        # Short rows are quick to trace: double until one is too long, then halve what is left.
        middle = min(doubling, high) if doubling else (low + high + 1) // 2
        found = memory_of(middle * step)
        if found.tensors > limit:
            high, doubling = middle - 1, 0
        else:
            low, best, doubling = middle, found, 2 * doubling
    return low * step, best


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="folder of a model, or package:NAME/FILE")
    parser.add_argument("--gib", type=float, default=1.25, help="memory for tensors of each worker (default 1.25)")
    parser.add_argument("--finetuning", default="lora", help="model.finetuning (default lora)")
    parser.add_argument("--estimates", action="store_true", help="train nothing")
    parser.add_argument("--only", default="", help="options whose names contain this")
    parsed = parser.parse_args()
    with tempfile.TemporaryDirectory() as kept:
        model = find_model(parsed.model, StoragePath(kept), print)
        from transformers import AutoConfig

        text = AutoConfig.from_pretrained(model).get_text_config()
        print(
            "| option | longest row | estimated | measured | offloaded | process | seconds |\n|---|--:|--:|--:|--:|--:|--:|"
        )
        for option in options(text.num_hidden_layers, text.num_attention_heads):
            if parsed.only in option.name:
                with tempfile.TemporaryDirectory() as folder:
                    _print(option, Path(folder), model, parsed)


def _print(option: Option, folder: Path, model: str, parsed: Any) -> None:
    def config_for(tokens: int) -> Config:
        usual = {
            "model.finetuning": parsed.finetuning,
            "data.sequence_length": tokens,
            "train.global_batch_size": 1,
            "train.micro_batch_size": 1,
        }
        return config_of(folder, model, {**usual, **option.settings})

    usual_chunk, loss.CHUNK_TOKENS = loss.CHUNK_TOKENS, option.chunk
    try:
        limit = parsed.gib * 2**30
        tokens, memory = longest(lambda tokens: estimated(config_for(tokens), option.workers), limit, STEP)
    finally:
        loss.CHUNK_TOKENS = usual_chunk
    cells = [option.name, f"{tokens:,}", _mib(memory.tensors) if memory else "–"]
    if memory and not parsed.estimates:
        started = time.perf_counter()
        (workers,) = measured([config_for(tokens)], option.workers, chunk_tokens=option.chunk, seconds=2 * 3600)
        most = max(workers, key=lambda each: each.peak)
        beside = f"{_mib(most.host)} ({_mib(memory.host)})" if most.host else "–"
        cells += [_mib(most.peak), beside, _mib(most.process), f"{time.perf_counter() - started:.0f}"]
    else:
        cells += ["–", f"({_mib(memory.host)})" if memory and memory.host else "–", "–", "–"]
    print(f"| {' | '.join(cells)} |", flush=True)


def _mib(size: float) -> str:
    return f"{size / 2**20:,.0f} MiB"


if __name__ == "__main__":
    with suppress(KeyboardInterrupt):
        main()
