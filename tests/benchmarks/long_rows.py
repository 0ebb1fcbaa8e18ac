"""The longest row that fits into a memory, by option: ``python -m tests.benchmarks.long_rows MODEL``.

For each option it searches the longest row whose training step, of one row, is estimated to keep its tensors within the memory, and
trains a step of that row on this machine. The table has the row, the estimated and the measured peak of torch's tensors
(``tests/measured_memory.py`` says how it is measured), and the seconds of both. What waits "on the CPU" is not counted: it would
be beside a GPU. Every token has a loss.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

from raysft.config import Config
from raysft.models.resolve import find_model
from raysft.storage.path import StoragePath
from raysft.train import loss
from tests.measured_memory import config_of, estimated, measured

RECOMPUTED: dict[str, Any] = {"train.gradient_checkpointing": True}
WHOLE = 1 << 30
"""Tokens of a chunk of logits that no row fills."""
STEP, MOST = 64, 1 << 18
"""Rows are a multiple of the first, up to the second."""


def options(layers: int) -> dict[str, tuple[dict[str, Any], int]]:
    """Option → settings, and tokens of a chunk of logits."""
    half, chunk = {**RECOMPUTED, "train.recompute_layers": layers // 2}, loss.CHUNK_TOKENS
    return {
        "logits of all tokens at once": ({}, WHOLE),
        "logits in chunks, as always": ({}, chunk),
        f"recompute_layers: {layers // 2}": (half, chunk),
        "gradient_checkpointing": (RECOMPUTED, chunk),
        "… but logits at once": (RECOMPUTED, WHOLE),
        "… and offload.activations: cpu": ({**RECOMPUTED, "train.offload.activations": "cpu"}, chunk),
    }


def longest(config_for: Any, limit: float) -> tuple[int, float]:
    """Return the longest row whose estimate is at most the limit, and its estimate; (0, 0) if none is."""
    low, high, best = 0, MOST // STEP, 0.0
    doubling = 8
    while low < high:
        # Short rows are quick to trace: double until one is too long, then halve what is left.
        middle = min(doubling, high) if doubling else (low + high + 1) // 2
        peak = estimated(config_for(middle * STEP)).tensors
        if peak > limit:
            high, doubling = middle - 1, 0
        else:
            low, best, doubling = middle, peak, 2 * doubling
    return low * STEP, best


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="folder of a model, or package:NAME/FILE")
    parser.add_argument("--gib", type=float, default=2.0, help="memory for tensors (default 2)")
    parser.add_argument("--finetuning", default="lora", help="model.finetuning (default lora)")
    parser.add_argument("--estimates", action="store_true", help="train nothing")
    parsed = parser.parse_args()
    with tempfile.TemporaryDirectory() as kept:
        model = find_model(parsed.model, StoragePath(kept), print)
        from transformers import AutoConfig

        layers = AutoConfig.from_pretrained(model).get_text_config().num_hidden_layers
        print(
            f"{'option':<34}{'longest row':>12}{'estimated':>12}{'measured':>12}{'ratio':>8}{'search':>9}{'training':>10}"
        )
        for name, (settings, chunk) in options(layers).items():
            with tempfile.TemporaryDirectory() as folder:
                _print(name, folder, model, parsed, settings, chunk)


def _print(name: str, folder: str, model: str, parsed: Any, settings: dict[str, Any], chunk: int) -> None:
    def config_for(tokens: int) -> Config:
        usual = {
            "model.finetuning": parsed.finetuning,
            "data.sequence_length": tokens,
            "train.global_batch_size": 1,
            "train.micro_batch_size": 1,
        }
        return config_of(Path(folder), model, {**usual, **settings})

    usual_chunk, started = loss.CHUNK_TOKENS, time.perf_counter()
    loss.CHUNK_TOKENS = chunk
    try:
        tokens, peak = longest(config_for, parsed.gib * 2**30)
    finally:
        loss.CHUNK_TOKENS = usual_chunk
    searched = time.perf_counter()
    line = f"{name:<34}{tokens:>12,}{peak / 2**20:>8.0f} MiB"
    if tokens and not parsed.estimates:
        ((found,),) = measured([config_for(tokens)], chunk_tokens=chunk, seconds=3600)
        line += f"{found.peak / 2**20:>8.0f} MiB{peak / found.peak:>8.3f}"
    else:
        line += f"{'–':>12}{'–':>8}"
    print(f"{line}{searched - started:>7.1f} s{time.perf_counter() - searched:>8.1f} s", flush=True)


if __name__ == "__main__":
    with suppress(KeyboardInterrupt):
        main()
