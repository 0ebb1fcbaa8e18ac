"""Images of records, in every form in which records have them: which image stands where in which turn."""

from __future__ import annotations

import json
from base64 import b64encode
from io import BytesIO
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from raysft.config import Source
from raysft.data.sources.files import find_files
from raysft.data.sources.formats import to_examples
from raysft.data.sources.holdout import opening_hash
from raysft.data.sources.media_parts import has_stray_mark
from raysft.data.sources.readers import read_raw
from raysft.data.types import MEDIUM, STAND_IN, Example, Medium, Rejected

PNG = b"\x89PNG one"
DATA_URL = "data:image/png;base64," + b64encode(PNG).decode()


def item(record, **options) -> Example | Rejected:
    ((found, _),) = to_examples([("a:1", record)], Source(name="s", **options))
    return found


def turns(record, **options) -> list[tuple[str, str, list[str | bytes]]]:
    """Role, text with ◆ for each image, and images of each turn."""
    found = item(record, **options)
    assert isinstance(found, Example), found
    return [
        (
            message.role,
            message.content.replace(MEDIUM, "◆"),
            [medium.content or medium.location for medium in message.media],
        )
        for message in found.messages
    ]


def reason(record, **options) -> str:
    found = item(record, **options)
    assert isinstance(found, Rejected), found
    assert "\n" not in found.reason
    return found.reason


def openai(*parts, **columns):
    return {"messages": [{"role": "user", "content": list(parts)}, {"role": "assistant", "content": "a"}], **columns}


TEXT = {"type": "text", "text": "q"}


@pytest.mark.parametrize(
    ("part", "image"),
    [
        ({"type": "image", "image": "a.png"}, "a.png"),
        ({"type": "image", "url": "https://x.org/a.png"}, "https://x.org/a.png"),
        ({"type": "image", "path": "/x/a.png"}, "/x/a.png"),
        ({"type": "image", "image": None, "text": None, "path": "a.png"}, "a.png"),
        ({"image": "a.png"}, "a.png"),
        ({"image": "a.png", "text": None, "video": None}, "a.png"),
        ({"image_url": {"url": "s3://b/a.png"}}, "s3://b/a.png"),
        ({"type": "image", "image": "", "text": "", "path": "a.png"}, "a.png"),
        ({"type": "image", "image": "a.png", "min_pixels": None, "max_pixels": None}, "a.png"),
        ({"type": "image", "base64": b64encode(PNG).decode()}, PNG),
        ({"type": "image", "base64": DATA_URL}, PNG),
        ({"type": "image", "source": {"type": "base64", "data": b64encode(PNG).decode()}}, PNG),
        ({"type": "image", "source": {"type": "url", "url": "s3://b/a.png"}}, "s3://b/a.png"),
        ({"type": "image", "image": {"bytes": PNG, "path": "a.png"}}, PNG),
        ({"type": "image", "image": {"bytes": b64encode(PNG).decode()}}, PNG),
        ({"type": "image", "image": {"bytes": None, "path": "a.png"}}, "a.png"),
        ({"type": "image_url", "image_url": {"url": "s3://b/a.png", "detail": "low"}}, "s3://b/a.png"),
        ({"type": "image_url", "image_url": "s3://b/a.png"}, "s3://b/a.png"),
        ({"type": "image_url", "image_url": {"url": DATA_URL}}, PNG),
        ({"type": "input_image", "image_url": DATA_URL}, PNG),
    ],
)
def test_a_part_holds_or_names_its_image(part, image):
    assert turns(openai(TEXT, part)) == [("user", "q◆", [image]), ("assistant", "a", [])]


def test_parts_keep_their_order_and_the_record_keeps_no_parts_for_the_template():
    record = openai(
        {"type": "image", "image": "1"}, {"type": "input_text", "text": "and"}, {"type": "image", "image": "2"}, TEXT
    )
    assert turns(record)[0] == ("user", "◆and◆q", ["1", "2"])
    found = item(record)
    assert isinstance(found, Example)
    assert [message.original for message in found.messages] == [None, None]


def test_parts_need_no_type():
    record = openai({"image": "1"}, {"text": "q"}, {"image": {"bytes": PNG}})
    assert turns(record)[0] == ("user", "◆q◆", ["1", PNG])
    assert turns(openai({"text": "q"}, {"text": "r"}))[0] == ("user", "qr", [])


def test_parts_may_say_which_image_of_the_column_they_show():
    def shown(*indices) -> list[str | bytes]:
        parts = [{"type": "image", "index": index, "text": None} for index in indices]
        return turns(openai(*parts, {**TEXT, "index": None}, images=["1", "2"]))[0][2]

    assert shown(0, 1) == shown(None, None) == ["1", "2"]
    assert shown(1, 0) == ["2", "1"]
    assert shown(1, 0, 1) == ["2", "1", "2"]
    assert shown(3, 5) == ["1", "2"]  # places of something else
    assert "2 and the images column 3" in reason(
        openai({"type": "image", "index": 0}, {"type": "image", "index": 0}, images=["1", "2", "3"])
    )


@pytest.mark.parametrize("key", ["images", "image"])
def test_a_turn_may_have_images_of_its_own(key):
    """Before its text, as Ollama shows them, or where its marks are."""
    record = {
        "messages": [
            {"role": "system", "content": "<image> is a tag", key: []},
            {"role": "user", "content": "q", key: ["1", {"bytes": PNG}]},
            {"role": "assistant", "content": "a", key: None},
            {"role": "user", "content": "this <image>, not <image>", key: ["2", "3"]},
            {"role": "assistant", "content": "a"},
            {"role": "user", "content": [TEXT, {"type": "image"}, TEXT], key: "4"},
            {"role": "assistant", "content": "a"},
            {"role": "user", "content": "<image>"},
            {"role": "assistant", "content": "b", key: ["6"]},
        ],
        "images": ["5"],
    }
    found = turns(record)
    assert [text for _, text, _ in found[1:]] == ["◆◆q", "a", "this ◆, not ◆", "a", "q◆q", "a", "◆", "◆b"]
    assert [images for _, _, images in found[1:]] == [["1", PNG], [], ["2", "3"], [], ["4"], [], ["5"], ["6"]]
    example = item(record)
    assert isinstance(example, Example)
    assert not any(key in message.extra for message in example.messages)
    assert all(message.original is None for message in example.messages if message.media)
    of_human = {"conversations": [{"from": "human", "value": "<image>q", key: "1"}, {"from": "gpt", "value": "a"}]}
    assert turns(of_human)[0] == ("user", "◆q", ["1"])


def test_an_answer_that_is_an_image_alone_is_shown_and_not_trained_and_as_the_last_one_is_no_answer():
    """As an answer without text is none: media tokens have no labels, so that its end would be all there is to train."""
    image = [{"type": "image", "image": "1"}, {"type": "text", "text": "\n"}]
    question, shown = {"role": "user", "content": "q"}, {"role": "assistant", "content": image}
    said = {"role": "assistant", "content": [*image, {"type": "text", "text": "a"}]}
    found = item({"messages": [question, shown, question, said]})
    assert isinstance(found, Example)
    assert [message.trainable for message in found.messages] == [True, False, True, True]
    assert found.messages[1].content == f"{MEDIUM}\n"
    for record in (
        {"messages": [question, said, question, shown]},
        {"instruction": "q", "output": "<image>", "history": [["q", "a"]], "images": ["1"]},
        {"prompt": [question, said, question], "completion": [shown]},
        {"turns": ["q", "a", "q", "<image>"], "images": ["1"]},
    ):
        found = item(record)
        assert isinstance(found, Example), found
        assert found.unanswered == "turn 3 of the assistant is an image without text, but raysft trains on text"
        assert [message.content for message in found.messages[2:]] == ["q", STAND_IN]


def test_pairs_of_questions_and_answers_follow_the_images():
    pairs = [{"user": "q", "assistant": "a", "source": "s"}, {"user": "r", "assistant": "b", "source": "s"}]
    images = [{"bytes": PNG, "path": None}, {"bytes": None, "path": "2"}]
    expected = [("user", "◆◆q", [PNG, "2"]), ("assistant", "a", []), ("user", "r", []), ("assistant", "b", [])]
    assert turns({"images": images, "texts": pairs}) == expected
    assert turns({"images": images, "texts": json.dumps(pairs), "system": "s"})[1:] == expected
    assert turns({"images": [], "texts": pairs})[0] == ("user", "q", [])
    marked = [pairs[0], {"user": "<image>r<image>", "assistant": "b"}]
    assert [content for _, content, _ in turns({"images": images, "texts": marked})] == ["q", "a", "◆r◆", "b"]
    assert "texts[0] must have 'user' and 'assistant'" in reason({"images": images, "texts": [{"user": "q"}]})
    assert "turn 1 of the assistant is empty" in reason(
        {"texts": [{"user": "q", "assistant": ""}, pairs[1]], "images": images}
    )


def test_parts_without_a_value_take_the_images_of_the_column_in_the_order_of_the_turns():
    bare = {"type": "image", "text": None}
    record = {
        "messages": [
            {"role": "user", "content": [bare, TEXT]},
            {"role": "assistant", "content": [{"type": "text", "text": "<image> is a tag"}]},
            {"role": "user", "content": [TEXT, bare, {"type": "image", "image": "own"}, bare]},
            {"role": "assistant", "content": "a"},
        ],
        "images": ["1", {"bytes": PNG, "path": None}, "3"],
    }
    assert turns(record) == [
        ("user", "◆q", ["1"]),
        ("assistant", "<image> is a tag", []),
        ("user", "q◆◆◆", [PNG, "own", "3"]),
        ("assistant", "a", []),
    ]


RECORDS: list[dict[str, Any]] = [
    {"instruction": "<image>q", "input": "x<image>", "output": "a"},
    {"instruction": "q<image>", "output": "a", "history": [["<image>", "b"]]},
    {"conversations": [{"from": "human", "value": "<image>q<image>"}, {"from": "gpt", "value": "a"}]},
    {"messages": [{"role": "user", "content": "<image>q<image>"}, {"role": "assistant", "content": "a"}]},
    {"prompt": [{"role": "user", "content": "<image>q<image>"}], "completion": [{"role": "assistant", "content": "a"}]},
    {"turns": ["<image>q<image>", "a"]},
]


@pytest.mark.parametrize(
    "record", RECORDS, ids=[f"{next(iter(record))}{index}" for index, record in enumerate(RECORDS)]
)
def test_marks_take_the_images_of_the_column(record):
    found = turns({**record, "images": ["1", DATA_URL]})
    assert [image for _, _, images in found for image in images] == ["1", PNG]
    for _, text, images in found:
        assert "<image>" not in text
        assert text.count("◆") == len(images)
    # Without images, null and empty, the same words are text, as in HTML.
    for columns in ({}, {"images": None}, {"images": []}, {"images": ""}, {"images": [None]}):
        plain = turns({**record, **columns})
        assert sum(text.count("<image>") for _, text, _ in plain) == 2
        assert not any(images for _, _, images in plain)


def test_a_column_may_hold_one_image_and_have_another_name():
    record = {"instruction": "<image>q", "output": "a", "picture": {"bytes": PNG}}
    options = {"columns": {"images": "picture"}}
    assert turns(record, **options)[0] == ("user", "◆q", [PNG])
    assert turns({**record, "picture": "a.png"}, **options)[0][2] == ["a.png"]
    assert turns({**record, "picture": '["[1].png"]'}, **options)[0][2] == ["[1].png"]
    assert turns({**record, "picture": "[1].png"}, **options)[0][2] == ["[1].png"]
    assert turns(record)[0] == ("user", "<image>q", [])
    assert turns({**record, "images": ["x"]}, columns={"images": None})[0] == ("user", "<image>q", [])


def test_the_only_image_may_be_in_a_column_of_the_singular():
    for record in (
        {"conversations": [{"from": "human", "value": "<image>\nq"}, {"from": "gpt", "value": "a"}], "image": "1"},
        {"instruction": "<image>", "input": "q", "output": "a", "image": {"bytes": None, "path": "1"}, "images": None},
        openai({"type": "image"}, {"type": "text", "text": "\nq"}, image=["1"]),
    ):
        assert turns(record)[0] == ("user", "◆\nq", ["1"])
    # Not where no mark asks for one, where the text is not of a user, or where the column is read as something else or not at all.
    assert "1 and the images column 0" in reason(openai({"type": "image"}, image=None))
    plain = {"instruction": "q", "output": "a", "image": "1"}  # may be anything
    assert turns(plain)[0] == ("user", "q", [])
    assert turns({**plain, "system": "<image>"})[1] == ("user", "q", [])
    marked = {"instruction": "<image>q", "output": "a", "image": "1"}
    assert turns({**marked, "images": ["2"]})[0][2] == ["2"]
    assert turns(marked, columns={"input": "image"})[0] == ("user", "<image>q\n1", [])
    for ignoring in ({"images": None}, {"images": "other"}):
        assert turns(marked, columns=ignoring)[0] == ("user", "<image>q", [])


@pytest.mark.parametrize(
    "image", ["a.PNG", ["x/a.jpeg"], {"path": "a.png"}, {"bytes": PNG}, PNG, DATA_URL, {"<image_00>": "a.png"}], ids=str
)
def test_an_image_without_a_mark_is_not_left_out_in_silence(image):
    for record in (
        {"instruction": "q", "output": "a"},
        {"text": "t"},
        {"prompt": "p", "completion": "c"},
        {"turns": ["q", "a"]},
        openai(TEXT),
    ):
        found = reason({**record, "image": image})
        assert "columns: {images: null}" in found
        assert "image" in found
        assert isinstance(item({**record, "image": image}, columns={"images": None}), Example)
    own = openai({"type": "image", "image": "own.png"}, image=image)
    assert turns(own)[0][2] == ["own.png"]


@pytest.mark.parametrize(
    ("text", "stray"),
    [
        ("<image>q", True), ("<image 1>q", True), ("<image_00>q", True), ("<|image_1|>q", True), ("<img>a.png</img>q", True),
        ('[{"type": "image", "image": "a.png"}]', True), ("<video>q", True), ("<audio>", True),
        ("<img src='a.png'> <images> image_1", False),
    ],
)  # fmt: skip
def test_marks_of_any_program_are_found_where_there_is_no_image(text, stray):
    record = {"conversations": [{"from": "human", "value": text}, {"from": "gpt", "value": "a"}]}
    found = item(record)
    assert isinstance(found, Example)
    assert has_stray_mark(found.messages) == stray
    silent = {
        "conversations": [
            {"from": "system", "value": text},
            {"from": "human", "value": "q"},
            record["conversations"][1],
        ]
    }
    found = item(silent)
    assert isinstance(found, Example)
    assert not has_stray_mark(found.messages)
    for column in ("video", "audio"):
        kind = item({**record, column: "x.mp4"})
        assert isinstance(kind, Rejected if stray else Example)
    assert isinstance(item({**silent, "video": "x.mp4"}), Example)


def test_marks_in_the_system_text_are_words():
    record = {
        "conversations": [
            {"from": "system", "value": "Look where <image> is."},
            {"from": "human", "value": "<image>"},
            {"from": "gpt", "value": "a"},
        ],
        "images": ["1"],
    }
    assert turns(record)[:2] == [("system", "Look where <image> is.", []), ("user", "◆", ["1"])]


def test_marks_and_images_must_agree_in_number():
    record = {"instruction": "<image>q", "output": "a"}
    assert "1 and the images column 2" in reason({**record, "images": ["1", "2"]})
    named = reason({**record, "instruction": "<image><image>", "images": ["1"]})
    assert "2 and the images column 1" in named
    assert "give all images as content parts, in which case <image> is treated as plain text" in named
    assert turns(openai({"image": "1"}, {"text": "<image>"}))[0] == ("user", "◆<image>", ["1"])
    assert "0 and the images column 1" in reason({**record, "instruction": "q", "images": "1"})
    assert "columns: {images: null}" in reason({**record, "instruction": "q", "images": "1"})
    assert "1 and the images column 0" in reason(openai({"type": "image"}, TEXT))
    assert "columns: {images: COLUMN}" in reason(openai({"type": "image"}, TEXT, picture="1"))
    assert "2 and the images column 1" in reason(openai({"type": "image"}, {"type": "image"}, images=["1"]))


@pytest.mark.parametrize(
    ("record", "words"),
    [
        ({"text": "t", "images": ["1"]}, "only conversations"),
        ({"input_ids": [1, 2], "images": ["1"]}, "only conversations"),
        ({"prompt": "p", "completion": "c", "images": ["1"]}, "only conversations"),
        ({"turns": ["q", "a"], "videos": ["v.mp4"]}, "has videos (videos)"),
        ({"turns": ["q", "a"], "audios": "v.wav"}, "has audio (audios)"),
        (openai({"type": "video", "video": "v.mp4"}), "part of type 'video'"),
        (openai({"type": "input_audio", "input_audio": {"data": "", "format": "wav"}}), "part of type 'input_audio'"),
        (openai({"type": "image", "image": "a", "max_pixels": 9}), "remove it, and set data.image_max_pixels"),
        (openai({"image": "a", "text": "q"}), "has both text and image"),
        (openai({"type": "image_url", "image_url": "a", "text": "q"}), "has both text and image_url"),
        (openai({"type": "text", "text": "", "image": "a"}), "is of type text, but has image"),
        (openai({"type": "image", "file": "a.png"}, images=["b.png"]), "has 'file' in place of one"),
        (openai({"type": "input_image", "file_id": "file-1"}), "has 'file_id' in place of one"),
        (openai({"video": "v.mp4"}), "part of type 'video'"),
        (openai({"value": "q"}), "part of type None"),
        (openai({"type": "image", "source": {"type": "base64", "data": "@@"}}), "base64"),
        (
            {"messages": [{"role": "user", "content": "q", "videos": ["v"]}, {"role": "assistant", "content": "a"}]},
            "has videos",
        ),
        (
            {
                "messages": [
                    {"role": "user", "content": "<image>q", "images": ["1", "2"]},
                    {"role": "assistant", "content": "a"},
                ]
            },
            "the text has 1 and the turn has 2 images (messages[0]); write <image>",
        ),
        (
            {
                "messages": [
                    {"role": "user", "content": "q"},
                    {"role": "function_call", "content": "{}", "images": ["1"]},
                ]
            },
            "call",
        ),
        (openai({"type": "image", "image": 3}), "must be a path"),
        (
            {"messages": [{"role": "user", "content": "q"}, {"role": "function_call", "content": [{"type": "image"}]}]},
            "call",
        ),
        (openai({"type": "image", "image": {"bytes": b""}}), "empty"),
        (openai({"type": "image", "image": {"width": 3}}), "bytes or a path"),
        (openai({"type": "image", "image": "data:image/png;base64"}), "no comma"),
        (openai({"type": "image", "image": "data:image/png;base64,@@"}), "base64"),
        (openai({"type": "text", "text": f"q{MEDIUM}"}), "U+F1A9E"),
        ({"turns": [MEDIUM, "a"]}, "U+F1A9E"),
        ({"turns": ["q", "a"], "tools": json.dumps([{"name": MEDIUM}])}, "U+F1A9E"),
        ({"instruction": "<image>", "output": "a", "images": ["1", None]}, "images[1]"),
        ({"messages": [{"role": "user", "content": ["q"]}, {"role": "assistant", "content": "a"}]}, "a list of parts"),
        ({"instruction": "<image>", "output": "a", "images": [["1", "2"]]}, "images[0]"),
    ],
)
def test_what_cannot_be_used_is_rejected_in_one_line(record, words):
    assert words in reason(record)


def test_a_data_url_need_not_be_base64_and_long_base64_needs_no_header():
    assert turns(openai({"type": "image", "image": "data:image/svg+xml,%3Csvg%20"}))[0][2] == [b"<svg "]
    content = PNG * 1000
    assert turns(openai({"type": "image", "image": b64encode(content).decode()}))[0][2] == [content]


@pytest.mark.parametrize("form", ["PNG", "JPEG", "GIF", "WEBP"])
def test_base64_of_a_small_image_is_no_path(form):
    stream = BytesIO()
    Image.new("RGB", (8, 8), (200, 0, 0)).save(stream, form)
    text = b64encode(stream.getvalue()).decode()
    assert len(text) < 1024
    assert turns(openai({"type": "image", "image": text}))[0][2] == [stream.getvalue()]
    for path in ("/9j/a.jpg", f"/9j/{'a' * 80}.jpg", "iVBORw0KGgo"):
        assert turns(openai({"type": "image", "image": path}))[0][2] == [path]


def of_table(table: pa.Table, folder: Path) -> list[Example]:
    pq.write_table(table, folder / "a.parquet")
    source = Source(name="s", path=str(folder / "a.parquet"))
    (file,) = find_files(source)
    found = [found for found, _ in to_examples(((place, raw) for place, _, raw in read_raw(file)), source)]
    examples = [each for each in found if isinstance(each, Example)]
    assert len(examples) == len(found), found
    return examples


def test_parquet_files_of_well_known_kinds_are_read(tmp_path):
    """Those of The Cauldron and FineVision, of the mixes for TRL, and of LLaVA's later ones; each with an example of text alone."""
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    image = {"bytes": PNG, "path": None}
    parts = pa.struct([("index", pa.int64()), ("text", pa.string()), ("type", pa.string())])
    turns = pa.list_(pa.struct([("content", pa.list_(parts)), ("role", pa.string())]))
    question, shown = {"index": None, "text": "q", "type": "text"}, {"index": 0, "text": None, "type": "image"}
    answer = {"role": "assistant", "content": [{"index": None, "text": "a", "type": "text"}]}
    asked = [[{"role": "user", "content": parts}, answer] for parts in ([shown, question], [question])]
    said = [[{"from": "human", "value": text}, {"from": "gpt", "value": "a"}] for text in ("<image>q", "q")]
    images = pa.array([[image], None], pa.list_(kind))
    for columns in (
        {"images": images, "texts": [[{"user": "q", "assistant": "a", "source": "x"}]] * 2, "source": ["x", "y"]},
        {"messages": pa.array(asked, turns), "images": images},
        {"id": ["1", "2"], "image": pa.array([image, None], kind), "conversations": said, "data_source": ["x", "y"]},
    ):
        examples = of_table(pa.table(columns), tmp_path)
        assert [[message.content for message in each.messages] for each in examples] == [
            [f"{MEDIUM}q", "a"],
            ["q", "a"],
        ]
        assert [each.messages[0].media for each in examples] == [(Medium("image", "", PNG),), ()]


def test_images_of_a_parquet_file_are_read_as_datasets_writes_them(tmp_path):
    """Bytes that are UTF-8 by chance, as those of a small PGM image, are bytes as well."""
    ascii_image = b"P5 2 1 127\n\x00\x7f"
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    question = {"role": "user", "content": [{"type": "image", "text": None}, TEXT]}
    answer = {"role": "assistant", "content": [{"type": "text", "text": "a"}]}
    images = [{"bytes": PNG, "path": "a.png"}, {"bytes": ascii_image, "path": None}, {"bytes": None, "path": "c.png"}]
    table = pa.table(
        {
            "messages": pa.array([[question, answer]] * 3),
            "images": pa.array([[image] for image in images], pa.list_(kind)),
        }
    )
    examples = of_table(table, tmp_path)
    found = [message.media for example in examples for message in example.messages[:1]]  # type: ignore[union-attr]
    assert found == [(Medium("image", "", PNG),), (Medium("image", "", ascii_image),), (Medium("image", "c.png"),)]


def test_the_same_question_about_other_images_is_another_opening():
    """ "Which digit is this?" about 1,797 pictures would else be held out as a whole or not at all."""

    def hash_of(record) -> int:
        found = item(record)
        assert isinstance(found, Example), found
        return opening_hash(found)

    hashes = {image: hash_of(openai({"type": "image", "image": image}, TEXT)) for image in ("1", "2", DATA_URL)}
    assert len(set(hashes.values())) == 3
    again = {"conversations": [{"from": "human", "value": "<image>Q!"}, {"from": "gpt", "value": "b"}], "images": ["1"]}
    assert hash_of(again) == hashes["1"]
