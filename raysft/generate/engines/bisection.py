"""Complete a batch of prompts; if it fails, complete its halves, so that a prompt that fails costs no other."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from raysft.errors import StorageFailed
from raysft.generate.engines.interface import Completion, Engine, Media, failure


def complete(
    engine: Engine, ids: Sequence[str], prompts: Sequence[Sequence[int]], media: Media = ()
) -> list[Completion]:
    """Complete a batch; if that fails, complete its halves, so that a prompt that fails costs no other.

    Raises:
        StorageFailed: images cannot be read, for a reason that is none of this prompt alone.
        Exception: the engine's first error, if every one of several prompts fails; then the prompts are not to blame.
    """
    completions, first = _complete(engine, ids, prompts, media)
    # The prompts that are too large are all in the first batch; the others may fit.
    blame_prompts = isinstance(first, torch.OutOfMemoryError)
    if first and len(ids) > 1 and not blame_prompts and all(completion.error for completion in completions):
        raise first
    return completions


def _complete(
    engine: Engine, ids: Sequence[str], prompts: Sequence[Sequence[int]], media: Media
) -> tuple[list[Completion], Exception | None]:
    try:
        return engine.complete(ids, prompts, media), None
    except StorageFailed:
        raise  # each half would wait for the storage as long again
    except Exception as error:
        caught = error
    # Outside the handler, so that the memory that the exception holds is free.
    torch.cuda.empty_cache()
    if len(ids) == 1:
        return [failure(caught)], caught
    half = len(ids) // 2
    left, first = _complete(engine, ids[:half], prompts[:half], media[:half])
    right, second = _complete(engine, ids[half:], prompts[half:], media[half:])
    return left + right, first or second
