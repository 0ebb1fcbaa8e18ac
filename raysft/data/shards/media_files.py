"""Look whether the images of sets in the cache are still there, before a run begins that would find out when it needs them."""

from __future__ import annotations

from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import Any, NamedTuple

from raysft.data.shards.manifest import Manifest
from raysft.data.shards.media_column import record_of
from raysft.data.sources.pickle_guard import read_table
from raysft.errors import RequestError, StorageFailed
from raysft.media.files import REMEDY, status
from raysft.storage.path import StoragePath
from raysft.storage.retry import retry_for

MOST = 10_000
"""About how many images of a set are looked at; with more, those of every n-th shard."""
MOST_REMOTE = 20
"""Images that are looked at in an object store, with a request for each."""
THREADS = 8


class Tokenized(NamedTuple):
    """An image that a shard lists."""

    location: str
    size: int
    shard: StoragePath
    position: int
    """Of the first example that has it."""


def check_media_files(manifests: Iterable[Manifest]) -> None:
    """Look at the images of sets that the cache had: each must be there, with the size that it had when it was tokenized.

    Whether its content is the same is known when it is read, just before its step.

    Raises:
        RequestError: an image is missing, or has another size.
    """
    for manifest in manifests:
        if not (manifest.reused and manifest.media):
            continue
        images = _images(manifest)
        # A storage that does not respond now is waited for when the images are read.
        with suppress(StorageFailed), ThreadPoolExecutor(THREADS) as pool:
            found = zip(images, pool.map(_fault, images), strict=True)
            faults = [(image, fault) for image, fault in found if fault]
            if faults:
                image, fault = faults[0]
                more = f" (and {len(faults) - 1:,} more of {len(images):,} images)" if faults[1:] else ""
                raise RequestError(
                    f"{record_of(image.shard, image.position)}: {StoragePath(image.location)}: {fault}{more}; {REMEDY}"
                )


def _images(manifest: Manifest) -> list[Tokenized]:
    """The images of a set that are to be looked at, each once."""
    images = dict[str, Tokenized]()
    for shard in manifest.shard_paths()[:: -(-manifest.media // MOST)]:
        table = read_table(shard, ["media"])
        lists: list[Any] = table["media"].to_pylist() if table.num_columns else []
        for position, media in enumerate(lists):
            for each in media or ():
                images.setdefault(each["location"], Tokenized(each["location"], each["size"], shard, position))
    local = [image for image in images.values() if StoragePath(image.location).local]
    remote = [image for image in images.values() if not StoragePath(image.location).local]
    return local + remote[:: -(-len(remote) // MOST_REMOTE) or 1]


def _fault(image: Tokenized) -> str:
    with retry_for(0):
        found = status(image.location)
    if found is None:
        return "no longer exists"
    return "" if found[0] == image.size else "has changed since it was tokenized"
