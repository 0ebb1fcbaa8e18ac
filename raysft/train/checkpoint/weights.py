"""The weights of a checkpoint, read by one process that is not a worker."""

from __future__ import annotations

import tempfile
from collections import Counter
from collections.abc import Mapping
from functools import partial
from pathlib import Path

import torch

from raysft.errors import RequestError
from raysft.storage.path import StoragePath
from raysft.train.checkpoint.catalog import CorruptCheckpoint
from raysft.train.checkpoint.parts import corrupt_file
from raysft.train.checkpoint.resume import ResumePoint
from raysft.train.checkpoint.state import WEIGHT
from raysft.train.checkpoint.tensor_io import DTYPES, fill, read_header


@torch.no_grad()
def read_weights(checkpoint: ResumePoint, into: Mapping[str, torch.Tensor], state: str = WEIGHT) -> None:
    """Copy the trained weights of a checkpoint, which any number of workers wrote, into tensors.

    Of a checkpoint in an object store one part after the other is copied to a temporary folder.

    Args:
        checkpoint: a complete one.
        into: all trained weights by their names in the engine's module, contiguous and in any data type.
        state: the optimizer's state to copy in place of them; tensors of weights that have none stay as they are.

    Raises:
        CorruptCheckpoint: a file differs from what was written. The checkpoint is not marked: no training reads it here.
        RequestError: the checkpoint belongs to another model.
    """
    folder, found = checkpoint.path, Counter[str]()
    for part in range(checkpoint.cursor.workers):
        with tempfile.TemporaryDirectory(prefix="raysft-") as scratch:
            local = folder if folder.local else StoragePath.of(Path(scratch))
            if corrupt := corrupt_file(folder, part, local):
                raise CorruptCheckpoint(f"{folder / corrupt} is not what was written")
            file, wanted = local / f"part_{part}.safetensors", []
            for key, dtype, begin, end in file.read(read_header):
                kind, start, name = key.split(":", 2)
                size, first = (end - begin) // DTYPES[dtype].itemsize, int(start)
                if kind != state:
                    continue
                if name not in into or first + size > into[name].numel():
                    raise RequestError(
                        f"{folder}: belongs to another model, which has other weights {name}; restore its files"
                    )
                wanted.append((begin, dtype, into[name].view(-1)[first : first + size]))
                found[name] += size
            wanted.sort(key=lambda item: item[0])
            file.read(partial(fill, wanted))
    lacking = next((name for name, weight in into.items() if found[name] != weight.numel()), None)
    if lacking and state == WEIGHT:
        raise RequestError(f"{folder}: belongs to another model, which has no weights {lacking}; restore its files")
