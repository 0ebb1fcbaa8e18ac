"""How to make a training run fit that needs too much memory, cheapest remedy first."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

from raysft.config import Config, with_overrides
from raysft.errors import RequestError
from raysft.estimate.memory import Hardware, Memory
from raysft.estimate.sizes import amount

SMALL_BUCKET = 50_000_000
"""Elements of a reduce bucket that still fill a network's messages."""
MOST_PARTS = 16
"""Workers that share rows at most: beyond the GPUs of a node, or of two, each layer waits for the network."""


@dataclass(frozen=True)
class Remedy:
    """A change, and the memory with it."""

    text: str
    """What to set."""
    peak: float
    """Bytes of a worker at its peak."""

    def __str__(self) -> str:
        return f"{self.text} ({amount(self.peak)})"


def remedies(
    config: Config, now: Memory, hardware: Hardware, workers: int, memory_of: Callable[[Config, Hardware], Memory]
) -> Iterator[Remedy]:
    """Yield the changes that help, in order of their cost in time and quality, each with the memory that it alone leads to.

    Args:
        config: that needs too much.
        now: what it needs.
        hardware: where it runs.
        workers: their number.
        memory_of: computes the memory of another config.
    """
    if hardware.gpu and not hardware.expandable_segments:
        peak = memory_of(config, replace(hardware, expandable_segments=True)).peak
        yield Remedy("PYTORCH_ALLOC_CONF=expandable_segments:True in the environment of every node", peak)
    for text, overrides in _changes(config, hardware, workers):
        try:
            other = with_overrides(config, overrides)
            peak = memory_of(other, hardware).peak
        except RequestError:
            continue  # something else in the config forbids it
        if peak < 0.99 * now.peak:
            yield Remedy(text, peak)


def _changes(config: Config, hardware: Hardware, workers: int) -> Iterator[tuple[str, dict[str, Any]]]:
    train, model = config.train, config.model
    if isinstance(train.deepspeed, dict) and not train.deepspeed and train.zero_stage:
        value = {"zero_optimization": {"reduce_bucket_size": SMALL_BUCKET}}
        yield (
            f"train.deepspeed={{zero_optimization: {{reduce_bucket_size: {SMALL_BUCKET}}}}}",
            {"train.deepspeed": value},
        )
    if not train.gradient_checkpointing:
        yield "train.gradient_checkpointing=true", {"train.gradient_checkpointing": True}
    if train.recompute_layers is not None:
        yield "train.recompute_layers=null, for all layers", {"train.recompute_layers": None}
    if hardware.gpu and train.offload.activations == "none":
        text = "train.offload.activations=cpu"
        if train.gradient_checkpointing:
            yield text, {"train.offload.activations": "cpu"}
        else:
            both = {"train.gradient_checkpointing": True, "train.offload.activations": "cpu"}
            yield f"train.gradient_checkpointing=true and {text}", both
    if workers > 1 and train.zero_stage < 3:
        yield "train.zero_stage=3", {"train.zero_stage": 3}
    for parts in parts_of(workers, config.scaling.sequence_parallel):
        yield f"scaling.sequence_parallel={parts}", {"scaling.sequence_parallel": parts}
    if hardware.gpu and train.offload.optimizer == "none":
        yield "train.offload.optimizer=cpu", {"train.offload.optimizer": "cpu"}
    if hardware.gpu and train.offload.parameters == "none":
        both = {"train.zero_stage": 3, "train.offload.optimizer": "cpu", "train.offload.parameters": "cpu"}
        yield "train.zero_stage=3, train.offload.optimizer=cpu and train.offload.parameters=cpu", both
    if model.adapter is None:
        yield "model.finetuning=lora", {"model.finetuning": "lora"}
    if hardware.gpu and model.quantization is None:
        lora = {} if model.adapter is not None else {"model.finetuning": "lora"}
        named = "".join(f"{key}={value} and " for key, value in lora.items())
        yield f"{named}model.quantization=4bit", {**lora, "model.quantization": "4bit"}


def parts_of(workers: int, now: int) -> list[int]:
    """Return the numbers of workers that might share rows, instead of those that do now; the model's heads decide which can.

    >>> parts_of(workers=12, now=1), parts_of(workers=12, now=3), parts_of(workers=1, now=1)
    ([2, 3, 4, 6, 12], [4, 6, 12], [])
    """
    return [parts for parts in range(now + 1, min(workers, MOST_PARTS) + 1) if workers % parts == 0]


def cheapest(found: list[Remedy], limit: float) -> Remedy | None:
    """Return the first remedy whose peak fits.

    >>> cheapest([Remedy("a", 9.0), Remedy("b", 4.0), Remedy("c", 2.0)], limit=5.0).text
    'b'
    """
    return next((each for each in found if each.peak <= limit), None)
