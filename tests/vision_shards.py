"""Shards of examples with images for tests, made with the model's processor alone."""

from __future__ import annotations

import hashlib
import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from raysft.data.shards.manifest import Manifest, Shard, load_manifest, save_manifest
from raysft.data.shards.media_column import MEDIA
from raysft.data.types import IGNORE_INDEX
from raysft.media.files import digest
from raysft.storage.path import StoragePath
from tests.tiny import SENTENCES

SIZES = ((28, 28), (56, 28), (40, 70), (84, 56))
"""Pixels of images: (width, height)."""


@dataclass(frozen=True)
class Seen:
    """A question about some images, and its answer."""

    images: tuple[Path, ...]
    before: str
    """Text in front of the images."""
    after: str
    answer: str


def draw(folder: Path, count: int, sizes: Sequence[tuple[int, int]] = SIZES) -> list[Path]:
    """Write images of noise of several sizes."""
    folder.mkdir(parents=True, exist_ok=True)
    random_pixels, files = np.random.default_rng(1), []
    for number in range(count):
        width, height = sizes[number % len(sizes)]
        files.append(folder / f"{number}.png")
        Image.fromarray(random_pixels.integers(0, 256, (height, width, 3), np.uint8)).save(files[-1])
    return files


def questions(files: Sequence[Path], without: int = 0) -> list[Seen]:
    """One question with one or two of the images for each file, then some without any."""
    words, draws = " ".join(SENTENCES).split(), random.Random(7)

    def text(most: int) -> str:
        return " ".join(draws.choices(words, k=draws.randint(1, most)))

    shown = [tuple(files[number : number + 1 + number % 3 // 2]) for number in range(len(files))]
    return [Seen(images, text(5), text(3), text(4)) for images in [*shown, *[()] * without]]


def ids_of(processor: Any, seen: Seen) -> tuple[list[int], int]:
    """Tokenize a question and its answer as the processor does; returns (ids, tokens of the prompt)."""
    pictures = [{"type": "image", "image": Image.open(file)} for file in seen.images]
    parts = [{"type": "text", "text": seen.before}, *pictures, {"type": "text", "text": seen.after}]
    prompt = [{"role": "user", "content": parts}]
    answer = {"role": "assistant", "content": [{"type": "text", "text": seen.answer}]}

    def encode(messages: list[Any], **options: Any) -> list[int]:
        made = processor.apply_chat_template(messages, tokenize=True, return_dict=True, **options)
        return np.asarray(made["input_ids"]).reshape(-1).tolist()

    return encode([*prompt, answer]), len(encode(prompt, add_generation_prompt=True))


def tokens_of_images(processor: Any, files: Sequence[Path]) -> list[list[int]]:
    """The tokens that a processor makes of each image of a text with all of them."""
    if not files:
        return []
    made = processor(
        text=[processor.image_token * len(files)],
        images=[[Image.open(file).convert("RGB") for file in files]],
        return_text_replacement_offsets=True,
    )
    return [list(processor.tokenizer(each["replacement"])["input_ids"]) for each in made["text_replacement_offsets"][0]]


def spans_of(processor: Any, seen: Seen, ids: Sequence[int]) -> list[tuple[int, int]]:
    """Find the tokens that stand for each image."""
    spans, start = [], 0
    for wanted in tokens_of_images(processor, seen.images):
        begins = next(at for at in range(start, len(ids)) if list(ids[at : at + len(wanted)]) == wanted)
        start = begins + len(wanted)
        spans.append((begins, start))
    return spans


def written_with_images(folder: Path, processor: Any, examples: Sequence[Seen], name: str = "d") -> Manifest:
    """Write the shard and the manifest of examples."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = []
    for number, seen in enumerate(examples):
        ids, prompt = ids_of(processor, seen)
        media = [
            {
                "kind": "image",
                "location": str(file),
                "digest": digest(file.read_bytes()),
                "width": Image.open(file).size[0],
                "height": Image.open(file).size[1],
                "start": start,
                "stop": stop,
                "size": file.stat().st_size,
            }
            for file, (start, stop) in zip(seen.images, spans_of(processor, seen, ids), strict=True)
        ]
        labels = [IGNORE_INDEX] * prompt + ids[prompt:]
        rows.append({"input_ids": ids, "labels": labels, "source": name, "record": f"f:{number + 1}", "media": media})
    schema = pa.schema(
        [
            ("input_ids", pa.list_(pa.int32())),
            ("labels", pa.list_(pa.int32())),
            ("source", pa.string()),
            ("record", pa.string()),
            ("media", MEDIA),
        ]
    )
    table = pa.Table.from_pylist(rows, schema)
    media = sum(len(row["media"]) for row in rows)
    pq.write_table(table if media else table.drop_columns("media"), folder / "s.parquet")
    shard = Shard(
        name="s.parquet",
        records=len(rows),
        lengths=np.array([len(row["input_ids"]) for row in rows], np.int32),
        loss_tokens=np.array([sum(label >= 0 for label in row["labels"][1:]) for row in rows], np.int32),
        weights=np.ones(len(rows), np.float32),
        rejected=(),
        dropped=(),
        longest_dropped=0,
        counts={},
        largest_token=(max(max(row["input_ids"]) for row in rows), "f:1"),
        turns=Counter(),
        formats=("openai",),
        digests=np.frombuffer(b"".join(hashlib.md5(str(row).encode()).digest() for row in rows), np.uint64).reshape(
            -1, 2
        ),
        media=media,
    )
    path = StoragePath(str(folder / "manifest.parquet"))
    save_manifest(path, name, [shard])
    return load_manifest(path)
