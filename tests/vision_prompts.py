"""Questions about pictures for tiny models: as their processors write them, and as a file of prompts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from raysft.data.shards.media_column import MEDIA
from raysft.data.types import TokenizedMedium
from raysft.media.files import digest
from tests.vision_shards import tokens_of_images

SIZES = {"wide": (84, 56), "tall": (32, 90), "small": (28, 28), "other": (61, 47)}
ASKED: list[list[str]] = [
    ["<wide>", "What is it?"],
    ["Hi"],
    ["Compare ", "<small>", " with ", "<tall>", ", please: which of the two is the larger one, and why?"],
    ["<other>"],
    ["a list of three"],
    ["<tall>", "<wide>"],
]
"""The parts of each question; pictures are named."""


def draw(folder: Path) -> dict[str, Path]:
    """Draw pictures of random pixels; returns their files by name."""
    numbers = np.random.default_rng(0)
    for name, (width, height) in SIZES.items():
        Image.fromarray(numbers.integers(0, 256, (height, width, 3), np.uint8)).save(folder / f"{name}.png")
    return {name: folder / f"{name}.png" for name in SIZES}


def conversation(pictures: dict[str, Path], parts: Sequence[str]) -> list[dict[str, Any]]:
    """A question as transformers takes it."""
    content = [
        {"type": "image", "image": Image.open(pictures[part[1:-1]])}
        if part.startswith("<")
        else {"type": "text", "text": part}
        for part in parts
    ]
    return [{"role": "user", "content": content}]


def tokenized(
    processor: Any, pictures: dict[str, Path], parts: Sequence[str]
) -> tuple[list[int], list[TokenizedMedium]]:
    """Tokens of a question as the processor makes them, and where its pictures stand."""
    names = [part[1:-1] for part in parts if part.startswith("<")]
    asked = conversation(pictures, parts)
    images = tokens_of_images(processor, [pictures[name] for name in names])
    ids: list[int] = []
    media = []
    for number, piece in enumerate(rendered(processor, pictures, parts).split(processor.image_token)):
        if number:
            path, tokens = pictures[names[number - 1]], images[number - 1]
            place = len(ids), len(ids) + len(tokens)
            media.append(TokenizedMedium("image", str(path), digest(path.read_bytes()), *SIZES[path.stem], *place))
            ids += tokens
        ids += processor.tokenizer.encode(piece, add_special_tokens=False)
    whole = processor.apply_chat_template(asked, add_generation_prompt=True, tokenize=True, return_dict=True)
    assert [ids] == whole["input_ids"]
    assert len(media) == len(names)
    return ids, media


def rendered(processor: Any, pictures: dict[str, Path], parts: Sequence[str]) -> str:
    """A question as the chat template writes it, with one token for each picture."""
    return processor.apply_chat_template(conversation(pictures, parts), add_generation_prompt=True)


def write_prompts_file(path: Path, processor: Any, pictures: dict[str, Path], tags: int = 0) -> Path:
    """Write the questions as a file of prompts; the place of a picture has so many tags before and after its tokens."""
    rows = []
    for number, parts in enumerate(ASKED):
        ids, media = tokenized(processor, pictures, parts)
        rows.append(
            {
                "id": f"q:{number}",
                "source": "s",
                "prompt": rendered(processor, pictures, parts),
                "input_ids": ids,
                "label": "a picture",
                "media": [asdict(replace(each, start=each.start - tags, stop=each.stop + tags)) for each in media],
            }
        )
    text = pa.string()
    columns = {"id": text, "source": text, "prompt": text, "input_ids": pa.list_(pa.int32()), "label": text}
    schema = pa.schema({**columns, "media": MEDIA})
    pq.write_table(pa.Table.from_pylist(rows, schema=schema), path)
    return path
