"""The memory of real trainings, measured in processes of their own, and the estimate for the same config.

The peak is that of torch's own allocator for the CPU, which its profiler reports for every tensor that is made or freed, also
inside operators and in the threads of gradients. It counts what ``torch.cuda.max_memory_allocated`` counts on a GPU, to the
byte and the same in every run. The resident memory of the process also holds libraries, threads, pages of weight files that are
only mapped, and what malloc keeps for later; all that is more than a tiny model needs.
"""

from __future__ import annotations

import gc
import json
import os
import queue
import socket
import tempfile
import time
import weakref
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch.autograd.graph import saved_tensors_hooks

from raysft.config import Config, parse, with_overrides
from raysft.config.scaling import slice_tokens
from raysft.estimate.estimate import Training
from raysft.estimate.images_of_rows import ImagesOfRows
from raysft.estimate.measure import Microbatch, measure
from raysft.estimate.memory import Hardware, Memory, memory
from raysft.estimate.setup import setup_of
from raysft.estimate.sizes import Activations, ModelSizes
from raysft.models import recomputation
from raysft.models.media_inputs import image_tokens, media_inputs
from raysft.models.processor import ProcessorFiles, has_processor, load_processor
from raysft.train import loss
from raysft.train.sequence_group import SequenceGroup
from tests.processes import forks

SECONDS = 300
"""How long all trainings together may take."""
STEPS = 2
"""The second step has the optimizer's states from its beginning; the first one, which makes them, needs few tokens."""
FEW_TOKENS = 8
IMAGE, IMAGES = (112, 112), 3
"""Size and number of the images of a row, if the model takes images."""
TRIES = 5
FREED_UNSEEN = 0.01
"""Share of the peak that may be left after the end of a training. More of it was freed unseen: a thread of gloo that comes late
may be the last to let go of gradients, and the profiler does not look into that one."""


@dataclass(frozen=True)
class Measured:
    """Bytes of torch's tensors in one worker."""

    peak: int
    """Most during the second step."""
    before: int
    """Before the second step."""
    master: int
    """float32 copies of the weights."""
    moments: int
    """States of the optimizer."""
    weights: int
    """Weights of the model."""
    host: int
    """Most that waited at a time in the node's memory beside a device (``HostMemory``)."""
    process: int
    """Most resident memory of the process during the second step, with all that is not torch's tensors."""


def config_of(folder: Path, model: Path | str, settings: dict[str, Any] | None = None) -> Config:
    """Make the config of a training that needs no data."""
    config = parse(
        {
            "run": {"name": "r", "storage": str(folder)},
            "model": {"path": str(model), "dtype": "float32", "finetuning": "full"},
            "data": {"train": [{"name": "d", "path": str(folder / "none.jsonl")}], "sequence_length": 96},
            "train": {"global_batch_size": 2, "micro_batch_size": 2, "warmup_ratio": 0.0, "max_steps": STEPS},
        }
    )
    return with_overrides(config, settings or {})


def estimated(config: Config, world: int = 1) -> Memory:
    """Estimate a training whose tokens all have a loss, with images in every row if the model takes some."""
    sizes, activations = model_of(config, images=has_processor(config.model.path))
    rows = _rows(config, world)
    setup = setup_of(config, world, rows)
    beside = config.train.offload.activations != "none"  # the tensors of a worker on a CPU are those of one on a GPU
    return memory(sizes, activations, setup, min(rows, config.micro_batch_size), Hardware(gpu=beside))


def _rows(config: Config, world: int) -> int:
    """Rows of a step that each worker has, alone or with the others of its group."""
    return -(-int(config.train.global_batch_size) * config.scaling.sequence_parallel // world)


def model_of(config: Config, images: bool = False) -> tuple[ModelSizes, Activations]:
    """Sizes and activations of a config's model, traced; with ``IMAGES`` in every row if asked for."""
    from transformers import AutoConfig

    hf_config = AutoConfig.from_pretrained(config.model.path)
    shown = ImagesOfRows(ProcessorFiles.of(config.model.path), *IMAGE, IMAGES) if images else None
    tokens = slice_tokens(config.data.sequence_length, config.scaling.sequence_parallel)
    training = Training(config, hf_config, None, 1, 1, Microbatch(tokens, 1.0, shown))
    return measure(config, training.hf_config, None, training.microbatch)


def measured(
    configs: Sequence[Config], world: int = 1, chunk_tokens: int = loss.CHUNK_TOKENS, seconds: float = SECONDS
) -> list[list[Measured]]:
    """Train two steps of each config with ``world`` workers, one config after another; gives what each worker needed.

    Args:
        configs: of the trainings.
        world: number of workers.
        chunk_tokens: most loss tokens whose logits exist at the same time.
        seconds: how long all trainings together may take.
    """
    context = forks()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    out = context.Queue()
    processes = [
        context.Process(target=_worker, args=(rank, world, port, configs, out, chunk_tokens)) for rank in range(world)
    ]
    for process in processes:
        process.start()
    found: dict[int, list[Measured]] = {}
    try:
        ends = time.monotonic() + seconds
        while len(found) < world:
            with suppress(queue.Empty):
                rank, ours = out.get(timeout=1)
                found[rank] = ours
            assert time.monotonic() < ends, f"the trainings did not end within {seconds} s"
            assert not any(process.exitcode for process in processes), "a worker failed; it says why"
    finally:
        for process in processes:
            process.join(5)
            process.kill()
    return [[found[rank][index] for rank in range(world)] for index in range(len(configs))]


def _worker(rank: int, world: int, port: int, configs: Sequence[Config], out: Any, chunk_tokens: int) -> None:
    os.environ.update(
        MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), RANK=str(rank), WORLD_SIZE=str(world), LOCAL_RANK=str(rank)
    )
    torch.set_num_threads(1)
    loss.CHUNK_TOKENS = chunk_tokens
    torch.distributed.init_process_group("gloo", rank=rank, world_size=world)
    out.put((rank, [_measured(config, world) for config in configs]))
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


def _measured(config: Config, world: int) -> Measured:
    for _ in range(TRIES):
        found, left = _measured_once(config, world)
        # What ZeRO-3 hooks into modules stays; several workers would have to agree on another try.
        if world > 1 or config.train.zero_stage == 3 or left <= FREED_UNSEEN * found.peak:
            return found
    raise AssertionError(f"{left:,} bytes are left after the training, in each of {TRIES} tries")


class HostMemory(saved_tensors_hooks):
    """In place of ``save_on_cpu``: the node's memory beside a device, here numpy's, which torch's allocator does not count."""

    now = most = 0
    """Bytes that wait there, and the most that did at a time."""

    def __init__(self, **_: Any) -> None:
        super().__init__(self.keep, torch.from_numpy)

    def keep(self, tensor: torch.Tensor) -> Any:
        """Copy a tensor there."""
        copy = tensor.detach().numpy().copy()
        HostMemory._add(copy.nbytes)
        weakref.finalize(copy, HostMemory._add, -copy.nbytes)
        return copy

    @staticmethod
    def _add(size: int) -> None:
        HostMemory.now += size
        HostMemory.most = max(HostMemory.most, HostMemory.now)


def _measured_once(config: Config, world: int) -> tuple[Measured, int]:
    """Train two steps; gives what they needed, and how many bytes are left at the end."""
    from torch.profiler import ProfilerActivity, profile, record_function

    from raysft.train.engine import make_engine
    from raysft.train.step import train_step

    recomputation.save_on_cpu = HostMemory  # type: ignore[assignment,misc]
    processor = load_processor(config.model.path) if has_processor(config.model.path) else None
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        group = SequenceGroup.join(config.scaling.sequence_parallel)
        engine, scheduler = make_engine(
            config, config.model.path, world, STEPS, torch.device("cpu"), processor=processor, group=group
        )
        for parameter in engine.module.parameters():
            if not (parameter.requires_grad and config.train.zero_stage):
                parameter.data = parameter.data.clone()  # what ZeRO has not copied is still a part of the mapped file
        rows = _rows(config, world)
        for step in range(STEPS):
            tokens = config.data.sequence_length if step == STEPS - 1 else FEW_TOKENS
            batch = _batch(rows, tokens, seed=step)
            shown = processor is not None and tokens > FEW_TOKENS
            if shown:
                place = len(image_tokens(processor, Image.new("RGB", IMAGE)))
                batch["input_ids"][:, : IMAGES * place] = image_tokens(processor, Image.new("RGB", IMAGE)) * IMAGES
            HostMemory.most = HostMemory.now
            _forget_peak()
            with record_function(f"step {step}"):
                pixels: Any = _Pixels(processor, config.micro_batch_size) if shown else None
                train_step(engine, batch, float(rows * group.groups * (tokens - 1)), pixels=pixels, group=group)
        beside = HostMemory.most, _peak()
        states = _states(engine)
        engine.destroy()
        del engine, scheduler
        gc.collect()
    peak, before, left = _most(profiler)
    return Measured(peak, before, *states, *beside), left


def _forget_peak() -> None:
    """Let the most resident memory of this process begin anew (Linux)."""
    Path("/proc/self/clear_refs").write_text("5")


def _peak() -> int:
    """Most resident memory of this process since then, in bytes."""
    status = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in status if line.startswith("VmHWM"))


class _Pixels:
    """The same images in every row; in place of ``train.pixels.Pixels``."""

    def __init__(self, processor: Any, rows: int) -> None:
        self._processor, self._images = processor, [[Image.new("RGB", IMAGE, "red")]] * IMAGES * rows

    def take(self) -> dict[str, Any]:
        made = media_inputs(self._processor, self._images)
        return {"images": {name: values.clone() for name, values in made.items()}}  # which torch has allocated

    def waited(self) -> float:
        return 0.0


def _batch(rows: int, tokens: int, seed: int) -> dict[str, np.ndarray]:
    """Rows of one example each, all of whose tokens have a loss."""
    draw = np.random.default_rng(seed)
    ids = draw.integers(4, 300, (rows, tokens))
    return {
        "row": np.arange(rows),
        "tokens": np.full(rows, tokens),
        "input_ids": ids,
        "position_ids": np.tile(np.arange(tokens), (rows, 1)),
        "labels": ids,
    }


def most_allocated(function: Callable[[], object]) -> int:
    """Most bytes of tensors that a function allocates at a time."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        function()
    changes, _ = _changes(profiler)
    return max(change.total for change in changes) - (changes[0].total - changes[0].size)


class _Change(NamedTuple):
    """A tensor that is made or freed."""

    moment: float
    total: int
    """Bytes of all tensors after it."""
    size: int


def _changes(profiler: Any) -> tuple[list[_Change], list[dict[str, Any]]]:
    """All changes in order, from the profiler's own file, and its other events."""
    with tempfile.TemporaryDirectory() as folder:
        profiler.export_chrome_trace(str(Path(folder, "trace.json")))
        events = json.loads(Path(folder, "trace.json").read_text())["traceEvents"]
    changes = [
        _Change(float(event["ts"]), int(event["args"]["Total Allocated"]), int(event["args"]["Bytes"]))
        for event in events
        if event.get("name") == "[memory]" and event["args"].get("Device Type") == 0
    ]
    return sorted(changes, key=lambda change: change.moment), events


def _most(profiler: Any) -> tuple[int, int, int]:
    """Most bytes during the last step, those before it, and those at the end."""
    changes, events = _changes(profiler)
    step = next(
        event for event in events if event.get("name") == f"step {STEPS - 1}" and event.get("cat") == "user_annotation"
    )
    begin, end = step["ts"], step["ts"] + step["dur"]
    start = changes[0].total - changes[0].size
    before = next(change.total for change in reversed(changes) if change.moment < begin)
    most = max(change.total for change in changes if begin <= change.moment <= end)
    return most - start, before - start, changes[-1].total - start


def _states(engine: Any) -> tuple[int, int, int]:
    """Bytes of float32 copies, of the optimizer's states, and of the weights, each storage once."""
    from raysft.train.deepspeed_internals import base_optimizer, optimized_tensors

    stage = engine.zero_optimization_stage()
    master = optimized_tensors(engine) if stage else []
    optimizer = base_optimizer(engine)
    inner = [*getattr(optimizer, "optimizers", ()), getattr(optimizer, "base_optimizer", None), optimizer]
    moments = [
        value
        for each in inner
        if each is not None
        for state in each.state.values()
        for value in _tensors(state)
        if value.numel() > 1  # without the counters of steps
    ]
    parameters = list(engine.module.parameters())
    weights = [getattr(each, "ds_tensor", each) for each in parameters]
    return _bytes(master), _bytes(moments), _bytes(weights)


def _tensors(state: Any) -> list[torch.Tensor]:
    """All tensors of an optimizer's state, also those of a projector that it has."""
    values = state.values() if isinstance(state, dict) else vars(state).values()
    found = [value for value in values if isinstance(value, torch.Tensor)]
    for value in values:
        if hasattr(value, "ortho_matrix"):
            found += _tensors(value)
    return found


def _bytes(tensors: Sequence[Any]) -> int:
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}
    return sum(storages.values())
