"""Training and generation with images on a GPU: as on a CPU, however rows are packed and workers hold the weights."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForImageTextToText

from raysft.config import parse
from raysft.data.rows.packed_dataset import PackedDataset
from raysft.generate.engines import create_engine
from raysft.models.attention import EXAMPLEWISE
from raysft.models.transformers_internals import attention_implementation
from raysft.train.finetuning import load_model
from raysft.train.loss import TokenLoss
from raysft.train.pixels import ImageInputs, Pixels
from raysft.train.step import microbatches
from tests.tiny_vision import tiny_processor, tiny_vision_model
from tests.training import Case, Result, make_config, train, train_all
from tests.vision_prompts import ASKED, conversation, tokenized
from tests.vision_prompts import draw as draw_pictures
from tests.vision_shards import draw, questions, written_with_images

FAMILIES = ("llava", "idefics3", "qwen2.5-vl", "qwen3-vl")
TRAINED = ("llava", "qwen3-vl")
FLOAT32, BFLOAT16 = 1e-4, 2e-2
"""Relative tolerances. Kernels of a GPU add in another order than those of a CPU; bfloat16 has 8 bits."""
ROWS, TOKENS, STEPS, NEW_TOKENS = 4, 256, 3, 10
ALL = ["language", "projector", "vision"]
WAYS: dict[str, dict[str, Any]] = {
    "ZeRO 0": {},
    "ZeRO 2": {"zero_stage": 2},
    "ZeRO 3": {"zero_stage": 3},
    "recomputed": {"gradient_checkpointing": True},
    "microbatches of 1": {"micro_batch_size": 1},
}


@dataclass(frozen=True)
class Family:
    """A tiny model with questions about images."""

    folder: Path
    model: Path
    processor: Any
    packed: PackedDataset
    single: PackedDataset
    """The same examples, each in a row of its own."""


@pytest.fixture(scope="module")
def families(device, tmp_path_factory) -> dict[str, Family]:
    made = {}
    for name in FAMILIES:
        folder = tmp_path_factory.mktemp(name)
        model, processor = tiny_vision_model(folder / "model", name), tiny_processor(name)
        seen = questions(draw(folder / "images", 14), without=6)
        manifest = (written_with_images(folder / "set", processor, seen).path.location,)
        packed = PackedDataset(manifest, TOKENS, ROWS, seed=3, epochs=3, max_steps=STEPS)
        single = PackedDataset(manifest, TOKENS, ROWS, layout="single", shuffle=False)
        made[name] = Family(folder, model, processor, packed, single)
    return made


def dtypes(device: str) -> dict[str, float]:
    """The types to compute in, each with its tolerance; bfloat16 is slow on most CPUs."""
    return {"float32": FLOAT32} if device == "cpu" else {"float32": FLOAT32, "bfloat16": BFLOAT16}


def config_of(family: Family, device: str, dtype: str, settings: dict[str, Any] | None = None, **options: Any) -> Any:
    settings = {
        "model.dtype": dtype,
        "model.train_parts": ALL,
        "data.sequence_length": TOKENS,
        "scaling.use_gpu": device == "cuda",
        **(settings or {}),
    }
    return make_config(
        family.folder, family.model, settings,
        **{"micro_batch_size": ROWS, "eval_at_start": False, "max_steps": STEPS, **options},
    )  # fmt: skip


@torch.no_grad()
def loss_over(model: TokenLoss, family: Family, rows: PackedDataset, device: str) -> tuple[float, int]:
    """Return the sum of the losses of all rows, and the number of their images."""
    total, images, count = 0.0, 0, rows.row_plan.rows
    steps = [np.arange(first, min(first + ROWS, count)) for first in range(0, count, ROWS)]
    with Pixels(rows, ROWS) as pixels:
        pixels.begin(ImageInputs(family.processor, model.model))
        for batch in pixels.along(map(rows.batch, steps)):
            images += sum(map(len, batch.get("media", ())))
            for part in microbatches(batch, ROWS, torch.device(device), pixels):
                total += float(model(**part)[0])
    return total, images


@pytest.mark.parametrize("name", FAMILIES)
def test_packed_rows_have_the_loss_of_single_examples(device, families, name):
    family = families[name]
    for dtype, tolerance in dtypes(device).items():
        config = config_of(family, device, dtype)
        whole: Any = load_model(config, str(family.model), torch.device(device)).to(device).eval()
        decoder, tower = (attention_implementation(part) for part in (whole.get_decoder(), whole.get_encoder("image")))
        print(f"{name}, {dtype}: text {decoder}, tower {tower}")
        assert (decoder == EXAMPLEWISE) == (device == "cpu")
        assert tower != EXAMPLEWISE, "an image has no examples to keep apart"
        model = TokenLoss(whole)
        packed, images = loss_over(model, family, replace(family.single, layout="packed"), device)
        alone, same = loss_over(model, family, family.single, device)
        print(f"packed {packed:.6f}, alone {alone:.6f}")
        assert images == same > 14
        assert packed == pytest.approx(alone, rel=tolerance)


@pytest.fixture(scope="module")
def trained(device, families) -> dict[tuple[str, str, str], Result]:
    """(family, dtype, way) → its training of all parts."""
    cases = {
        (name, dtype, way): Case(
            config_of(families[name], device, dtype, **options),
            families[name].packed,
        )
        for name in TRAINED
        for dtype in dtypes(device)
        for way, options in WAYS.items()
    }
    return dict(zip(cases, train_all(list(cases.values()), device=device), strict=True))


def differs(one: Result, other: Result) -> float:
    """The largest relative difference of the losses."""
    assert not one.failure + other.failure
    a, b = np.asarray(one.losses), np.asarray(other.losses)
    assert len(a) == len(b) == STEPS
    return float((np.abs(a - b) / np.abs(b)).max())


@pytest.mark.parametrize("way", list(WAYS)[1:])
@pytest.mark.parametrize("name", TRAINED)
def test_the_way_it_is_split_changes_no_loss(device, trained, name, way):
    for dtype, tolerance in dtypes(device).items():
        difference = differs(trained[name, dtype, way], trained[name, dtype, "ZeRO 0"])
        print(f"{name}, {dtype}, {way} beside ZeRO 0: losses differ by {difference:.1e}")
        assert difference < tolerance


@pytest.mark.parametrize("name", TRAINED)
def test_float32_is_that_of_a_cpu_and_bfloat16_is_rounded(device, families, trained, name):
    if device == "cpu":
        pytest.skip("needs a GPU")
    on_cpu = train(config_of(families[name], "cpu", "float32"), families[name].packed)
    assert differs(trained[name, "float32", "ZeRO 0"], on_cpu) < FLOAT32
    assert differs(trained[name, "bfloat16", "ZeRO 0"], on_cpu) < BFLOAT16


@pytest.mark.parametrize("name", TRAINED)
def test_liger_changes_no_loss_by_more_than_rounding(device, families, trained, name):
    if device == "cpu" or importlib.util.find_spec("liger_kernel") is None:
        pytest.skip("needs a GPU and liger_kernel")
    config = config_of(families[name], device, "bfloat16", {"model.liger": True})
    (fused,) = train_all([Case(config, families[name].packed)], device=device)
    assert differs(fused, trained[name, "bfloat16", "ZeRO 0"]) < 2 * BFLOAT16


@pytest.mark.parametrize("name", FAMILIES)
def test_predictions_are_those_of_the_processors_batch(device, families, name, tmp_path):
    family, pictures = families[name], draw_pictures(tmp_path)
    made = [tokenized(family.processor, pictures, parts) for parts in ASKED]
    settings = {"max_new_tokens": NEW_TOKENS, "do_sample": False, "skip_special_tokens": False, "batch_size": 3}
    config = parse(
        {
            "model": {"path": str(family.model), "dtype": "float32"},
            "data": {"train": [{"name": "a", "path": "a"}]},
            "scaling": {"use_gpu": device == "cuda"},
            "generate": settings,
        }
    )
    engine: Any = create_engine(config, str(family.model))
    ids = [f"q:{number}" for number in range(len(made))]
    found = engine.complete(ids, [each[0] for each in made], [each[1] for each in made])
    batch = family.processor.apply_chat_template(
        [conversation(pictures, parts) for parts in ASKED],
        add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt",
        processor_kwargs={"padding": True, "padding_side": "left"},
    ).to(device)  # fmt: skip
    plain: Any = AutoModelForImageTextToText.from_pretrained(family.model, dtype=torch.float32).to(device).eval()
    with torch.inference_mode():
        written = plain.generate(**batch, max_new_tokens=NEW_TOKENS, do_sample=False)[:, batch["input_ids"].shape[1] :]
    tokenizer, end = family.processor.tokenizer, family.processor.tokenizer.eos_token_id
    rows = [row[: row.index(end)] if end in row else row for row in written.tolist()]
    assert [each.text for each in found] == [tokenizer.decode(row) for row in rows]
    assert not any(each.error for each in found)
