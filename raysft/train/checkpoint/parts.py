"""The files of a checkpoint, in a folder on disk or in an object store.

Each worker writes its fragments (``part_0.safetensors``), the rest of its state (``state_0.pt``) and, after both, their digests
(``part_0.json``); rank 0 also writes ``cursor.json``. A checkpoint is complete when the digests of all workers exist.
"""

from __future__ import annotations

import hashlib
import json
import pickle
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from raysft.storage.path import StoragePath
from raysft.train.checkpoint.catalog import DAMAGED, CorruptCheckpoint
from raysft.train.checkpoint.cursor import Cursor
from raysft.train.checkpoint.optimizer_state import read_rest
from raysft.train.checkpoint.tensor_io import write_tensors


@dataclass(frozen=True)
class Snapshot:
    """One worker's part of a checkpoint in memory, so that training can continue while it is written."""

    rank: int
    tensors: dict[str, torch.Tensor]
    """By kind, first element and parameter (``exp_avg:0:model.norm.weight``)."""
    rest: dict[str, Any]
    """Random states, the optimizer's counters, the latest records of the log."""
    cursor: Cursor

    @property
    def size_bytes(self) -> int:
        """Bytes of all tensors."""
        return sum(tensor.numel() * tensor.element_size() for tensor in self.tensors.values())


def write(part: Snapshot, folder: StoragePath | Path) -> None:
    """Write one worker's part; the other workers write theirs into the same folder."""
    folder = StoragePath.of(folder)
    digests = {}

    def put(name: str, save: Callable[[Any], object]) -> None:
        digests[name] = (folder / name).write(lambda stream: _digested(stream, save))

    put(f"part_{part.rank}.safetensors", lambda stream: write_tensors(part.tensors, stream))
    put(f"state_{part.rank}.pt", lambda stream: torch.save(part.rest, stream))
    if part.rank == 0:
        put("cursor.json", lambda stream: stream.write(json.dumps(asdict(part.cursor)).encode()))
    (folder / f"part_{part.rank}.json").write_text(json.dumps(digests))


def remove_part(part: Snapshot, folder: StoragePath) -> None:
    """Remove what exists of one worker's part, so that a failed attempt takes no space."""
    for name in (f"part_{part.rank}.json", f"part_{part.rank}.safetensors", f"state_{part.rank}.pt"):
        (folder / name).remove()
    if folder.local and not folder.entries():
        folder.remove()


def _digested(stream: Any, save: Callable[[Any], object]) -> dict[str, Any]:
    writer = _DigestWriter(stream)
    save(writer)
    return {"bytes": writer.size_bytes, "sha256": writer.digest.hexdigest()}


class _DigestWriter:
    """Count and hash what is written, so that it need not be read again or stored on disk before it is uploaded."""

    def __init__(self, stream: Any) -> None:
        self._stream, self.digest, self.size_bytes = stream, hashlib.sha256(), 0

    def write(self, content: Any) -> int:
        view = memoryview(content)
        self.digest.update(view)
        self.size_bytes += view.nbytes
        self._stream.write(content)
        return view.nbytes

    def flush(self) -> None:
        """Do nothing: there is no buffer."""


def check(folder: StoragePath, cursor: Cursor, scratch: Path) -> dict[int, StoragePath]:
    """Compare a checkpoint with its digests. Each worker reads some of the parts; all workers return or raise alike.

    Args:
        folder: the checkpoint.
        cursor: the checkpoint's cursor.
        scratch: a local folder for copies of parts in an object store.

    Returns:
        Part number → local folder, for the parts that this worker has read.

    Raises:
        CorruptCheckpoint: a file differs from what was written.
    """
    rank, workers = dist.get_rank(), dist.get_world_size()
    local_parts: dict[int, StoragePath] = {}
    found = None
    for part in range(rank, cursor.workers, workers):
        local_parts[part] = folder if folder.local else StoragePath.of(scratch)
        found = found or corrupt_file(folder, part, local_parts[part])
    corrupt_files: list[Any] = [None] * workers
    dist.all_gather_object(corrupt_files, found)
    corrupt = next((name for name in corrupt_files if name), None)
    if corrupt:
        if rank == 0:
            (folder / DAMAGED).write_text(json.dumps({"file": corrupt}))
        dist.barrier()
        raise CorruptCheckpoint(f"checkpoint after step {cursor.step}: {folder / corrupt} is not what was written")
    return local_parts


def corrupt_file(folder: StoragePath, part: int, local_folder: StoragePath) -> str | None:
    """Return the first file of a part that differs from its digest. The part is copied to ``local_folder`` first."""
    for name, expected in json.loads((folder / f"part_{part}.json").read_text()).items():
        try:
            if local_folder != folder:
                local = (local_folder / name).local
                assert local
                (folder / name).download(local)
            digest = (local_folder / name).read(lambda file: hashlib.file_digest(file, "sha256").hexdigest())
        except FileNotFoundError:
            return str(name)
        if digest != expected["sha256"]:
            return str(name)
    return None


def read_state(folder: StoragePath, local_folder: StoragePath, part: int) -> dict[str, Any]:
    """Read a worker's state besides its tensors.

    Raises:
        CorruptCheckpoint: the file could run code, regardless of its digest.
    """
    name = f"state_{part}.pt"
    try:
        return (local_folder / name).read(read_rest)
    except pickle.UnpicklingError:
        (folder / DAMAGED).write_text(json.dumps({"file": name}))
        what = "more than tensors and plain values, which no training run has written"
        raise CorruptCheckpoint(f"{folder / name} holds {what}") from None
