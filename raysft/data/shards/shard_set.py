"""The unit of the shard cache: one split of one source, under a key that covers everything that decides its tokens."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

from raysft.config import Config, Source
from raysft.data.sources.files import DataFile, find_files
from raysft.data.sources.holdout import is_held_out
from raysft.data.sources.registry import resolve_source
from raysft.data.sources.sampling import RandomSample
from raysft.data.tokenization.tokenized_example import TokenizeOptions
from raysft.data.types import Example
from raysft.models.fingerprint import tokenizer_fingerprint
from raysft.storage.path import StoragePath

CACHE_VERSION = 6
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
    holdout: float
    """Fraction of the source in the ``holdout`` split."""
    sample: RandomSample | None
    """Random sample of the source's records; None to take them in file order."""
    directory: StoragePath
    """Folder of the set in the cache, named by its key."""

    @property
    def manifest(self) -> StoragePath:
        """Path of the manifest, whose presence makes the set complete."""
        return self.directory / "manifest.parquet"

    def includes(self, example: Example) -> bool:
        """True if an example belongs to this split."""
        return self.split == "all" or (self.split == "holdout") == is_held_out(example, self.holdout)


def resolve_shard_set(config: Config, source: Source, split: Split, model: str, with_prompts: bool) -> ShardSet:
    """Find the files of a source, and hash them with the tokenizer, the chat template and all options to a cache key.

    Args:
        config: the run's config.
        source: one of its sources; a source of the registry is looked up.
        split: which of its examples.
        model: folder or hub ID of the model whose tokenizer is used.
        with_prompts: also keep prompts and references, for generation.

    Raises:
        RequestError: the source has no usable files or registry entry.
    """
    source = resolve_source(config, source)
    files = tuple(find_files(source))
    options = TokenizeOptions.of(config, with_prompts)
    sample = RandomSample(source.num_samples, config.run.seed) if source.num_samples else None
    # Raw text is cut into rows only when rows are planned, so its shards serve every sequence length.
    decisive = asdict(options) if config.stage == "sft" else {"stage": "pt", "control_tokens": options.control_tokens}
    identity = {
        "version": CACHE_VERSION,
        "files": [(Path(file.path).name, file.identity) for file in files],
        "source": source.model_dump(mode="json", exclude={"path", "weight"}),
        "split": split,
        "holdout": config.data.holdout if split != "all" else 0,
        "options": decisive,
        "tokenizer": tokenizer_fingerprint(model),
        "template": config.chat_template,
        "sample": asdict(sample) if sample else None,
    }
    key = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:24]
    return ShardSet(
        source=source,
        split=split,
        files=files,
        options=options,
        holdout=config.data.holdout,
        sample=sample,
        directory=config.cache_directory / "shards" / f"{source.name}-{split}-{key}",
    )
