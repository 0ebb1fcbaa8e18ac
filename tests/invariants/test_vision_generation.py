"""Generation with images: token for token what ``model.generate`` writes on the processor's own batch."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForImageTextToText

from raysft.config import Config, parse
from raysft.data.types import TokenizedMedium
from raysft.generate.engines import create_engine, shrinking
from raysft.generate.engines.bisection import complete
from raysft.generate.engines.roomy_cache import ROOM
from raysft.media.files import digest
from raysft.models.processor import differs_alone, load_processor
from tests.tiny_vision import FAMILIES, tiny_vision_model
from tests.vision_prompts import ASKED, conversation, draw, tokenized

NEW_TOKENS = 10


@dataclass
class Family:
    """A tiny model, and the prompts as tokens."""

    folder: Path
    processor: Any
    plain: Any
    pictures: dict[str, Path]
    ids: list[str]
    prompts: list[list[int]]
    media: list[list[TokenizedMedium]]

    def config(self, **generate: Any) -> Config:
        settings = {"max_new_tokens": NEW_TOKENS, "do_sample": False, "skip_special_tokens": False, **generate}
        data = {"train": [{"name": "a", "path": "a"}]}
        return parse({"model": {"path": str(self.folder)}, "data": data, "generate": settings})


@pytest.fixture(scope="module")
def pictures(tmp_path_factory) -> dict[str, Path]:
    return draw(tmp_path_factory.mktemp("pictures"))


@pytest.fixture(scope="module", params=(*FAMILIES, "llava-onevision"))
def family(request, tmp_path_factory, pictures) -> Family:
    folder = tiny_vision_model(tmp_path_factory.mktemp(request.param), request.param)
    processor = load_processor(folder)
    plain = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32).eval()
    made = [tokenized(processor, pictures, parts) for parts in ASKED]
    ids = [f"q:{number}" for number in range(len(ASKED))]
    return Family(folder, processor, plain, pictures, ids, [each[0] for each in made], [each[1] for each in made])


def expected(family: Family, **options: Any) -> list[str]:
    """What ``model.generate`` writes on the processor's batch of all questions."""
    batch = family.processor.apply_chat_template(
        [conversation(family.pictures, parts) for parts in ASKED],
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
        processor_kwargs={"padding": True, "padding_side": "left"},
    )
    with torch.inference_mode():
        written = family.plain.generate(**batch, max_new_tokens=NEW_TOKENS, do_sample=False, **options)
    return as_text(family, written[:, batch["input_ids"].shape[1] :])


def as_text(family: Family, rows: torch.Tensor) -> list[str]:
    tokenizer = family.processor.tokenizer
    end = tokenizer.eos_token_id
    kept = [row[: row.index(end)] if end in row else row for row in rows.tolist()]
    return [tokenizer.decode(row) for row in kept]


@pytest.mark.parametrize("batch_size", [6, 2])
def test_predictions_are_those_of_the_processors_batch(family, monkeypatch, batch_size):
    monkeypatch.setattr(shrinking, "GROUP_TOKENS", 100)  # several groups of several prompts
    engine: Any = create_engine(family.config(batch_size=batch_size), str(family.folder), threads=1)
    assert engine._shrinks
    found = complete(engine, family.ids, family.prompts, family.media)
    assert [each.text for each in found] == expected(family)
    assert not any(each.error for each in found)


def test_they_are_on_a_batch_that_does_not_shrink_and_with_beams(family):
    engine: Any = create_engine(family.config(batch_size=6), str(family.folder), threads=1)
    engine._shrinks = False
    found = engine.complete(family.ids, family.prompts, family.media)
    assert [each.text for each in found] == expected(family)
    engine = create_engine(family.config(batch_size=6, num_beams=3), str(family.folder), threads=1)
    found = engine.complete(family.ids, family.prompts, family.media)
    assert [each.text for each in found] == expected(family, num_beams=3, length_penalty=1.0)


def test_a_picture_that_cannot_be_read_costs_its_own_prompt_alone(family, tmp_path):
    engine: Any = create_engine(family.config(batch_size=6), str(family.folder), threads=1)
    changed, missing, broken = (tmp_path / f"{name}.png" for name in ("changed", "missing", "broken"))
    changed.write_bytes(family.pictures["small"].read_bytes())
    broken.write_bytes(b"no picture")
    faulty = [list(each) for each in family.media]
    faulty[0][0] = replace(faulty[0][0], location=str(changed))
    faulty[2][1] = replace(faulty[2][1], location=str(missing))
    faulty[3][0] = replace(faulty[3][0], location=str(broken), digest=digest(b"no picture"))
    found = engine.complete(family.ids, family.prompts, faulty)
    assert [(each.text, each.stop) for each in found[:1] + found[2:4]] == [("", "error")] * 3
    assert found[0].error.startswith(f"{changed}: has changed since it was tokenized; restore it")
    assert found[2].error.startswith(f"{missing}: cannot be read")
    assert found[3].error.startswith(f"{broken}: ")
    assert [found[at].text for at in (1, 4, 5)] == [expected(family)[at] for at in (1, 4, 5)]


def test_text_after_pictures_is_written_as_before_them(family):
    """What a model keeps of one batch, as Qwen's do, must not reach another one with fewer rows."""
    engine: Any = create_engine(family.config(batch_size=6), str(family.folder), threads=1)
    texts = [at for at, media in enumerate(family.media) if not media]
    asked = [family.ids[at] for at in texts], [family.prompts[at] for at in texts]
    before = engine.complete(*asked)
    engine.complete(family.ids, family.prompts, family.media)
    assert engine.complete(*asked) == before
    assert [each.text for each in before] == [expected(family)[at] for at in texts]


def test_a_prompt_that_is_too_long_keeps_no_part_of_a_picture(family):
    engine: Any = create_engine(family.config(batch_size=6), str(family.folder), threads=1)
    prompt, media = family.prompts[2], family.media[2]
    inside = media[1].start + 1
    engine._positions = len(prompt) - inside + NEW_TOKENS
    (long,) = engine.complete(["a"], [prompt], [media])
    (tail,) = engine.complete(["a"], [prompt[media[1].stop :]])
    assert not long.error
    assert (long.text, long.cut) == (tail.text, media[1].stop)
    engine._positions = len(prompt) - media[1].start + NEW_TOKENS
    if differs_alone(family.processor):  # the second picture has the tokens of one beside others
        assert engine.complete(["a"], [prompt], [media]) == [replace(tail, cut=media[1].stop)]
        return
    moved = replace(media[1], start=0, stop=media[1].stop - media[1].start)
    (long,) = engine.complete(["a"], [prompt], [media])
    (tail,) = engine.complete(["a"], [prompt[media[1].start :]], [[moved]])
    assert (long.text, long.cut) == (tail.text, media[1].start)


def test_a_batch_has_only_so_many_rows_that_its_images_fit_too(family, monkeypatch):
    engine: Any = create_engine(family.config(batch_size=6), str(family.folder), threads=1)
    texts = engine._rows_at_once(family.prompts, ())
    # The largest prompt has 84 · 56 and 32 · 90 pixels, of six float32 numbers, and those of the next batch are made meanwhile.
    pixels = 2 * (84 * 56 + 32 * 90) * 6 * 4
    tokens = (max(map(len, family.prompts)) + NEW_TOKENS + ROOM) * engine._token_bytes
    monkeypatch.setattr("raysft.generate.engines.static.cpu_cache_bytes", lambda engines: 3 * (pixels + tokens))
    assert (texts, engine._rows_at_once(family.prompts, family.media)) == (6, 3)
    sizes, batch = [], engine._batch
    monkeypatch.setattr(engine, "_batch", lambda ids, *more: sizes.append(len(ids)) or batch(ids, *more))
    assert [each.text for each in engine.complete(family.ids, family.prompts, family.media)] == expected(family)
    assert sizes == [3, 3]


def test_an_adapter_in_bfloat16_predicts_with_pictures(family, tmp_path):
    """Its layers stay separate, and pixels get the type of the weights."""
    adapted = get_peft_model(family.plain, LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=True))
    adapted.save_pretrained(tmp_path)
    adapted.unload()
    description = json.loads((tmp_path / "adapter_config.json").read_text())
    description["base_model_name_or_path"] = str(family.folder)
    (tmp_path / "adapter_config.json").write_text(json.dumps(description))
    raw = family.config(batch_size=1).model_dump(mode="json")
    raw["model"]["dtype"] = "bfloat16"
    found = create_engine(parse(raw), str(tmp_path), threads=1).complete(family.ids, family.prompts, family.media)
    assert not any(each.error for each in found)
    plain: Any = AutoModelForImageTextToText.from_pretrained(family.folder, dtype=torch.bfloat16).eval()
    batch = family.processor.apply_chat_template(
        conversation(family.pictures, ASKED[2]),
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
    ).to(torch.bfloat16)
    with torch.inference_mode():
        written = plain.generate(**batch, max_new_tokens=NEW_TOKENS, do_sample=False)
    assert [found[2].text] == as_text(family, written[:, batch["input_ids"].shape[1] :])
