"""Tokenized shards for tests, written in this process without Ray."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from raysft.config import Config, parse
from raysft.data.shards.manifest import Manifest, load_manifest, save_manifest
from raysft.data.shards.ray_pipeline import record_batches
from raysft.data.shards.shard_set import ShardSet, Split, resolve_shard_set
from raysft.data.shards.shard_writer import write_shards
from raysft.data.tokenization.tokenize import ExampleTokenizer
from raysft.data.tokenization.tokenized_example import TokenizeOptions
from raysft.data.tokenization.tokenizer import Tokenizer


def example_tokenizer(folder: str, **options: Any) -> ExampleTokenizer:
    """Tokenize conversations with the tokenizer of a folder, in rows of 64 tokens where nothing else is said."""
    return ExampleTokenizer(Tokenizer.load(folder), tokenize_options(**options))


def tokenize_options(**options: Any) -> TokenizeOptions:
    """Options with defaults for tests."""
    defaults: dict[str, Any] = {
        "stage": "sft",
        "sequence_length": 64,
        "mask_history": False,
        "train_on_prompt": False,
        "on_overflow": "error",
        "keep_prompt": "head",
        "control_tokens": "keep",
        "template_options": {},
        "default_system": None,
        "thinking": "template",
        "with_prompts": False,
    }
    return TokenizeOptions(**{**defaults, **options})


def write_records(path: Path, records: Sequence[Any]) -> None:
    """Write one JSON record per line."""
    path.write_text("".join(json.dumps(record) + "\n" for record in records))


def data_config(folder: Path, names: Sequence[str] = ("a",), stage: str = "sft", **data: Any) -> Config:
    """A config whose sources are ``{name}.jsonl`` in ``folder``, which also holds the cache."""
    sources = [{"name": name, "path": str(folder / f"{name}.jsonl")} for name in names]
    return parse(
        {
            "stage": stage,
            "run": {"storage": str(folder)},
            "model": {"path": "m"},
            "data": {"train": sources, "sequence_length": 64, **data},
        }
    )


def the_set(config: Config, model: str, source: int = 0, split: Split = "all", with_prompts: bool = False) -> ShardSet:
    """The shard set of one training source."""
    return resolve_shard_set(config, config.data.train[source], split, model, with_prompts)


def written(each: ShardSet, model: str, template: str | None = None) -> Manifest:
    """Tokenize a set in this process, and return its manifest."""
    tokenizer = Tokenizer.load(model, template)
    shards = [
        shard
        for records in record_batches(each.files, each.source.max_examples, each.sample)
        for shard in write_shards([each], records, tokenizer)
    ]
    save_manifest(each.manifest, each.source.name, shards)
    return load_manifest(each.manifest)
