"""Conversations with images: their tokens are those of the model's processor, and no image is trained on or cut."""

from __future__ import annotations

import json
import pickle
import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import transformers as hf
from PIL import Image

from raysft.data.preview import LengthSummary, decode_rows, write_page
from raysft.data.rows.packed_dataset import PackedDataset
from raysft.data.shards.media_column import MEDIA
from raysft.data.shards.prompts import write_prompts
from raysft.data.sources.pickle_guard import read_table
from raysft.data.tokenization.tokenize import ExampleTokenizer
from raysft.data.tokenization.tokenized_example import Overflow, TokenizedExample
from raysft.data.tokenization.tokenizer import Tokenizer
from raysft.data.types import IGNORE_INDEX, MEDIUM, Example, Medium, Message, Rejected, TokenizedMedium
from raysft.errors import RequestError
from raysft.media.files import read
from raysft.models.processor import differs_alone, image_text, load_processor
from raysft.models.tokenizer import load_tokenizer
from raysft.run.source_plan import plan_sources
from raysft.storage.path import StoragePath
from tests.shards import data_config, example_tokenizer, the_set, tokenize_options, write_records, written
from tests.tiny import CHAT_TEMPLATE, tiny_tokenizer
from tests.tiny_vision import FAMILIES, QWEN_IMAGE, TEMPLATE, TILED, tiny_processor

Part = str | tuple[int, int]
"""A text, or the width and height of an image."""
Chat = Sequence[tuple[str, Sequence[Part]]]
CHATS: dict[str, Chat] = {
    "before the text": [("user", [(60, 40), "What is it?"]), ("assistant", ["A cat."])],
    "in the text": [("user", ["Is this ", (28, 28), " a cat?"]), ("assistant", ["Yes, it is."])],
    "after the text": [("user", ["What is it?\n", (31, 90)]), ("assistant", ["A cat."])],
    "alone": [("user", [(64, 64)]), ("assistant", ["A dog."])],
    "two": [("user", ["One: ", (40, 40), " and two: ", (90, 120), "."]), ("assistant", ["A cat and a dog."])],
    "side by side": [("user", [(40, 40), (100, 30), (7, 9)]), ("assistant", ["Three."])],
    "several turns": [
        ("system", ["You are a helpful assistant."]),
        ("user", [(33, 47), "What is it?"]),
        ("assistant", ["A cat."]),
        ("user", ["And now?"]),
        ("assistant", ["Still a cat, 你好."]),
        ("user", ["And ", (120, 30), "?"]),
        ("assistant", ["A dog."]),
    ],
    "the same text in all turns": [
        ("user", ["b", (30, 30)]),
        ("assistant", ["b"]),
        ("user", [(30, 30), "b"]),
        ("assistant", ["b"]),
    ],
    "from the assistant": [("user", ["Draw."]), ("assistant", ["Here: ", (60, 60), " it is."]), ("user", ["Thanks."])],
    "one pixel": [("user", ["What is it?", (1, 1)]), ("assistant", ["A pixel."])],
    "text alone": [("system", ["Be nice."]), ("user", ["Hi"]), ("assistant", ["Hello"])],
}
HOISTING = (
    "{% for message in messages %}{{ message['role'].upper() + ': ' }}"
    "{% for part in message['content'] | selectattr('type', 'equalto', 'image') %}{{ '<image>\n' }}{% endfor %}"
    "{% for part in message['content'] | selectattr('type', 'equalto', 'text') %}"
    "{% if message['role'] == 'assistant' %}{% generation %}{{ part['text'] + '<|im_end|>' }}{% endgeneration %}"
    "{% else %}{{ part['text'] + ' ' }}{% endif %}{% endfor %}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'ASSISTANT: ' }}{% endif %}"
)
"""Images go before the text of their turn; contents are lists of parts."""
NUMBERED = (
    "{% set seen = namespace(images=0) %}{% for message in messages %}<|im_start|>{{ message.role }}\n"
    "{% if message.content is string %}{{ message.content }}{% else %}{% for part in message.content %}"
    "{% if part.type == 'image' %}{% set seen.images = seen.images + 1 %}Picture {{ seen.images }}: "
    "<|vision_start|><|image_pad|><|vision_end|>{% else %}{{ part.text }}{% endif %}{% endfor %}{% endif %}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def example(chat: Chat, record: str = "f:1") -> Example:
    return Example("s", record, tuple(message(role, parts) for role, parts in chat))


def message(role: Any, parts: Sequence[Part], **more: Any) -> Message:
    media = tuple(
        Medium("image", f"{part[0]}x{part[1]}.png", digest="d", width=part[0], height=part[1])
        for part in parts
        if not isinstance(part, str)
    )
    return Message(role, "".join(part if isinstance(part, str) else MEDIUM for part in parts), media=media, **more)


def conversation(chat: Chat, lists: bool = False) -> list[dict[str, Any]]:
    """The same for transformers, with pictures of noise."""
    noise = np.random.default_rng(0)

    def part(each: Part) -> dict[str, Any]:
        if isinstance(each, str):
            return {"type": "text", "text": each}
        return {"type": "image", "image": Image.fromarray(noise.integers(0, 255, (each[1], each[0], 3), np.uint8))}

    return [
        {
            "role": role,
            "content": [part(each) for each in parts]
            if lists or any(not isinstance(each, str) for each in parts)
            else "".join(parts),  # type: ignore[arg-type]
        }
        for role, parts in chat
    ]


def tokenize(folder: Path, *examples: Example, **options: Any) -> list[TokenizedExample]:
    items = list(example_tokenizer(str(folder), **{"sequence_length": 2000, **options})(examples))
    assert all(isinstance(item, TokenizedExample) for item in items), items
    return items  # type: ignore[return-value]


def processor_ids(folder: Path, chat: Chat, lists: bool = False, **options: Any) -> list[int]:
    (ids,) = load_processor(folder).apply_chat_template(conversation(chat, lists), tokenize=True, **options)
    return list(ids)


def answers(folder: Path, item: TokenizedExample) -> str:
    return load_tokenizer(str(folder)).decode(item.input_ids[item.labels != IGNORE_INDEX].tolist())


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("families")
    for family in (*FAMILIES, *TILED):
        tiny_processor(family).save_pretrained(folder / family)
    return {family: folder / family for family in (*FAMILIES, *TILED)}


def changed(folder: Path, family: str, template: str | None = None, bos: bool = False) -> Path:
    """A processor with another template, or one whose tokenizer begins every text with a token."""
    from tokenizers.processors import TemplateProcessing

    processor = tiny_processor(family)
    processor.chat_template = template or processor.chat_template
    if bos:
        processor.tokenizer.add_special_tokens({"bos_token": "<s>"})
        number = processor.tokenizer.convert_tokens_to_ids("<s>")
        processor.tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
            single="<s> $A", special_tokens=[("<s>", number)]
        )
    processor.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("chat", CHATS)
@pytest.mark.parametrize("family", [*FAMILIES, *TILED])
def test_tokens_are_those_of_the_processor_and_only_answers_are_trained(folders, family, chat):
    turns = CHATS[chat]
    (item,) = tokenize(folders[family], example(turns), with_prompts=True)
    assert item.input_ids.tolist() == processor_ids(folders[family], turns)
    said = ["".join(part for part in parts if isinstance(part, str)) for role, parts in turns if role == "assistant"]
    assert answers(folders[family], item) == "".join(f"{text}<|im_end|>" for text in said)
    last = len(turns) - (turns[-1][0] == "assistant")
    assert item.prompt_ids.tolist() == processor_ids(folders[family], turns[:last], add_generation_prompt=True)
    assert_media(folders[family], item.input_ids, item.media, turns)
    assert_media(folders[family], item.prompt_ids, item.prompt_media, turns[:last])
    assert item.prompt == load_processor(folders[family]).apply_chat_template(
        conversation(turns[:last]), add_generation_prompt=True
    )


def assert_media(folder: Path, ids: np.ndarray, media: Sequence[Any], turns: Chat) -> None:
    """Media are those of the chat, in order, and all tokens of images lie in them."""
    sizes = [part for _, parts in turns for part in parts if not isinstance(part, str)]
    assert [(medium.width, medium.height) for medium in media] == sizes
    token, outside = load_processor(folder).image_token_id, ids.copy()
    for medium in media:
        assert token in ids[medium.start : medium.stop]
        outside[medium.start : medium.stop] = 0
    assert token not in outside


@pytest.mark.parametrize("family", ["idefics3", "qwen2.5-vl"])
def test_the_tags_that_a_template_writes_around_an_image_belong_to_it(folders, family):
    (item,) = tokenize(folders[family], example(CHATS["in the text"]))
    (medium,) = item.media
    text = load_processor(folders[family]).tokenizer.decode(item.input_ids[medium.start : medium.stop].tolist())
    first, last = ("<|vision_start|>", "<|vision_end|>") if "qwen" in family else (2 * ["<fake_token_around_image>"])
    assert text.startswith(first)
    assert text.endswith(last)


@pytest.mark.parametrize("family", FAMILIES)
def test_images_and_texts_in_one_batch_give_what_they_give_alone(folders, family):
    examples = [example(chat, f"f:{number}") for number, chat in enumerate(CHATS.values())]
    together = tokenize(folders[family], *examples)
    for one, item in zip(examples, together, strict=True):
        (alone,) = tokenize(folders[family], one)
        assert item.input_ids.tolist() == alone.input_ids.tolist()
        assert item.labels.tolist() == alone.labels.tolist()
        assert item.media == alone.media


@pytest.mark.parametrize("family", FAMILIES)
def test_with_train_on_prompt_all_but_images_is_trained(folders, family):
    (item,) = tokenize(folders[family], example(CHATS["two"]), train_on_prompt=True)
    inside = np.zeros(len(item.input_ids), bool)
    for medium in item.media:
        inside[medium.start : medium.stop] = True
    assert inside.any()
    assert (item.labels == np.where(inside, IGNORE_INDEX, item.input_ids)).all()


@pytest.mark.parametrize("chat", ["several turns", "two", "alone", "text alone"])
@pytest.mark.parametrize("bos", [False, True])
def test_a_template_that_puts_images_before_the_text_and_marks_answers(tmp_path, bos, chat):
    folder = changed(tmp_path / "p", "llava", HOISTING, bos)
    (item,) = tokenize(folder, example(CHATS[chat]), with_prompts=True)
    assert item.input_ids.tolist() == processor_ids(folder, CHATS[chat], lists=True)
    said = ["".join(parts) for role, parts in CHATS[chat] if role == "assistant"]  # type: ignore[arg-type]
    assert answers(folder, item) == "".join(f"{text}<|im_end|>" for text in said)
    assert item.prompt_ids.tolist() == processor_ids(folder, CHATS[chat][:-1], lists=True, add_generation_prompt=True)
    assert_media(folder, item.input_ids, item.media, CHATS[chat])


def test_an_answer_with_an_image_hides_no_text_from_a_template_that_reads_parts_alone(tmp_path):
    folder, turns = changed(tmp_path / "p", "llava", HOISTING), CHATS["from the assistant"]
    (item,) = tokenize(folder, example(turns), with_prompts=True)
    assert item.input_ids.tolist() == processor_ids(folder, turns, lists=True)
    assert item.prompt_ids.tolist() == processor_ids(folder, turns, lists=True, add_generation_prompt=True)


@pytest.mark.parametrize("chat", ["several turns", "two", "alone", "text alone"])
def test_a_processor_that_writes_one_token_and_puts_others_with_line_breaks_in_its_place(tmp_path, chat):
    folder = gemma3(tmp_path / "p")
    (item,) = tokenize(folder, example(CHATS[chat]), with_prompts=True)
    assert item.input_ids.tolist() == processor_ids(folder, CHATS[chat])
    assert item.prompt_ids.tolist() == processor_ids(folder, CHATS[chat][:-1], add_generation_prompt=True)
    assert_media(folder, item.input_ids, item.media, CHATS[chat])
    (rejected,) = example_tokenizer(str(folder))([example([("user", ["<image_soft_token>"]), ("assistant", ["No."])])])
    assert isinstance(rejected, Rejected)


def gemma3(folder: Path) -> Path:
    from transformers import Gemma3ImageProcessorPil, Gemma3Processor, PreTrainedTokenizerFast

    tokens = {"image_token": "<image_soft_token>", "boi_token": "<start_of_image>", "eoi_token": "<end_of_image>"}
    special = {"bos_token": "<|im_start|>", "eos_token": "<|im_end|>", "pad_token": "<|pad|>"}
    backend = tiny_tokenizer().backend_tokenizer
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, extra_special_tokens=tokens, **special)
    template = tiny_processor("llava").chat_template.replace("<image>", "<start_of_image>")
    image_processor = Gemma3ImageProcessorPil(size={"height": 28, "width": 28})
    options = {"tokenizer": tokenizer, "chat_template": template, "image_seq_length": 4}
    Gemma3Processor(image_processor=image_processor, **options).save_pretrained(folder)
    return folder


def test_a_template_that_numbers_images(tmp_path):
    folder = changed(tmp_path / "p", "qwen2-vl", NUMBERED)
    (item,) = tokenize(folder, example(CHATS["two"]))
    assert item.input_ids.tolist() == processor_ids(folder, CHATS["two"])
    decode = load_processor(folder).tokenizer.decode
    assert all(
        decode(item.input_ids[each.start : each.stop].tolist()).startswith("<|vision_start|>") for each in item.media
    )
    assert "Picture 2: " in decode(item.input_ids.tolist())


@pytest.mark.parametrize("chat", ["two", "text alone"])
@pytest.mark.parametrize("writes_bos", [False, True])
def test_a_text_begins_with_the_token_for_that_once_as_the_processor_has_it(tmp_path, writes_bos, chat):
    template = tiny_processor("llava").chat_template
    folder = changed(tmp_path / "p", "llava", ("{{ bos_token }}" if writes_bos else "") + template, bos=True)
    (item,) = tokenize(folder, example(CHATS[chat]), with_prompts=True)
    assert item.input_ids.tolist() == processor_ids(folder, CHATS[chat])
    bos = load_processor(folder).tokenizer.bos_token_id
    for ids in (item.input_ids, item.prompt_ids):
        assert ids[0] == bos
        assert bos not in ids[1:]
    assert answers(folder, item) == f"{''.join(CHATS[chat][-1][1])}<|im_end|>"  # type: ignore[arg-type]
    assert_media(folder, item.input_ids, item.media, CHATS[chat])


@pytest.mark.parametrize(("family", "image"), [("llava", "<image>"), ("qwen2.5-vl", QWEN_IMAGE)])
def test_a_template_of_texts_alone_gets_what_the_model_s_own_writes_for_an_image(folders, family, image):
    loaded = Tokenizer.load(str(folders[family]), CHAT_TEMPLATE)
    tokenizer = ExampleTokenizer(loaded, tokenize_options(sequence_length=2000))
    (item,) = tokenizer([example(CHATS["two"])])
    assert isinstance(item, TokenizedExample)
    texts = [
        (role, ["".join(part if isinstance(part, str) else image for part in parts)]) for role, parts in CHATS["two"]
    ]
    processor = load_processor(folders[family])
    text = processor.apply_chat_template(conversation(texts), chat_template=CHAT_TEMPLATE)
    images = [part["image"] for part in conversation(CHATS["two"])[0]["content"] if part["type"] == "image"]
    assert item.input_ids.tolist() == processor(text=[text], images=[images])["input_ids"][0]


def test_the_processor_s_template_goes_before_that_of_its_tokenizer(tmp_path):
    folder = changed(tmp_path / "p", "llava", NUMBERED.replace("Picture", "Image").replace(QWEN_IMAGE, "<image>"))
    config = json.loads((folder / "tokenizer_config.json").read_text())
    config["chat_template"] = "{% for message in messages %}other{{ message.content }}{% endfor %}"
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    (item,) = tokenize(folder, example(CHATS["text alone"]))
    assert item.input_ids.tolist() == processor_ids(folder, CHATS["text alone"])


@pytest.mark.parametrize("family", ["llava", "qwen3-vl"])
def test_a_text_that_reads_as_an_image_is_rejected_or_escaped(folders, family):
    token = load_processor(folders[family]).image_token
    number, tokenizer = load_processor(folders[family]).image_token_id, load_processor(folders[family]).tokenizer
    for chat in (CHATS["text alone"], CHATS["two"]):
        turns = [(role, [*parts, f"What is {token}?"] if role == "user" else parts) for role, parts in chat]
        (rejected,) = example_tokenizer(str(folders[family]), sequence_length=2000)([example(turns)])
        assert isinstance(rejected, Rejected)
        assert f"contains {token}" in rejected.reason
        assert "escape" in rejected.reason
        (item,) = tokenize(folders[family], example(turns), control_tokens="escape", with_prompts=True)
        (plain,) = tokenize(folders[family], example(chat))
        images = np.count_nonzero(plain.input_ids == number)
        assert np.count_nonzero(item.input_ids == number) == images
        assert_media(folders[family], item.input_ids, item.media, turns)
        assert_media(folders[family], item.prompt_ids, item.prompt_media, turns)
        assert answers(folders[family], item) == f"{turns[-1][1][0]}<|im_end|>"
        for text in (item.prompt, tokenizer.decode(item.input_ids.tolist())):
            assert f"What is {token}?" in text


def test_marks_without_images_are_counted_or_rejected_with_the_remedy(folders):
    marked, plain = [("user", ["<image>What?"]), ("assistant", ["It."])], CHATS["text alone"]
    beside = [("user", [(40, 40), "<image>What?"]), ("assistant", ["It."])]
    items = tokenize(folders["qwen2-vl"], *map(example, (marked, plain, beside)))
    assert [dict(item.counts) for item in items] == [{"stray_marks": 1}, {}, {}]
    (rejected,) = example_tokenizer(str(folders["llava"]))([example(marked)])
    assert isinstance(rejected, Rejected)
    assert "columns: {images: COLUMN}" in rejected.reason


def test_images_of_a_model_without_a_processor_are_refused(tmp_path):
    tiny_tokenizer().save_pretrained(tmp_path)
    with pytest.raises(RequestError, match=r"f:1: has images, but the model has no image processor .*; use"):
        list(example_tokenizer(str(tmp_path))([example(CHATS["alone"])]))


def test_a_processor_that_cannot_be_loaded_is_refused_only_where_there_are_images(tmp_path):
    folder = changed(tmp_path / "p", "llava")
    (folder / "processor_config.json").write_text('{"processor_class": "LlavaProcessor", "image_processor": {}}')
    (item,) = tokenize(folder, example(CHATS["text alone"]))
    assert answers(folder, item) == "Hello<|im_end|>"
    with pytest.raises(RequestError, match=r"f:1: has images, but .*processor cannot be loaded"):
        list(example_tokenizer(str(folder))([example(CHATS["alone"])]))


def test_a_size_that_the_processor_refuses_is_rejected_with_its_file(folders):
    found = example_tokenizer(str(folders["qwen2-vl"]), sequence_length=2000)(
        [example([("user", [(6000, 20)]), ("assistant", ["A line."])])]
    )
    (rejected,) = found
    assert isinstance(rejected, Rejected)
    assert rejected.reason.startswith("6000x20.png: the processor rejects an image of 6000 × 20 pixels")


@pytest.mark.parametrize("family", [*FAMILIES, *TILED])
def test_a_processor_tells_an_image_alone_from_one_beside_others(folders, family):
    assert differs_alone(load_processor(folders[family])) == (family == "llava-onevision")


@pytest.mark.parametrize("on_overflow", ["truncate", "split"])
def test_a_cut_leaves_no_image_alone_that_has_the_tokens_of_one_beside_others(folders, on_overflow):
    """LLaVA-OneVision divides an image that is alone in its conversation into tiles, and no other."""
    chat = [("user", [(56, 28), "One."]), ("assistant", ["Yes, it is."])] * 2
    (whole,) = tokenize(folders["llava-onevision"], example(chat))
    first, second = whole.media
    assert (first.stop - first.start, second.stop - second.start) == (5, 5)
    options: dict[str, Any] = {"on_overflow": on_overflow, "sequence_length": second.start + 1}
    (dropped,) = example_tokenizer(str(folders["llava-onevision"]), **options)([example(chat)])
    assert isinstance(dropped, Overflow)
    assert dropped.rejected.reason.endswith("truncation would separate images, which changes their tokens")
    pieces = tokenize(folders["llava"], example(chat), **options)
    assert {len(piece.media) for piece in pieces} == {1}
    with_both = {"on_overflow": "truncate", "sequence_length": len(whole.input_ids) - 2}
    (shorter,) = tokenize(folders["llava-onevision"], example(chat), **with_both)
    assert len(shorter.media) == 2


def test_a_processor_that_does_more_than_to_put_texts_in_place_of_images_is_refused(tmp_path):
    """PaliGemma's writes a token behind the images and ends the text with a line break."""
    images: Any = hf.SiglipImageProcessorPil(size={"height": 28, "width": 28})
    images.image_seq_length = 4
    made = hf.PaliGemmaProcessor(images, tiny_tokenizer(), chat_template=TEMPLATE % "<image>")
    made.save_pretrained(tmp_path)
    with pytest.raises(RequestError, match="PaliGemmaProcessor tokenizes conversations with images differently"):
        list(example_tokenizer(str(tmp_path))([example(CHATS["alone"])]))


def test_a_processor_that_does_not_say_which_tokens_an_image_has_is_refused_and_no_record_is_blamed(tmp_path):
    made = hf.Idefics2Processor(hf.Idefics2ImageProcessorPil(), tiny_tokenizer(), chat_template=TEMPLATE % "<image>")
    made.save_pretrained(tmp_path)
    with pytest.raises(
        RequestError, match=r"^model: Idefics2Processor does not define which tokens .*; .*text-only data$"
    ):
        list(example_tokenizer(str(tmp_path))([example(CHATS["alone"])]))


@pytest.mark.parametrize("size", [(1, 1), (28, 28), (300, 10), (57, 113), (640, 480)])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_text_of_an_image_is_that_of_a_whole_run_of_the_processor(folders, family, size):
    processor = load_processor(folders[family])
    ids = processor(text=[processor.image_token], images=[[Image.new("RGB", size, "red")]])["input_ids"][0]
    text = image_text(processor, *size)
    assert processor.tokenizer(text)["input_ids"] == ids


def test_images_that_the_template_leaves_out_are_rejected(tmp_path):
    once = "{% set seen = namespace(image=false) %}{% for message in messages %}{% if message.content is string %}"
    parts = (
        "{{ message.content }}|{% else %}{% for part in message.content %}{% if part.type == 'text' %}{{ part.text }}|"
    )
    image = "{% elif not seen.image %}<image>{% set seen.image = true %}{% endif %}{% endfor %}{% endif %}{% endfor %}"
    template = once + parts + image
    folder = changed(tmp_path / "p", "llava", template)
    (rejected,) = example_tokenizer(str(folder))([example(CHATS["two"])])
    assert isinstance(rejected, Rejected)
    assert "1 of 2 images" in rejected.reason


def test_a_thought_is_kept_beside_an_image(folders):
    chat = [("user", ["What?", (40, 40)]), ("assistant", ["<think>\nHm.\n</think>\n\nA cat."]), *CHATS["two"]]
    (item,) = tokenize(folders["qwen2-vl"], example(chat), thinking="keep", with_prompts=True)
    assert item.input_ids.tolist() == processor_ids(folders["qwen2-vl"], chat)
    assert_media(folders["qwen2-vl"], item.prompt_ids, item.prompt_media, chat[:-1])


def test_overflow_reports_the_tokens_of_images_too(folders):
    (item,) = example_tokenizer(str(folders["idefics3"]), on_overflow="drop")([example(CHATS["two"])])
    assert isinstance(item, Overflow)
    assert item.tokens == len(processor_ids(folders["idefics3"], CHATS["two"]))


def write_pictures(folder: Path, chats: dict[str, Chat]) -> None:
    """Write pictures, and conversations about them in OpenAI's parts."""
    records = []
    for turns in chats.values():
        for one in conversation(turns):
            for part in one["content"] if isinstance(one["content"], list) else ():
                if "image" in part:
                    part["image"].save(folder / f"{part['image'].width}x{part['image'].height}.png")
        records.append(
            {
                "messages": [
                    {
                        "role": role,
                        "content": [
                            {"type": "text", "text": part}
                            if isinstance(part, str)
                            else {"type": "image", "image": f"{part[0]}x{part[1]}.png"}
                            for part in parts
                        ],
                    }
                    for role, parts in turns
                ]
            }
        )
    write_records(folder / "a.jsonl", records)


@pytest.mark.parametrize("family", ["llava", "qwen2.5-vl"])
def test_shards_and_prompts_list_images_with_their_tokens(tmp_path, folders, family):
    chats = {name: turns for name, turns in CHATS.items() if turns[-1][0] == "assistant"}
    write_pictures(tmp_path, chats)
    config = data_config(tmp_path, sequence_length=1000)
    model = str(folders[family])
    manifest = written(the_set(config, model, with_prompts=True), model)
    assert len(manifest) == len(chats)
    assert manifest.media == sum(
        not isinstance(part, str) for turns in chats.values() for _, parts in turns for part in parts
    )
    (shard,) = manifest.shard_paths()
    path = tmp_path / "prompts.parquet"
    write_prompts([manifest], path, None)
    for table, ids, count in (
        (read_table(shard), "input_ids", None),
        (read_table(StoragePath.of(path)), "input_ids", -1),
    ):
        assert table["media"].type == MEDIA
        for row, turns in zip(table.to_pylist(), chats.values(), strict=True):
            media = [TokenizedMedium(**each) for each in row["media"]]
            assert_media(folders[family], np.array(row[ids]), media, turns[:count])
            for medium in media:
                read(medium.location, medium.digest)


def test_files_of_texts_alone_have_no_column_for_images(tmp_path, folders):
    write_pictures(tmp_path, {"text": CHATS["text alone"]})
    manifest = written(the_set(data_config(tmp_path), str(folders["llava"]), with_prompts=True), str(folders["llava"]))
    (shard,) = manifest.shard_paths()
    assert manifest.media == 0
    assert "media" not in read_table(shard).column_names
    write_prompts([manifest], tmp_path / "prompts.parquet", None)
    assert read_table(StoragePath.of(tmp_path / "prompts.parquet")).column_names == [
        "id", "source", "prompt", "input_ids", "label",
    ]  # fmt: skip


def test_prompts_of_texts_and_of_images_are_in_one_file(tmp_path, folders):
    write_pictures(tmp_path, {"text": CHATS["text alone"]})
    (tmp_path / "a.jsonl").rename(tmp_path / "b.jsonl")
    write_pictures(tmp_path, {"image": CHATS["two"]})
    config = data_config(tmp_path, names=("a", "b"), sequence_length=500)
    model = str(folders["llava"])
    manifests = [written(the_set(config, model, source, with_prompts=True), model) for source in (0, 1)]
    assert write_prompts(manifests, tmp_path / "prompts.parquet", None) == 2
    table = read_table(StoragePath.of(tmp_path / "prompts.parquet"))
    assert [len(media) for media in table["media"].to_pylist()] == [2, 0]


def test_a_preview_names_images(tmp_path, folders):
    write_pictures(tmp_path, {"two": CHATS["two"], "text": CHATS["text alone"]})
    model = str(folders["qwen2-vl"])
    config = data_config(tmp_path, sequence_length=1000)
    manifest = written(the_set(config, model), model)
    rows = PackedDataset((manifest.path.location,), 1000, 1, seed=0, shuffle=False)
    (row,) = decode_rows(rows, model, 1)
    first = row.examples[0]
    assert "".join(text for text, _ in first) == (
        "<|im_start|>user\nOne: ⟨40x40.png, 40 × 40 pixels, 3 tokens⟩ and two: "
        "⟨90x120.png, 90 × 120 pixels, 14 tokens⟩.<|im_end|>\n"
        "<|im_start|>assistant\nA cat and a dog.<|im_end|>\n"
    )
    assert [text for text, has_loss in first if has_loss] == ["A cat and a dog.<|im_end|>"]
    lengths = LengthSummary.of(rows, [manifest])
    assert "2 images" in lengths.lines
    (tmp_path / "90x120.png").unlink()
    write_page(list(decode_rows(rows, model, 1)), lengths, tmp_path / "page.html")
    page = (tmp_path / "page.html").read_text()
    assert re.findall(r'<img src="data:image/(?:png|jpeg);base64,[^"]+" width="(\d+)" alt="([^"]+)"', page) == [
        ("80", "40x40.png")
    ]
    assert "90x120.png: cannot be read" in page


def test_images_that_are_cut_off_are_counted_for_the_plan_and_the_preview(tmp_path, folders):
    write_pictures(tmp_path, {"two": [("user", [(40, 40), "What is it?", (90, 120)]), ("assistant", ["A cat."])]})
    model = str(folders["qwen2-vl"])
    config = data_config(tmp_path, sequence_length=20, on_overflow="truncate")
    manifest = written(the_set(config, model), model)
    assert (manifest.media, manifest.counts["truncated_media"]) == (1, 1)
    assert "1 images, 1 truncated" in plan_sources([manifest])["a"].line()
    assert "1 images cut off" in plan_sources([manifest])["a"].line()
    rows = PackedDataset((manifest.path.location,), 20, 1, seed=0, shuffle=False)
    assert "1 images; 1 more were cut off" in LengthSummary.of(rows, [manifest]).lines
    (row,) = decode_rows(rows, model, 1)
    assert "⟨40x40.png, 40 × 40 pixels, 3 tokens⟩" in "".join(text for text, _ in row.examples[0])


def test_a_processor_that_does_more_than_replace_tokens_is_refused(folders, monkeypatch):
    def call(self, text, **options):
        """Write more than the texts of images, as PaliGemma's processor does."""
        return plain(self, text=text if text == ["<image>"] else [f"{each}\n" for each in text], **options)

    kind = type(load_processor(folders["llava"]))
    plain = kind.__call__
    monkeypatch.setattr(kind, "__call__", call)
    with pytest.raises(RequestError, match="model: LlavaProcessor tokenizes conversations with images differently"):
        tokenize(folders["llava"], example(CHATS["two"]))


def test_tasks_need_no_folder_of_the_model(tmp_path):
    folder = changed(tmp_path / "p", "qwen3-vl")
    expected = processor_ids(folder, CHATS["two"])
    sent = pickle.dumps(Tokenizer.load(str(folder)))
    shutil.rmtree(folder)
    (item,) = ExampleTokenizer(pickle.loads(sent), tokenize_options(sequence_length=2000))([example(CHATS["two"])])
    assert isinstance(item, TokenizedExample)
    assert item.input_ids.tolist() == expected


def test_texts_of_a_model_for_images_are_tokenized_without_torch(tmp_path, folders):
    turns = example(CHATS["text alone"])
    task = (Tokenizer.load(str(folders["llava"])), tokenize_options(sequence_length=2000), turns)
    (tmp_path / "task").write_bytes(pickle.dumps(task))
    code = (
        "import pickle, sys\n"
        "from raysft.data.tokenization.tokenize import ExampleTokenizer\n"
        "tokenizer, options, example = pickle.load(open(sys.argv[1], 'rb'))\n"
        "(item,) = ExampleTokenizer(tokenizer, options)([example])\n"
        "print(len(item.input_ids), 'torch' in sys.modules)\n"
    )
    output = subprocess.check_output([sys.executable, "-c", code, str(tmp_path / "task")], text=True, timeout=120)
    assert output.split() == [str(len(processor_ids(folders["llava"], CHATS["text alone"]))), "False"]


def test_a_prompt_without_an_answer_has_its_images(folders):
    turns = CHATS["two"]
    asked = replace(example([*turns[:-1], ("assistant", ["-"])]), unanswered="has no answer")
    (item,) = tokenize(folders["idefics3"], asked, with_prompts=True)
    assert (len(item.input_ids), item.media, item.reference) == (1, (), "")
    assert item.prompt_ids.tolist() == processor_ids(folders["idefics3"], turns[:-1], add_generation_prompt=True)
    assert_media(folders["idefics3"], item.prompt_ids, item.prompt_media, turns)


def test_tools_that_the_template_does_not_show_are_written_beside_images(folders):
    tool = {"type": "function", "function": {"name": "zoom", "description": "Zoom in.", "parameters": {}}}
    call = {"type": "function", "function": {"name": "zoom", "arguments": {"factor": 2}}}
    messages = (
        message("system", ["Be nice."]),
        message("user", ["What is ", (40, 40), "?"]),
        message("assistant", [], tool_calls=(call,)),
        message("tool", ["Zoomed: ", (90, 60)]),
        message("assistant", ["A cat."]),
    )
    (item,) = tokenize(folders["qwen2-vl"], Example("s", "f:1", messages, (tool,)))
    assert dict(item.counts) == {"tools_as_text": 1}
    text = load_tokenizer(str(folders["qwen2-vl"])).decode(item.input_ids.tolist())
    assert text.index("Zoom in.") < text.index("What is <|vision_start|>") < text.index("Zoomed: <|vision_start|>")
    assert "zoom" in answers(folders["qwen2-vl"], item)
    assert answers(folders["qwen2-vl"], item).endswith("A cat.<|im_end|>")
    assert_media(folders["qwen2-vl"], item.input_ids, item.media, [("user", [(40, 40), (90, 60)])])
