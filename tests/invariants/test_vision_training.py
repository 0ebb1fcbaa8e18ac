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
from tests.tiny_vision import FAMILIES, tiny_processor, tiny_vision_model
from tests.training import Case, Result, adamw, assert_same, make_config, train_all
from tests.vision_shards import Seen, draw, ids_of, questions, written_with_images

STEPS, TOKENS = 3, 256


@dataclass(frozen=True)
class Family:
    """A model with data."""

    folder: Path
    model: Path
    processor: Any
    seen: Sequence[Seen]
    rows: PackedDataset


def make_family(folder: Path, name: str) -> Family:
    model, processor = tiny_vision_model(folder / "model", name), tiny_processor(name)
    seen = questions(draw(folder / "images", 14), without=6)
    manifest = written_with_images(folder / "set", processor, seen)
    rows = PackedDataset((manifest.path.location,), TOKENS, 4, seed=3, epochs=3, max_steps=STEPS)
    return Family(folder, model, processor, seen, rows)


def case(family: Family, settings: dict[str, Any] | None = None, **options: Any) -> Case:
    """A training of a family, which evaluates on its first rows."""
    defaults = {"micro_batch_size": 4, "eval_at_start": False, "max_steps": STEPS}
    settings = {"data.sequence_length": TOKENS, **(settings or {})}
    config = make_config(family.folder, family.model, settings, **{**defaults, **options})
    return Case(config, family.rows, eval_rows=replace(family.rows, max_steps=1))


WAYS = {
    "full": {},
    "rows one by one": {"micro_batch_size": 1},
    "lora": {"finetuning": "lora"},
}


@pytest.fixture(scope="module")
def families(tmp_path_factory) -> dict[str, Family]:
    return {name: make_family(tmp_path_factory.mktemp(name), name) for name in FAMILIES}


@pytest.fixture(scope="module")
def trained(families) -> dict[tuple[str, str], Result]:
    """(family, way) → its training with one worker."""
    cases = {(name, way): case(families[name], **WAYS[way]) for name in FAMILIES for way in WAYS}
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
    model: Any, family: Family, trains: Sequence[str]
) -> tuple[list[float], list[float], dict[str, Any]]:
    """Train with a loop over single examples; returns losses, norms of gradients and weights."""
    for name, weight in model.named_parameters():
        weight.requires_grad_(any(part in name for part in trains))
    model.train()
    optimizer = adamw(model)
    schedule = get_scheduler("cosine", optimizer, num_warmup_steps=0, num_training_steps=STEPS)
    losses, norms = [], []
    for step in range(STEPS):
        loss = plain_loss(model, family, family.rows.rows_for_rank(step, 0, 1))
        loss.backward()
        norms.append(float(torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)))
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses, norms, {name: weight.detach().numpy() for name, weight in model.named_parameters()}


def is_language(name: str) -> bool:
    return not any(part in name for part in ("vis", "projector", "connector"))


@pytest.mark.parametrize("name", FAMILIES)
def test_training_equals_a_plain_loop_over_the_processors_batches(families, trained, name):
    result, family = trained[name, "full"], families[name]
    assert not result.failure
    plain = AutoModelForImageTextToText.from_pretrained(family.model)
    language = [weight for weight, _ in plain.named_parameters() if is_language(weight)]
    begun = {weight: value.detach().clone().numpy() for weight, value in plain.named_parameters()}
    losses, norms, weights = plain_training(plain, family, language)
    np.testing.assert_allclose(result.losses, losses, rtol=1e-5)
    np.testing.assert_allclose(result.norms, norms, rtol=1e-4)
    saved = AutoModelForImageTextToText.from_pretrained(result.model)
    for weight, value in saved.named_parameters():
        expected = weights[weight] if is_language(weight) else begun[weight]
        np.testing.assert_allclose(value.detach().numpy(), expected, rtol=1e-5, atol=1e-5, err_msg=weight)


@pytest.mark.parametrize("way", list(WAYS)[1:])
@pytest.mark.parametrize("name", FAMILIES)
def test_the_way_it_is_split_changes_nothing(trained, name, way):
    result, full = trained[name, way], trained[name, "full"]
    assert not result.failure
    if way != "lora":
        assert_same(result[:4], full[:4])
