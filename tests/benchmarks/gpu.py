"""What one GPU does with a model of a billion weights: ``python -m tests.benchmarks.gpu``, in under ten minutes on an H100.

It trains a Llama of 1.10 billion random weights (1.04 without the embedding) in full, in bfloat16, on rows of 4,096 tokens: as it
is, with compiled layers, Liger's kernels, FP8 and FlashAttention, as far as their packages are installed. Needs no network, no data
and no Ray. Then it trains a tiny model on the GPU in each of these ways, and on the CPU, and compares the losses. The exit code is
1 if a way fails or hangs, if its loss, MFU or memory cannot be right, or if there was no time for all that was asked.

MFU is the share of the GPU's peak that the model's own multiplications take, whatever else is computed (Chowdhery et al. 2022,
"PaLM", appendix B; ``raysft.train.flops``): tokens per second × (6 · weights + 12 · layers · heads · head size · tokens of an
example / 2) divided by the dense bfloat16 FLOP/s of the GPU's data sheet (989e12 for an H100 SXM), also for FP8. The second term is
attention with a causal mask; the embedding is looked up, so it does not count, and the head does. "First" is the first step, in
which kernels are chosen and compiled. Memory is ``torch.cuda.max_memory_allocated`` during the steps, beside what ``raysft check``
estimates for it.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import multiprocessing
import os
import queue
import socket
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from tests.measured_memory import config_of, estimated
from tests.processes import forks
from tests.training import Case, make_config, prepare, rows_of, train_all

MINUTES, MINUTES_OF_A_WAY = 8.5, 4.0
"""After so many, no further way of training begins; after so many of its own, one counts as hanging."""
SDPA = {"model.attention": "sdpa"}
"""Else ``auto`` would take FlashAttention where it is installed."""
WAYS: dict[str, tuple[str, dict[str, Any]]] = {
    "plain": ("", SDPA),
    "recomputed": ("", {**SDPA, "train.gradient_checkpointing": True}),
    "compiled": ("", {**SDPA, "train.compile": True}),
    "liger": ("liger_kernel", {**SDPA, "model.liger": True}),
    "liger, compiled": ("liger_kernel", {**SDPA, "model.liger": True, "train.compile": True}),
    "fp8": ("torchao", {**SDPA, "train.fp8": "torchao"}),
    "fp8, compiled": ("torchao", {**SDPA, "train.fp8": "torchao", "train.compile": True}),
    "flash 2": ("flash_attn", {"model.attention": "flash_attention_2"}),
    "flash 2, compiled": ("flash_attn", {"model.attention": "flash_attention_2", "train.compile": True}),
    "flash 3": ("flash_attn_interface", {"model.attention": "flash_attention_3"}),
    "flash 3, compiled": ("flash_attn_interface", {"model.attention": "flash_attention_3", "train.compile": True}),
}
"""Way of training → the module that it needs, and its settings."""
ON_CPU = ("plain", "recomputed", "compiled")
"""Those that need no GPU."""
NO_TIME = "no time left; choose some with --ways"
"""Of what has not begun when ``MINUTES`` are over."""
WITHIN = {"float32": 1e-4, "bfloat16": 2e-2, "fp8": 4e-2}
"""How far losses may be from those of a CPU in float32, as a share of them: rounding."""
ESTIMATED = (0.85, 1.5)
"""The estimated memory as a share of the measured one; compiled code needs less."""


@dataclass(frozen=True)
class Size:
    """Of the model and its rows."""

    hidden: int = 2048
    inner: int = 8192
    layers: int = 16
    heads: int = 32
    key_heads: int = 8
    vocabulary: int = 32_000
    tokens: int = 4096


TINY = Size(64, 128, 2, 4, 2, 320, 64)


@dataclass(frozen=True)
class Speed:
    """How one way of training went."""

    way: str
    first_seconds: float = 0.0
    """Of the first step."""
    seconds: float = 0.0
    """Of a step, the median of those after the first two."""
    tokens_per_second: float = 0.0
    mfu: float | None = None
    """None without a GPU, or for one whose peak is unknown."""
    peak: int | None = None
    """Most bytes allocated on the GPU."""
    estimated: float = 0.0
    """The same, as estimated."""
    loss: float = 0.0
    """Of the last step."""
    note: str = ""
    """Why there are no numbers."""
    failed: bool = False
    """True if there should be some."""

    def faults(self, loss: float) -> list[str]:
        """Say what cannot be right.

        Args:
            loss: of another way.
        """
        found = [self.note] if self.failed else []
        if self.note:
            return found
        if not abs(self.loss - loss) <= WITHIN["fp8" if "fp8" in self.way else "bfloat16"] * loss:  # nor if it is NaN
            found.append(f"a loss of {self.loss:.4f}, where others have {loss:.4f}")
        if self.mfu is not None and not 0 < self.mfu < 1:
            found.append(f"an MFU of {self.mfu:.1%}")
        if self.peak is not None and not ESTIMATED[0] <= self.estimated / self.peak <= ESTIMATED[1]:
            found.append(f"estimated memory of {self.estimated / self.peak:.2f} times the measured one")
        return found


@dataclass(frozen=True)
class Losses:
    """How losses of the tiny model compare with those of a CPU in float32."""

    way: str
    dtype: str
    difference: float
    """The largest, as a share of the loss."""
    note: str = ""

    @property
    def allowed(self) -> float:
        return WITHIN["fp8" if "fp8" in self.way else self.dtype]

    @property
    def right(self) -> bool:
        """True if rounding explains the difference."""
        return not self.note and self.difference <= self.allowed


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ways", nargs="+", choices=list(WAYS), help="default: all whose packages are installed")
    parser.add_argument("--rows", type=int, default=8, help="rows of a step (default 8)")
    parser.add_argument("--micro", type=int, default=2, help="rows of a microbatch (default 2)")
    parser.add_argument("--examples", type=int, default=1, help="examples of equal length in a row (default 1)")
    parser.add_argument("--steps", type=int, default=8, help="steps that are timed (default 8)")
    parser.add_argument("--json", type=Path, help="file for the numbers")
    parser.add_argument("--on-cpu", action="store_true", help="a tiny model without a GPU, to test this program")
    parsed = parser.parse_args(arguments)
    started, device = time.monotonic(), "cpu" if parsed.on_cpu else "cuda"
    size = TINY if parsed.on_cpu else Size()
    if size.tokens % parsed.examples:
        parser.error(f"--examples {parsed.examples} does not divide the {size.tokens} tokens of a row")
    if device == "cuda" and not _has_gpu():
        parser.error("torch finds no GPU here; --on-cpu tests this program without one")
    ways = [way for way in parsed.ways or WAYS if device == "cuda" or way in ON_CPU]
    ends = started + 60 * MINUTES
    with tempfile.TemporaryDirectory() as folder:
        model = random_model(Path(folder) / "model", size, "float32" if parsed.on_cpu else "bfloat16")
        speeds = []
        for way in ways:
            late = time.monotonic() > ends
            speeds.append(Speed(way, note=NO_TIME, failed=True) if late else speed(way, model, size, parsed, device))
            print(line(speeds[-1]), flush=True)
        losses = compared(Path(folder) / "tiny", [each.way for each in speeds if not each.note], device, ends)
    for each in losses:
        print(f"{each.way:<20}{each.dtype:<10}losses differ from a CPU's by {each.difference:.1e} {each.note}"
              f"{'' if each.right else ', more than ' + format(each.allowed, '.0e')}")  # fmt: skip
    first = next((each.loss for each in speeds if not each.note), 0.0)
    wrong = {each.way: faults for each in speeds if (faults := each.faults(first))}
    for way, faults in wrong.items():
        print(f"{way:<20}WRONG: {'; '.join(faults)}")
    minutes = (time.monotonic() - started) / 60
    print(f"{minutes:.1f} minutes on {name_of(device)}")
    if parsed.json:
        found = {"device": name_of(device), "minutes": minutes, "size": asdict(size), "rows": parsed.rows, "micro": parsed.micro,
                 "examples": parsed.examples, "speeds": [asdict(each) for each in speeds],
                 "losses": [{**asdict(each), "right": each.right} for each in losses]}  # fmt: skip
        parsed.json.write_text(json.dumps(found, indent=2))
    return 0 if losses and all(each.right for each in losses) and not wrong else 1


def _has_gpu() -> bool:
    import torch

    return torch.cuda.is_available()


def line(found: Speed) -> str:
    """One line of the table."""
    if found.note:
        return f"{found.way:<20}{found.note}"
    mfu = "–" if found.mfu is None else f"{found.mfu:.1%}"
    peak = "–" if found.peak is None else f"{found.peak / 2**30:.2f} GiB"
    ratio = "–" if found.peak is None else f"{found.estimated / found.peak:.3f}"
    return (
        f"{found.way:<20}first {found.first_seconds:6.1f} s, then {found.seconds:7.3f} s a step, "
        f"{found.tokens_per_second:9,.0f} tokens/s, MFU {mfu}, memory {peak}, "
        f"estimated {found.estimated / 2**30:.2f} GiB ({ratio}), loss {found.loss:.4f}"
    )


def random_model(folder: Path, size: Size, dtype: str) -> Path:
    """Write a Llama with random weights."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=size.hidden, intermediate_size=size.inner, num_hidden_layers=size.layers,
        num_attention_heads=size.heads, num_key_value_heads=size.key_heads, vocab_size=size.vocabulary,
        max_position_embeddings=size.tokens, tie_word_embeddings=False, dtype=dtype,
    )  # fmt: skip
    LlamaForCausalLM(config).to(getattr(torch, dtype)).save_pretrained(folder)
    return folder


def settings_of(way: str, size: Size, rows: int, micro: int, device: str) -> dict[str, Any]:
    return {
        "model.dtype": "bfloat16" if device == "cuda" else "float32",
        "scaling.use_gpu": device == "cuda",
        "data.sequence_length": size.tokens,
        "train.global_batch_size": rows,
        "train.micro_batch_size": micro,
        "train.trackers": [],
        **WAYS[way][1],
    }


def speed(way: str, model: Path, size: Size, parsed: Any, device: str) -> Speed:
    """Train some steps in one way, in a process of its own."""
    module = WAYS[way][0]
    if module and importlib.util.find_spec(module) is None:
        return Speed(way, note=f"needs the package of {module}, which is not installed")
    settings = settings_of(way, size, parsed.rows, parsed.micro, device)
    config = config_of(model.parent, model, settings)
    context: Any = forks() if device == "cpu" else multiprocessing.get_context("spawn")
    out = context.Queue()
    process = context.Process(target=_timed, args=(config, size, parsed.examples, parsed.steps, device, out))
    process.start()
    found: dict[str, Any] | None = None
    limit = time.monotonic() + 60 * MINUTES_OF_A_WAY
    while found is None and process.is_alive() and time.monotonic() < limit:
        try:
            found = out.get(timeout=1)
        except queue.Empty:
            continue
    with suppress(queue.Empty):
        found = found or out.get(timeout=1)
    if found is None:
        hangs = process.is_alive()
        process.kill()
        note = f"has not ended after {MINUTES_OF_A_WAY:g} minutes" if hangs else "failed; its error is above"
        return Speed(way, note=note, failed=True)
    process.join(30)
    process.kill()
    return Speed(way, estimated=estimated(config).tensors, **found)


def _timed(config: Any, size: Size, examples: int, steps: int, device: str, out: Any) -> None:
    """Train in this process; puts the numbers of ``Speed`` into ``out``."""
    import torch

    from raysft.train.engine import make_engine
    from raysft.train.flops import model_flops, peak_flops
    from raysft.train.step import train_step

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), RANK="0", WORLD_SIZE="1", LOCAL_RANK="0")
    place = torch.device(device, 0) if device == "cuda" else torch.device(device)
    torch.distributed.init_process_group("nccl" if device == "cuda" else "gloo", rank=0, world_size=1)
    engine, _ = make_engine(config, config.model.path, 1, steps + 2, place)
    rows = int(config.train.global_batch_size)
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    seconds, loss = [], 0.0
    for step in range(steps + 2):
        batch = random_rows(rows, size, examples, step)
        loss_tokens = rows * (size.tokens - examples)
        started = time.perf_counter()
        loss = train_step(engine, batch, float(loss_tokens)).loss
        if device == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - started)
    usual, tokens = statistics.median(seconds[2:]), rows * size.tokens
    squares = rows * examples * (size.tokens / examples) ** 2
    flops, peak = model_flops(engine.module.model, tokens, squares, loss_tokens), peak_flops(place)
    out.put(
        {
            "first_seconds": seconds[0],
            "seconds": usual,
            "tokens_per_second": tokens / usual,
            "mfu": flops / usual / peak if peak else None,
            "peak": torch.cuda.max_memory_allocated() if device == "cuda" else None,
            "loss": loss,
        }
    )
    torch.distributed.destroy_process_group()


def random_rows(rows: int, size: Size, examples: int, seed: int) -> dict[str, np.ndarray]:
    """Rows of random tokens, which all have a loss but for the first of each example."""
    ids = np.random.default_rng(seed).integers(4, size.vocabulary, (rows, size.tokens), dtype=np.int32)
    positions = np.tile(np.arange(size.tokens // examples, dtype=np.int32), (rows, examples))
    return {
        "row": np.arange(rows),
        "tokens": np.full(rows, size.tokens),
        "input_ids": ids,
        "position_ids": positions,
        "labels": np.where(positions == 0, -100, ids).astype(np.int32),
    }


def compared(folder: Path, ways: Sequence[str], device: str, ends: float) -> list[Losses]:
    """Train the tiny model of the tests in each way, and compare its losses with those of a CPU in float32.

    Args:
        folder: to be made, for models and runs.
        ways: to train in.
        device: to train on.
        ends: when no further way begins, by ``time.monotonic``.
    """
    if not ways or time.monotonic() > ends:
        return [late for way in ways for late in _too_late(way)]
    folder.mkdir()
    place, model, manifest = prepare(folder)
    rows = rows_of(manifest)
    (expected,) = train_all([Case(make_config(place / "cpu", model, micro_batch_size=4), rows)])
    found = []
    for way in ways:
        if time.monotonic() > ends:
            found += _too_late(way)
            continue
        dtypes = _dtypes(way)
        settings = {"scaling.use_gpu": device == "cuda", **WAYS[way][1]}
        configs = [
            make_config(place / f"{way} {dtype}", model, {"model.dtype": dtype, **settings}, micro_batch_size=4)
            for dtype in dtypes
        ]
        try:
            results = train_all([Case(config, rows) for config in configs], device=device)
        except AssertionError as error:
            found += [Losses(way, dtype, float("nan"), f"failed: {error}") for dtype in dtypes]
            continue
        for dtype, result in zip(dtypes, results, strict=True):
            a, b = np.asarray(result.losses), np.asarray(expected.losses)
            difference = float((np.abs(a - b) / b).max()) if len(a) == len(b) else float("nan")
            found.append(Losses(way, dtype, difference, result.failure))
    return found


def _dtypes(way: str) -> list[str]:
    return ["bfloat16"] if way.startswith(("flash", "fp8")) else ["float32", "bfloat16"]


def _too_late(way: str) -> list[Losses]:
    return [Losses(way, dtype, float("nan"), NO_TIME) for dtype in _dtypes(way)]


def name_of(device: str) -> str:
    if device == "cpu":
        return "a CPU"
    import torch

    return f"{torch.cuda.get_device_name(0)}, torch {torch.__version__}"


if __name__ == "__main__":
    sys.exit(main())
