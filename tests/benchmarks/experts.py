"""Experts of one layer in KTransformers' kernel, against transformers' on the same CPU: ``python -m tests.benchmarks.experts``.

Forward and backward pass with LoRA, in bfloat16, with random weights: seconds of each, the median of some passes taken in turn,
and their ratio. Needs kt-kernel and a CPU with AVX-512 BF16 (see ``configs/README.md``).
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from raysft.models.kt_experts import move_experts
from raysft.models.transformers_internals import expert_modules
from raysft.train.finetuning import load_model
from tests.kt import LACKS
from tests.measured_memory import config_of
from tests.tiny import tiny_mixture


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--experts", type=int, default=32, help="default 32")
    parser.add_argument("--chosen", type=int, default=8, help="experts of a token (default 8)")
    parser.add_argument("--hidden", type=int, default=1024, help="default 1024")
    parser.add_argument("--inner", type=int, default=768, help="width of an expert (default 768)")
    parser.add_argument("--tokens", type=int, default=2048, help="of a microbatch (default 2048)")
    parser.add_argument("--passes", type=int, default=5, help="that are timed (default 5)")
    parsed = parser.parse_args(arguments)
    if LACKS:
        parser.error(LACKS)
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        model = tiny_mixture(
            place / "model",
            hidden_size=parsed.hidden,
            num_experts=parsed.experts,
            moe_intermediate_size=parsed.inner,
            num_experts_per_tok=parsed.chosen,
            initializer_range=0.02,
        )
        layers = {name: layer(name, place, model, parsed.tokens) for name in ("auto", "kt")}
    draw = torch.Generator().manual_seed(0)
    hidden = torch.randn(parsed.tokens, parsed.hidden, generator=draw).bfloat16().requires_grad_()
    chances = torch.rand(parsed.tokens, parsed.experts, generator=draw)
    weights, index = chances.topk(parsed.chosen)
    seconds: dict[str, list[float]] = {name: [] for name in layers}
    for turn in range(parsed.passes + 1):
        for name, experts in layers.items():
            started = time.perf_counter()
            experts(hidden, index, weights.bfloat16()).sum().backward()
            if turn:  # the first one makes buffers
                seconds[name].append(time.perf_counter() - started)
    kernel, plain = (statistics.median(seconds[name]) for name in ("kt", "auto"))
    print(f"transformers {plain:.3f} s, kernel {kernel:.3f} s: {plain / kernel:.2f} times as fast, "
          f"with {torch.get_num_threads()} threads")  # fmt: skip
    return 0


def layer(experts: str, place: Path, model: Path, tokens: int) -> Any:
    """A layer's experts, with their adapters."""
    settings = {
        "model.finetuning": "lora",
        "model.dtype": "bfloat16",
        "model.experts": experts,
        "data.sequence_length": tokens,
        "train.micro_batch_size": 1,
    }
    config = config_of(place, model, settings)
    loaded = load_model(config, str(model))
    if experts == "kt":
        move_experts(loaded, config)
    inside = expert_modules(loaded)[0]
    name = next(name for name, module in loaded.named_modules() if module is inside)
    while name.endswith(".base_layer"):
        name = name.removesuffix(".base_layer")
    return loaded.train().get_submodule(name)


if __name__ == "__main__":
    sys.exit(main())
