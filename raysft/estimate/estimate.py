"""Everything that training needs, compared with what is available: lines for the plan, warnings, and refusals.

A run is refused only if it certainly cannot fit: a lower bound of its memory is above 1.05 times what a worker has.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from typing import Any

from raysft.cluster.placement import Node, Workers, workers_on_a_node
from raysft.config import Config, with_overrides
from raysft.config.scaling import slice_tokens
from raysft.errors import RequestError
from raysft.estimate.hardware import NodeMemory
from raysft.estimate.host import host_memory
from raysft.estimate.longest_row import LongestRow, longest_rows
from raysft.estimate.measure import Microbatch, measure
from raysft.estimate.memory import Hardware, Memory, largest_rows, memory
from raysft.estimate.remedies import Remedy, cheapest, remedies
from raysft.estimate.setup import setup_of
from raysft.estimate.sizes import GIB, ModelSizes, amount
from raysft.estimate.states import Setup

REFUSED, WARNED = 1.05, 0.92
"""Shares of the memory: above the first a run is refused if that is sure, above the second it is warned about."""
BUSY_TOKENS = 16_384
"""Tokens of a microbatch that keep a large GPU busy: an H200 trains a model of 1B parameters on 42,900 tokens per second with so
many, on 21,900 with 2,048."""


@dataclass(frozen=True)
class Training:
    """What is known of a training run before it starts."""

    config: Config
    hf_config: Any
    """The model's own config."""
    adapter: str | None
    """Folder of the adapter that it continues from."""
    workers: int
    rows_per_worker: int
    """Rows of a step that each worker has."""
    microbatch: Microbatch
    filled: float = 1.0
    """Share of the places of a microbatch that certainly hold tokens in some step."""
    reference: Any = None
    """The own config of ``train.reference_model``; None without one."""

    def setup(self, config: Config) -> Setup:
        """Return the setup with this config or a similar one."""
        from raysft.estimate.fake_model import elements_of

        beside = elements_of(config, self.reference) if self.reference is not None else 0
        return setup_of(config, self.workers, self.rows_per_worker, beside)

    @property
    def rows(self) -> int:
        """Rows of a microbatch."""
        return min(self.config.micro_batch_size, self.rows_per_worker)


@dataclass(frozen=True)
class Place:
    """What a worker has."""

    limit: float | None
    """Bytes of its GPU, or its part of the node's memory; None if unknown."""
    extra: float
    """Bytes of swap that it may use besides."""
    node: float | None
    """Bytes of the node's memory."""
    ranks: int
    """Workers on a node."""
    hardware: Hardware

    @property
    def named(self) -> str:
        """Where the memory is, for messages."""
        return "each GPU" if self.hardware.gpu else "each worker"


@dataclass(frozen=True)
class Estimate:
    """A training's memory against what there is."""

    sizes: ModelSizes
    memory: Memory
    place: Place
    largest: int
    """Largest number of rows of a microbatch that fits, up to those that a worker has in a step; 0 if none does."""
    most: int
    """Rows that a worker has in a step."""
    host: float
    """Bytes in the memory of a node."""
    remedies: tuple[Remedy, ...] = ()
    """What helps, if it does not fit."""
    longest: tuple[LongestRow, ...] = ()
    """The longest rows, if not even one of the training's fits."""
    warnings: tuple[str, ...] = field(default=())
    without_images: bool = False
    """True if what encodes images is left out, as it cannot be traced."""

    def lines(self, table: bool) -> list[str]:
        """Return the memory of a worker for the terminal, its parts in the same line or as a table."""
        memory, limit = self.memory, self.place.limit
        of = f" of {_gib(limit)}" if limit else ""
        source = "" if memory.traced else " (activations by formula)"
        source += " (without what encodes images)" if self.without_images else ""
        fits = f"; up to {_rows(self.largest)} at once fit" if self.largest else ""
        line = f"memory: about {_gib(memory.peak)}{of} for {self.place.named}, most {memory.moment}{source}{fits}"
        beside = self.place.hardware.gpu or memory.host  # such as weights that wait there
        node = [f"memory of a node: about {_gib(self.host)} of {_gib(self.place.node)}"] if beside else []
        if table:
            return [line, *(f"  {name:<14}{value / GIB:9.3f} GiB" for name, value in memory.parts.items()), *node]
        shown = (f"{name} {value / GIB:.2f}" for name, value in memory.parts.items() if value >= 0.005 * GIB)
        return [f"{line} ({', '.join(shown)} GiB)", *node]


def place_of(training: Training, nodes: Sequence[Node], found: tuple[Node, NodeMemory] | None) -> Place:
    """Return what a worker has on the node with the least memory, ``found`` by ``smallest_node``."""
    scaling = training.config.scaling
    hardware = Hardware(scaling.use_gpu, max(1, len(nodes)), _expandable())
    if found is None:
        return Place(None, 0.0, None, training.workers, hardware)
    node, answer = found
    fewest = -(-training.workers // max(1, len(nodes)))
    ranks = max(1, min(training.workers, node.capacity(scaling.cpus_per_worker, float(scaling.use_gpu)) or fewest))
    if scaling.placement == "spread":
        workers = Workers(training.workers, scaling.cpus_per_worker, scaling.use_gpu, spread=True)
        ranks = min(ranks, workers_on_a_node(nodes, workers))
    if scaling.use_gpu:
        return Place(answer.gpu, 0.0, answer.total, ranks, hardware)
    return Place(answer.total / ranks if answer.total else None, answer.swap / ranks, answer.total, ranks, hardware)


def _expandable() -> bool:
    settings = os.environ.get("PYTORCH_ALLOC_CONF") or os.environ.get("PYTORCH_CUDA_ALLOC_CONF") or ""
    return "expandable_segments:true" in settings.lower()


def estimate(training: Training, place: Place) -> Estimate:
    """Estimate the memory of a training run.

    Raises:
        RequestError: it certainly does not fit.
        Exception: of any type; the model cannot be made without its weights.
    """
    config = training.config
    sizes, activations = measure(config, training.hf_config, training.adapter, training.microbatch)
    setup = training.setup(config)
    needed = memory(sizes, activations, setup, training.rows, place.hardware, training.filled)
    limit, most = place.limit, max(training.rows, training.rows_per_worker)
    largest = largest_rows(sizes, activations, setup, place.hardware, WARNED * limit, most) if limit else 0
    host = host_memory(sizes, setup, needed, place.ranks, place.hardware.gpu)
    found: tuple[Remedy, ...] = ()
    if limit and needed.peak > WARNED * limit:
        found = tuple(remedies(config, needed, place.hardware, training.workers, _memory_of(training)))
    longest = _longest_rows(training, place, list(found)) if found and not largest else ()
    result = Estimate(sizes, needed, place, largest, most, host, found, longest)
    if limit and needed.sure > REFUSED * limit + place.extra:
        raise RequestError(_too_much(result, f"at least {_gib(needed.sure)}"))
    warnings = (*_warnings(result, config.model.experts == "kt"), *_waiting_gpu(training, result))
    left_out = training.microbatch.images is not None and activations.images is None
    return replace(result, warnings=warnings, without_images=left_out)


def _memory_of(training: Training, tokens: int | None = None) -> Callable[[Config, Hardware], Memory]:
    """Return what computes the memory of other configs, with as many rows as the training has or with one row of ``tokens``."""
    from raysft.train.check_model import check_shared_rows

    def memory_of(config: Config, hardware: Hardware) -> Memory:
        adapter = training.adapter if config.model.finetuning == training.config.model.finetuning else None
        before, parts = training.config.scaling.sequence_parallel, config.scaling.sequence_parallel
        microbatch = training.microbatch
        if parts != before:
            check_shared_rows(config, training.hf_config)
        if parts != before or tokens:
            microbatch = replace(microbatch, tokens=slice_tokens(tokens or microbatch.tokens * before, parts))
        sizes, activations = measure(config, training.hf_config, adapter, microbatch)
        return memory(sizes, activations, training.setup(config), 1 if tokens else training.rows, hardware)

    return memory_of


def _longest_rows(training: Training, place: Place, found: list[Remedy]) -> tuple[LongestRow, ...]:
    """The longest rows that fit: as the config is and, if no remedy does, with what makes rows cheaper."""
    if training.microbatch.images is not None or not place.limit:
        return ()  # whose tokens a shorter row might not hold

    def memory_of(config: Config, tokens: int) -> Memory:
        shorter = with_overrides(config, {"data.sequence_length": tokens})
        return _memory_of(training, tokens)(shorter, place.hardware)

    tokens = training.microbatch.tokens * training.config.scaling.sequence_parallel
    limit = WARNED * place.limit
    longest = longest_rows(training.config, tokens, place.hardware.gpu, training.workers, limit, memory_of)
    return tuple(islice(longest, 1) if cheapest(found, limit) else longest)


def _warnings(result: Estimate, whole_experts: bool) -> list[str]:
    found, limit, node = [], result.place.limit, result.place.node
    if limit and result.memory.peak > WARNED * limit:
        found.append(_too_much(result, f"about {_gib(result.memory.peak)}"))
    elif node and result.host > node:
        more = "nodes with more memory"
        fewer = f"fewer workers on a node, or {'train.zero_stage=3' if result.place.hardware.gpu else more}"
        found.append(
            f"the {result.place.ranks} workers of a node need about {_gib(result.host)} of its memory while they load and train, "
            f"but it has {_gib(node)}; use {f'{more}, or model.experts=auto with zero_stage=3' if whole_experts else fewer}"
        )
    return found


def _waiting_gpu(training: Training, result: Estimate) -> Iterator[str]:
    """A GPU waits for its next kernel if a microbatch has few tokens."""
    tokens, rows = training.microbatch.tokens, training.rows
    useful = min(result.largest, BUSY_TOKENS // tokens)
    if result.place.hardware.gpu and training.config.train.micro_batch_size == "auto" and useful >= 2 * rows:
        yield (
            f"a microbatch of {_rows(rows)} ({rows * tokens:,} tokens) underutilizes a large GPU; use "
            f"train.micro_batch_size={1 << useful.bit_length() - 1}, which fits"
        )


def _too_much(result: Estimate, needed: str) -> str:
    """Say what is needed, what there is, and the cheapest remedy."""
    limit = result.place.limit or 0.0
    text = (
        f"a microbatch of {_rows(result.memory.rows)} needs {needed} of memory for {result.place.named}, which has "
        f"{_gib(limit)}"
    )
    if 0 < result.largest < result.memory.rows:
        return f"{text}; use train.micro_batch_size={result.largest}"
    remedy = cheapest(list(result.remedies), WARNED * limit)
    whole = [f"{each.settings} ({amount(each.peak)})" for each in result.longest if each.whole]
    shorter = [str(each) for each in result.longest if not each.whole]
    uses = [
        *([str(remedy)] if remedy else whole),
        *([f"data.sequence_length={shorter[0]}", *shorter[1:]] if shorter else []),
    ]
    if uses:
        return f"{text}; use {', or '.join(uses)}"
    least = min(result.remedies, key=lambda each: each.peak, default=None)
    more = "a GPU with more memory" if result.place.hardware.gpu else "nodes with more memory or fewer workers on each"
    return f"{text}; use {more}" + (f", with {least}" if least else "")


def _gib(value: float | None) -> str:
    return amount(value or 0.0)


def _rows(count: int) -> str:
    return f"{count} row{'' if count == 1 else 's'}"
