"""The unit of the shard cache: one split of one source, under a key that covers everything that decides its tokens."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

from raysft.config import Config, Source
from raysft.data.shards.manifest import FILE_NAME, mended_files
from raysft.data.sources.files import DataFile, find_files
from raysft.data.sources.holdout import is_held_out, limit_of_fraction
from raysft.data.sources.media import MediaOptions
from raysft.data.sources.registry import resolve_source
from raysft.data.sources.sampling import RandomSample, RecordSlice
from raysft.data.tokenization.tokenized_example import TokenizeOptions
from raysft.data.types import Example
from raysft.errors import StorageFailed, unreadable
from raysft.media.files import Identity
from raysft.models.fingerprint import tokenizer_fingerprint
from raysft.models.processor import has_processor
from raysft.storage.local_cache import local_copy
from raysft.storage.path import StoragePath

CACHE_VERSION = 13
"""Part of every key. Raise it when the same input would produce different shards."""
Split = Literal["all", "train", "holdout"]
"""Part of a source: all examples, or those on one side of ``data.holdout``."""


@dataclass(frozen=True)
class ShardSet:
    """One split of one source, tokenized with given options: the unit of the shard cache."""

    source: Source
    split: Split
    files: tuple[DataFile, ...]
    options: TokenizeOptions
    holdout: int | float
    """``data.holdout``."""
    limit: int
    """Hash of an opening below which an example is in the ``holdout`` split."""
    sample: RandomSample | RecordSlice | None
    """Random sample or slice of the source's records; None to take all of them in file order."""
    directory: StoragePath
    """Folder of the set in the cache, named by its key."""
    media: MediaOptions
    """Where its images are, and their sizes."""
    mended: str = ""
    """A file for which a record was rejected in an older set of the cache, and that holds something else now."""

    @property
    def manifest(self) -> StoragePath:
        """Path of the manifest, whose presence makes the set complete."""
        return self.directory / FILE_NAME

    @property
    def takes_prompts(self) -> bool:
        """True if it takes prompts without an answer: it is generated for, and no part of it is trained on."""
        return self.options.with_prompts and self.split == "all"

    def includes(self, example: Example) -> bool:
        """True if an example belongs to this split."""
        return self.split == "all" or (self.split == "holdout") == is_held_out(example, self.limit)


def records_identity(shards: ShardSet) -> dict[str, Any]:
    """Return everything that decides the records of a source and how they are read, as JSON."""
    return {
        "files": [(Path(file.path).name, file.identity) for file in shards.files],
        "source": shards.source.model_dump(mode="json", exclude={"path", "weight"}),
        "sample": asdict(shards.sample) if shards.sample else None,
    }


def resolve_shard_set(
    config: Config, source: Source, split: Split, model: str, with_prompts: bool, limit: int | None = None
) -> ShardSet:
    """Find the files of a source, and hash them with the tokenizer, the chat template and all options to a cache key.

    Args:
        config: the run's config.
        source: one of its sources; a source of the registry is looked up.
        split: which of its examples.
        model: folder or Hub id of the model whose tokenizer is used.
        with_prompts: also keep prompts and references, for generation.
        limit: hash of an opening below which examples are held out. Default: that of the fraction ``data.holdout``.

    Raises:
        RequestError: the source has no usable files or registry entry.
    """
    looked_up = source.path is None
    source = resolve_source(config, source)
    if source.max_examples is None:
        source = source.model_copy(update={"max_examples": config.data.max_examples})
    if limit is None:
        limit = limit_of_fraction(config.data.holdout)
    part = RecordSlice.of(source.slice) if source.slice else None
    options = TokenizeOptions.of(config, with_prompts)
    files = tuple(find_files(source))
    found = ShardSet(
        source=source,
        split=split,
        files=files,
        options=options,
        holdout=config.data.holdout,
        limit=limit,
        sample=RandomSample(source.num_samples, config.run.seed, part) if source.num_samples else part,
        directory=config.cache_directory / "shards",
        media=MediaOptions.of(config, _registry_folder(config) if looked_up and "://" not in files[0].uri else ""),
    )
    # Raw text is cut into rows only when rows are planned, so its shards serve every sequence length.
    decisive = asdict(options) if config.stage == "sft" else {"stage": "pt", "control_tokens": options.control_tokens}
    identity = {
        "version": CACHE_VERSION,
        **records_identity(found),
        "split": split,
        "limit": limit if split != "all" else 0,
        "options": decisive,
        "tokenizer": tokenizer_fingerprint(model),
        "template": config.chat_template,
    }
    takes_images = has_processor(local_copy(model))
    if takes_images:
        # Shards name the places of images. Those of text alone serve wherever their files lie.
        folders = sorted({StoragePath.of(file.uri).parent.location for file in files})
        identity["media"] = {**asdict(found.media), "folders": folders}
    found = _keyed(found, config, identity)
    # The set in the cache may lack records whose images have been added or corrected since.
    while takes_images and (mended := _mended(found)):
        found = replace(_keyed(found, config, [found.directory.name, mended]), mended=next(iter(mended)))
    return found


def _keyed(found: ShardSet, config: Config, identity: Any) -> ShardSet:
    """Name a set's folder by the hash of what decides its content."""
    key = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:24]
    return replace(found, directory=config.cache_directory / "shards" / f"{found.source.name}-{found.split}-{key}")


def _mended(found: ShardSet) -> dict[str, Identity]:
    try:
        return mended_files(found.manifest)
    except StorageFailed as error:
        raise unreadable(
            f"source {found.source.name!r}: {error}; check the storage and its credentials", error
        ) from None


def _registry_folder(config: Config) -> str:
    """The folder of ``data.registry``, in which LLaMA-Factory looks for images."""
    path = Path(config.data.registry or "")
    return str(path if path.is_dir() else path.parent)
