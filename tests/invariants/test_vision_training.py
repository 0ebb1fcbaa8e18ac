"""Training on images: as a plain loop over the processor's own batches of single examples, however rows and workers split it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from transformers import AutoModelForImageTextToText, get_scheduler

from raysft.data.rows.packed_dataset import PackedDataset
from raysft.train import finetuning as loading
from raysft.train import loss
from raysft.train.loss import TokenLoss
from raysft.train.pixels import ImageInputs, Pixels
from raysft.train.step import microbatches
from tests.tiny_vision import FAMILIES, TILED, tiny_gemma3, tiny_processor, tiny_vision_model
from tests.training import Case, Result, adamw, assert_same, make_config, train_all
from tests.vision_shards import Seen, draw, ids_of, questions, written_with_images
from tests.vision_training import assert_as_plain, is_language, weights_of

CPU = torch.device("cpu")
STEPS, TOKENS = 3, 256


@dataclass(frozen=True)
class Family:
    """A model with data."""

    folder: Path
    model: Path
    processor: Any
    seen: Sequence[Seen]
    rows: PackedDataset
    mixed: PackedDataset
    """Rows of one example each: in every step one half has images and the other has none, or none has any, or one is alone."""
    mixed_seen: Sequence[Seen]


def make_family(folder: Path, name: str) -> Family:
    model, processor = tiny_vision_model(folder / "model", name), tiny_processor(name)
    seen = questions(draw(folder / "images", 14), without=6)
    manifest = written_with_images(folder / "set", processor, seen)
    rows = PackedDataset((manifest.path.location,), TOKENS, 4, seed=3, epochs=3, max_steps=STEPS)
    shown, silent = iter(seen), iter(seen[14:] * 2)
    order = [next(shown if image == "I" else silent) for image in "IITTTTIITTTTI"]
    manifest = written_with_images(folder / "mixed", processor, order)
    mixed = PackedDataset((manifest.path.location,), TOKENS, 4, layout="single", shuffle=False)
    shown = [[any(batch.get("media", ())) for batch in mixed.steps(0, worker, 2)] for worker in range(2)]
    assert shown == [[True, False, False, True], [False, True, False, False]]
    packed = [batch["media"] for batch in rows.steps(0, 0, 1)]
    assert any(len(media) > 2 for batch in packed for media in batch), "a row has several images"
    return Family(folder, model, processor, seen, rows, mixed, order)


def case(family: Family, settings: dict[str, Any] | None = None, **options: Any) -> Case:
    """A training of a family, which evaluates on its first rows."""
    defaults = {"micro_batch_size": 4, "eval_at_start": False, "max_steps": STEPS}
    settings = {"data.sequence_length": TOKENS, **(settings or {})}
    config = make_config(family.folder, family.model, settings, **{**defaults, **options})
    return Case(config, family.rows, eval_rows=replace(family.rows, max_steps=1))


def mixed_case(family: Family, parts: Sequence[str], **options: Any) -> Case:
    """A training on rows of which some have images, which evaluates on them all."""
    settings = {"model.train_parts": list(parts), "data.packing": False, "train.deepspeed": PARTITION_ALL}
    made = case(family, settings, max_steps=None, **options)
    return replace(made, rows=family.mixed, eval_rows=family.mixed)


PARTITION_ALL = {"zero_optimization": {"stage3_param_persistence_threshold": 0}}
ALL, TOWERS, LANGUAGE = ("language", "projector", "vision"), ("projector", "vision"), ("language",)
SPLIT: list[tuple[str, tuple[str, ...], dict[str, Any]]] = [
    *(("llava", ALL, {"zero_stage": stage}) for stage in range(4)),
    ("llava", ALL, {"zero_stage": 3, "micro_batch_size": 1}),
    ("llava", LANGUAGE, {"zero_stage": 3}),
    ("llava", LANGUAGE, {"zero_stage": 2}),
    ("llava", TOWERS, {"zero_stage": 2}),
    ("llava", TOWERS, {"zero_stage": 3, "gradient_checkpointing": True}),
    ("idefics3", ALL, {"zero_stage": 3}),
    ("qwen2.5-vl", ALL, {"zero_stage": 3}),
    ("qwen3-vl", ALL, {"zero_stage": 2}),
    ("qwen3-vl", ALL, {"zero_stage": 3}),
    ("llava-onevision", ALL, {"zero_stage": 3}),
]
"""(family, trained parts, settings of two workers), compared with one worker."""
WAYS = {
    "full": {},
    "rows one by one": {"micro_batch_size": 1},
}
SOME = ("llava", "qwen3-vl")
OTHERS = {
    "lora": {"finetuning": "lora"},
    "dft": {"loss": "dft"},
    "asft": {"loss": "asft", "asft_alpha": 1.0},
    "faint noise": {"neftune_alpha": 1e-7},
    "noise": {"neftune_alpha": 5.0},
}


@pytest.fixture(scope="module")
def families(tmp_path_factory) -> dict[str, Family]:
    return {name: make_family(tmp_path_factory.mktemp(name), name) for name in (*FAMILIES, *TILED)}


@pytest.fixture(scope="module")
def trained(families) -> dict[tuple[str, str], Result]:
    """(family, way) → its training with one worker."""
    cases = {(name, way): case(families[name], **WAYS[way]) for name in (*FAMILIES, *TILED) for way in WAYS}
    cases |= {(name, way): case(families[name], **OTHERS[way]) for name in SOME for way in OTHERS}
    return dict(zip(cases, train_all(list(cases.values())), strict=True))


def plain_loss(model: Any, family: Family, rows: np.ndarray) -> torch.Tensor:
    """The mean loss of some rows, of each example as the processor and transformers have it alone."""
    total, count = torch.zeros(()), 0
    for row in rows.tolist():
        for record in family.rows.records(row) if row >= 0 else ():
            seen = family.seen[int(record.rsplit(":", 1)[1]) - 1]
            parts = [{"type": "image", "image": Image.open(file)} for file in seen.images]
            text = [{"type": "text", "text": seen.before}], [{"type": "text", "text": seen.after}]
            messages = [
                {"role": "user", "content": [*text[0], *parts, *text[1]]},
                {"role": "assistant", "content": [{"type": "text", "text": seen.answer}]},
            ]
            batch = family.processor.apply_chat_template(
                [messages], tokenize=True, return_dict=True, return_tensors="pt"
            )
            logits = model(**batch, use_cache=False).logits[0].float()
            answer = ids_of(family.processor, seen)[1]
            targets = batch["input_ids"][0, answer:]
            total = total + F.cross_entropy(logits[answer - 1 : -1], targets, reduction="sum")
            count += len(targets)
    return total / count


def plain_training(
    model: Any, family: Family, trains: Sequence[str], steps: int = STEPS
) -> tuple[list[float], list[float], dict[str, Any]]:
    """Train with a loop over single examples; returns losses, norms of gradients and weights."""
    for name, weight in model.named_parameters():
        weight.requires_grad_(name in trains)
    model.train()
    optimizer = adamw(model)
    schedule = get_scheduler("cosine", optimizer, num_warmup_steps=0, num_training_steps=steps)
    losses, norms = [], []
    for step in range(steps):
        loss = plain_loss(model, family, family.rows.rows_for_rank(step, 0, 1))
        if loss.requires_grad:  # towers alone, without images
            loss.backward()
        norms.append(float(torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)))
        optimizer.step()
        schedule.step()
        optimizer.zero_grad(set_to_none=False)  # without images, gradients of towers are 0
        losses.append(loss.item())
    return losses, norms, {name: weight.detach().numpy() for name, weight in model.named_parameters()}


@pytest.mark.parametrize("name", [*FAMILIES, *TILED])
def test_training_equals_a_plain_loop_over_the_processors_batches(families, trained, name):
    result, family = trained[name, "full"], families[name]
    plain = AutoModelForImageTextToText.from_pretrained(family.model)
    begun = weights_of(plain)
    language = [weight for weight in begun if is_language(weight)]
    assert_as_plain(result, plain_training(plain, family, language), begun, language)


@pytest.mark.parametrize("name", [*FAMILIES, *TILED])
def test_the_way_it_is_split_changes_nothing(trained, name):
    result, full = trained[name, "rows one by one"], trained[name, "full"]
    assert not result.failure
    assert_same(result[:4], full[:4])


@pytest.mark.parametrize("name", SOME)
def test_adapters_are_trained_on_images(trained, name):
    lora, full = trained[name, "lora"], trained[name, "full"]
    assert not lora.failure
    assert lora.losses[0] == pytest.approx(full.losses[0], rel=1e-5)
    assert lora.losses[-1] < lora.losses[0]


@pytest.mark.parametrize("name", SOME)
def test_kernels_that_take_one_long_row_give_the_same_loss(families, name, monkeypatch):
    """As FlashAttention's, which has no CPU kernel: rows are laid end to end, and their images and positions with them."""
    family = families[name]
    model = loading.load_model(case(family).config, str(family.model))
    images = ImageInputs(family.processor, model)
    with Pixels(family.rows, 4) as pixels:
        pixels.begin(images)
        (batch,) = pixels.along([family.rows.batch(range(4))])
        (part,) = microbatches(batch, 4, CPU, pixels)
    assert len(part["images"]["pixel_values"]) > 2
    with torch.no_grad():
        rows = TokenLoss(model)(**part)[0]
        monkeypatch.setattr(loss, "is_varlen", lambda decoder: True)
        one_row = TokenLoss(model)(**part)[0]
    torch.testing.assert_close(one_row, rows, rtol=1e-5, atol=1e-5)


@pytest.fixture(scope="module")
def split(families) -> list[tuple[Result, Result]]:
    """For each of ``SPLIT`` the results of one worker and of two."""
    alone = list(dict.fromkeys((name, parts) for name, parts, _ in SPLIT))
    one = train_all([mixed_case(families[name], parts, micro_batch_size=4) for name, parts in alone])
    two = train_all(
        [mixed_case(families[name], parts, **{"micro_batch_size": 2, **way}) for name, parts, way in SPLIT], 2
    )
    known = dict(zip(alone, one, strict=True))
    return [(known[name, parts], both) for (name, parts, _), both in zip(SPLIT, two, strict=True)]


@pytest.mark.parametrize("number", range(len(SPLIT)), ids=[str(way) for way in SPLIT])
def test_workers_of_which_one_has_no_image_train_as_one_worker_does(split, number):
    one, two = split[number]
    assert [one.failure, two.failure] == ["", ""]
    assert len(one.losses) == 4
    assert_same(one[:4], two[:4])


@pytest.mark.parametrize(("name", "parts"), list(dict.fromkeys((name, parts) for name, parts, _ in SPLIT)))
def test_the_named_parts_alone_are_trained_as_in_a_plain_loop(families, split, name, parts):
    one = next(
        one for (other, trains, _), (one, _) in zip(SPLIT, split, strict=True) if (other, trains) == (name, parts)
    )
    family = families[name]
    plain = AutoModelForImageTextToText.from_pretrained(family.model)
    begun = weights_of(plain)
    wanted = [weight for weight in begun if is_language(weight) == (parts == LANGUAGE) or parts == ALL]
    mixed = replace(family, rows=family.mixed, seen=family.mixed_seen)
    assert_as_plain(one, plain_training(plain, mixed, wanted, steps=4), begun, wanted)


@pytest.mark.parametrize("name", SOME)
def test_a_reference_is_given_the_images_too(trained, name):
    """In the first step it is the model that is trained, so that its term of the loss is 0."""
    asft, dft = trained[name, "asft"], trained[name, "dft"]
    assert [asft.failure, dft.failure] == ["", ""]
    assert asft.losses[0] == pytest.approx(dft.losses[0], rel=1e-5)
    assert asft.losses[-1] != pytest.approx(dft.losses[-1], rel=1e-3)


@pytest.mark.parametrize("name", SOME)
def test_noise_is_added_to_embeddings_beside_images(trained, name):
    full, faint, noise = (trained[name, way] for way in ("full", "faint noise", "noise"))
    assert [faint.failure, noise.failure] == ["", ""]
    assert_same(full[:4], faint[:4])
    assert noise.losses[0] != pytest.approx(full.losses[0], rel=1e-3)


def test_a_training_resumes_bit_for_bit(families, split):
    """Also with pixels that were made for steps that a killed worker never took."""
    family, keep = families["qwen2.5-vl"], families["qwen2.5-vl"].folder / "kept"
    made = mixed_case(family, ALL, micro_batch_size=1, save_every_steps=2)
    whole, second = train_all([replace(made, keep=keep), replace(made, resume=keep / "checkpoint_2")])
    assert [whole.failure, second.failure] == ["", ""]
    assert second.losses == whole.losses[2:]
    assert all(np.array_equal(second.weights[name], value) for name, value in whole.weights.items())


def test_a_file_that_changed_since_it_was_tokenized_ends_the_training(families, tmp_path):
    files = draw(tmp_path / "images", 2)
    manifest = written_with_images(tmp_path / "set", families["llava"].processor, questions(files[:1]))
    rows = PackedDataset((manifest.path.location,), TOKENS, 1, layout="single")
    files[0].write_bytes(files[1].read_bytes())
    options = {"data.packing": False}
    changed = replace(case(families["llava"], options, global_batch_size=1, micro_batch_size=1), rows=rows)
    (result,) = train_all([changed])
    assert result.failure.startswith(f"d: f:1: {files[0]}: has changed since it was tokenized; restore it")
    assert not result.losses


@pytest.fixture(scope="module", params=[32, TOKENS], ids=["narrow window", "window of a row"])
def gemma(tmp_path_factory, request) -> Family:
    folder = tmp_path_factory.mktemp("gemma3")
    model, processor = tiny_gemma3(folder / "model", request.param)
    seen = questions(draw(folder / "images", 6), without=2)
    manifest = written_with_images(folder / "set", processor, seen)
    rows = PackedDataset((manifest.path.location,), TOKENS, 4, seed=3, epochs=3, max_steps=STEPS, layout="single")
    return Family(folder, model, processor, seen, rows, rows, seen)


def test_gemma3_trains_on_images_unless_rows_are_packed(gemma):
    """Its tokens of an image attend to each other both ways, in packed rows also to those of other examples."""
    alone, packed = train_all([case(gemma, {"data.packing": packing}) for packing in (False, True)])
    assert not alone.failure
    assert packed.failure.startswith(
        "Gemma3ForConditionalGeneration does not keep the examples of a row apart if they have"
    )
    assert packed.failure.endswith("; set data.packing=false")
    plain = AutoModelForImageTextToText.from_pretrained(gemma.model)
    language = [weight for weight, _ in plain.named_parameters() if is_language(weight)]
    losses, norms, _ = plain_training(plain, gemma, language)
    np.testing.assert_allclose(alone.losses, losses, rtol=1e-5)
    np.testing.assert_allclose(alone.norms, norms, rtol=1e-4)
