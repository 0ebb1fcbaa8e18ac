"""Room in the storage for checkpoints and the trained model, and whether all nodes see it."""

from __future__ import annotations

import os
import time
import uuid
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from raysft.cluster.placement import Node
from raysft.config import Config
from raysft.errors import RequestError
from raysft.estimate.hardware import ask
from raysft.estimate.sizes import ModelSizes, amount
from raysft.estimate.states import Setup, states

PROBED_NODES = 16
"""Most nodes that are asked to write to the storage."""
PROBE_BYTES = 64 << 20
"""Size of the file that measures the speed of writing."""
PROBE_FROM = 1 << 30
"""Bytes of a checkpoint from which the speed of writing is measured; a smaller one takes seconds anywhere."""
NOTICE_SECONDS = 30
"""From the notice to the end of a machine where nobody set another time: Kubernetes' default, and Ray's."""
OFTEN = 0.1
"""Share of the time between checkpoints that writing one may take without a warning."""


@dataclass(frozen=True)
class Storage:
    """Bytes that a run writes, and the room there is."""

    checkpoint: float
    """One checkpoint."""
    model: float
    """The trained model or adapter."""
    kept: int
    """Checkpoints that exist at a time, with the one that is being written; 0 if there are none."""
    free: float | None
    """Free bytes in ``run.storage``; None in an object store."""

    @property
    def needed(self) -> float:
        """Bytes in all."""
        return self.kept * self.checkpoint + self.model


def storage(config: Config, sizes: ModelSizes, setup: Setup, written_in_all: int | None = None) -> Storage:
    """Compute what a run writes.

    A checkpoint holds weights and optimizer states of the trained weights, in float32 but for pure bfloat16. The model is
    written in its own type.

    Args:
        config: the run's config.
        sizes: of the model.
        setup: of the workers.
        written_in_all: most checkpoints that the run writes from its start to its end; None if time decides.
    """
    kept = states(sizes, setup)
    parallel = setup.workers if setup.zero_stage else 1
    moments = kept.moments if not setup.offload_optimizer else 8.0 * sizes.trained_elements / parallel
    if setup.optimizer.endswith("8bit"):
        moments *= 5  # what is kept in 8 bits is there in float32, too
    width = 2.0 if setup.pure_bf16 else 4.0
    checkpoint = width * sizes.trained_elements + moments * parallel
    written = sizes.trained_elements * 4.0 if config.model.adapter is not None else setup.width * float(sizes.total)
    train = config.train
    saves = train.resumes and (train.saves_on_schedule or train.save_every_minutes is not None)
    copies = 2 if train.keep_best else 1
    limits = [most for most in (train.keep_last and train.keep_last + 1, written_in_all) if most is not None]
    return Storage(checkpoint, copies * written, min(limits, default=1) if saves else 0, _free(config))


def _free(config: Config) -> float | None:
    folder = config.run_place.parent.local
    while folder is not None and not folder.exists():
        folder = folder.parent if folder.parent != folder else None
    if folder is None:
        return None
    try:
        found = os.statvfs(folder)
    except OSError:
        return None
    return float(found.f_bavail * found.f_frsize)


def check_room(config: Config, needed: Storage) -> None:
    """Refuse a run whose model and one checkpoint cannot be written.

    Raises:
        RequestError: there is too little room.
    """
    least = needed.model + (needed.checkpoint if needed.kept else 0.0)
    if needed.free is not None and least > 1.05 * needed.free:
        raise RequestError(
            f"run.storage: {config.run_place.parent} has {amount(needed.free)} free, but the trained model"
            + (" and one checkpoint take" if needed.kept else " takes")
            + f" {amount(least)}; free some space, or choose another folder"
        )


def check_least_room(config: Config, weight_bytes: float) -> None:
    """Refuse a run whose model cannot be written, without an estimate of its size.

    Args:
        config: the run's config.
        weight_bytes: size of the model's files. A model that is trained itself, and not by an adapter, is written again, with at
            least half as many bytes: its files have four for a weight at most.

    Raises:
        RequestError: there is too little room.
    """
    least = 0.0 if config.model.adapter is not None else weight_bytes / 2
    check_room(config, Storage(0.0, least, 0, _free(config)))


def check_shared(config: Config, nodes: Sequence[Node]) -> None:
    """Refuse a folder that other nodes do not see or cannot write to.

    Raises:
        RequestError: names the node.
    """
    folder = config.run_place.parent.local
    if folder is None or len(nodes) < 2:
        return
    name = f".probe-{uuid.uuid4().hex}"
    probe = folder / name
    try:
        try:
            probe.write_text(name)
        except OSError as error:
            raise RequestError(
                f"run.storage: {folder} cannot be written to ({error.strerror}); choose another folder"
            ) from None
        asked = list(nodes[:PROBED_NODES])
        for node, answer in zip(asked, ask(asked, write_beside, str(probe)), strict=True):
            if answer:
                raise RequestError(
                    f"run.storage: {folder} {answer} on node {node.name}; use a folder that every node shares, or a URI (s3://…)"
                )
    finally:
        for file in folder.glob(f"{name}*"):
            file.unlink(missing_ok=True)


def write_beside(probe: str) -> str:
    """Write a file next to one that another node has written; returns what is wrong, or nothing."""
    file = Path(probe)
    if not file.exists():
        return "is another folder"
    try:
        own = file.with_name(f"{file.name}-{uuid.uuid4().hex}")
        own.write_text("")
    except OSError as error:
        return f"cannot be written to ({error.strerror})"
    return ""


def write_speed(config: Config, needed: Storage) -> float | None:
    """Measure how many bytes a second the storage takes; None if checkpoints are small, or it is not a folder."""
    folder = config.run_place.parent.local
    if folder is None or needed.checkpoint < PROBE_FROM or not folder.is_dir():
        return None
    probe, content = folder / f".probe-{uuid.uuid4().hex}", os.urandom(1 << 20)
    started = time.perf_counter()
    try:
        with probe.open("wb") as file:
            for _ in range(PROBE_BYTES >> 20):
                file.write(content)
            os.fsync(file.fileno())
        return PROBE_BYTES / (time.perf_counter() - started)
    except OSError:
        return None
    finally:
        with suppress(OSError):
            probe.unlink()


def slow_checkpoints(needed: Storage, speed: float | None, interval: float | None) -> str:
    """Return a warning if writing checkpoints takes much of the time; empty otherwise.

    Args:
        needed: what the run writes.
        speed: bytes a second.
        interval: seconds between two checkpoints.

    >>> slow_checkpoints(Storage(60e9, 0, 3, None), speed=1e9, interval=120.0)
    'writing a checkpoint takes about 60 s, 50% of the time between two; raise train.save_every_minutes or train.save_every_steps'
    >>> slow_checkpoints(Storage(60e9, 0, 3, None), speed=1e9, interval=900.0)
    ''
    """
    if not needed.kept or speed is None or interval is None:
        return ""
    seconds = needed.checkpoint / speed
    if seconds < OFTEN * interval:
        return ""
    return (
        f"writing a checkpoint takes about {seconds:.0f} s, {seconds / interval:.0%} of the time between two; raise "
        "train.save_every_minutes or train.save_every_steps"
    )


def late_checkpoint(step: float | None, checkpoint: float | None) -> str:
    """Return a warning if a machine that goes may be gone before a checkpoint is written; empty otherwise, and if nothing is known.

    Args:
        step: seconds of a step in an earlier run; None without one.
        checkpoint: seconds of writing one, as measured; None if that is not known.

    >>> late_checkpoint(20.0, 25.0)
    'a step and a checkpoint take about 45 s, but a machine may be taken away 30 s after its notice (the default of Kubernetes and \
Ray): raise terminationGracePeriodSeconds and RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S, or the steps since the previous \
checkpoint are repeated'
    >>> late_checkpoint(20.0, None), late_checkpoint(None, None)
    ('', '')
    """
    seconds = (step or 0.0) + (checkpoint or 0.0)
    if seconds <= NOTICE_SECONDS:
        return ""
    known = " and ".join(name for name, value in (("a step", step), ("a checkpoint", checkpoint)) if value)
    verb = "take" if step and checkpoint else "takes"
    return (
        f"{known} {verb} about {seconds:.0f} s, but a machine may be taken away {NOTICE_SECONDS} s after its notice (the default "
        "of Kubernetes and Ray): raise terminationGracePeriodSeconds and RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S, or the steps "
        "since the previous checkpoint are repeated"
    )
