"""The tensors of a checkpoint's parts, in the safetensors format; a worker reads only what it keeps.

The safetensors library needs files on a local disk. This module uses streams, without a second copy in memory, and reads ranges of
parts in an object store.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.distributed as dist

from raysft.errors import RunFailed
from raysft.storage.path import StoragePath

DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64}
NAMES = {dtype: name for name, dtype in DTYPES.items()}


def write_tensors(tensors: Mapping[str, torch.Tensor], stream: Any) -> None:
    """Write contiguous tensors in CPU memory to a stream."""
    header, end = {}, 0
    # The largest type first, so that each tensor begins where its type may.
    ordered = sorted(tensors.items(), key=lambda item: (-item[1].element_size(), item[0]))
    for name, tensor in ordered:
        start, end = end, end + tensor.numel() * tensor.element_size()
        header[name] = {"dtype": NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    stream.write(len(text).to_bytes(8, "little") + text)
    for _, tensor in ordered:
        stream.write(tensor.reshape(-1).view(torch.uint8).numpy().data)


def read_header(file: Any) -> list[tuple[str, str, int, int]]:
    """Return (name, dtype, first byte, end) of each tensor in a file."""
    length = int.from_bytes(file.read(8), "little")
    header = json.loads(bytes(file.read(length)))
    header.pop("__metadata__", None)
    return [
        (name, entry["dtype"], 8 + length + entry["data_offsets"][0], 8 + length + entry["data_offsets"][1])
        for name, entry in header.items()
    ]


@dataclass(frozen=True)
class Segment:
    """Elements of a parameter, or of an optimizer state for it, in a file."""

    start: int
    """The first element in the flattened parameter."""
    size: int
    dtype: str
    part: int
    begin: int
    """The first byte in the part's file."""


class TensorReader:
    """Read tensors from the segments in all parts."""

    def __init__(self, parts: Mapping[int, StoragePath], mine: Iterable[int]) -> None:
        """All workers call it.

        Args:
            parts: part number → folder to read it from.
            mine: the parts whose headers this worker reads and sends to the others.
        """
        self._files = {part: folder / f"part_{part}.safetensors" for part, folder in parts.items()}
        headers: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(headers, {part: self._files[part].read(read_header) for part in mine})
        self._segments: dict[tuple[str, str], list[Segment]] = {}
        for part, header in sorted(item for by_part in headers for item in by_part.items()):
            for key, dtype, begin, end in header:
                kind, start, name = key.split(":", 2)
                size = (end - begin) // DTYPES[dtype].itemsize
                self._segments.setdefault((kind, name), []).append(Segment(int(start), size, dtype, part, begin))
        self._wanted: dict[int, list[tuple[int, str, torch.Tensor]]] = {}
        self._lacking: str | None = None
        self.kinds = sorted({kind for kind, _ in self._segments})
        """The kinds in the checkpoint: weights and optimizer states."""

    def want(self, kind: str, name: str, start: int, into: torch.Tensor) -> None:
        """Request the elements of a parameter that ``read`` copies into a tensor."""
        missing = len(into)
        for segment in self._segments.get((kind, name), ()):
            first = max(segment.start, start)
            last = min(segment.start + segment.size, start + len(into))
            if first < last:
                begin = segment.begin + (first - segment.start) * DTYPES[segment.dtype].itemsize
                target = into[first - start : last - start]
                self._wanted.setdefault(segment.part, []).append((begin, segment.dtype, target))
                missing -= last - first
        if missing and not self._lacking:
            self._lacking = f"{kind} of {name}"

    def read(self) -> None:
        """Read all that was requested. All workers call it.

        Raises:
            RunFailed: the checkpoint lacks something that any worker requested; raised on all workers.
        """
        missing: list[str | None] = [None] * dist.get_world_size()
        dist.all_gather_object(missing, self._lacking)
        lacking = next((name for name in missing if name), None)
        if lacking:
            raise RunFailed(f"the checkpoint belongs to another model: it has no {lacking}")
        for part, wanted in self._wanted.items():
            wanted.sort(key=lambda item: item[0])
            self._files[part].read(partial(fill, wanted))


def fill(wanted: Iterable[tuple[int, str, torch.Tensor]], file: Any) -> None:
    """Copy elements of a file, (first byte, data type, target) each, into their targets."""
    for begin, dtype, target in wanted:
        values = torch.empty(len(target), dtype=DTYPES[dtype])
        file.seek(begin)
        view = values.view(torch.uint8).numpy().data
        if file.readinto(view) != len(view):
            raise OSError(f"the file ends before byte {begin + len(view)}")
        target.copy_(values)
