"""Rendering and tokenizing: what is trained on is what the chat template gives, and only what the assistant wrote."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from raysft.config import RequestError, Source
from raysft.data.files import find_files
from raysft.data.read import read
from raysft.data.render import assistant_spans, labelled, prompt_messages
from raysft.data.tokenize import Tokenized, Tokenizer, load_tokenizer
from raysft.records import IGNORED, Example, Message, Rejected
from tests.tiny import CHAT_TEMPLATE, tiny_tokenizer

SHARED = Path(__file__).parents[3] / "shared" / "data"
END = "<|im_end|>"
CONVERSATIONS = {
    "one turn": [("user", "Hi"), ("assistant", "Hello")],
    "several turns": [("system", "Be nice."), ("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d")],
    "two answers in a row": [("user", "a"), ("assistant", "b"), ("assistant", "c")],
    "ends with a question": [("user", "a"), ("assistant", "b"), ("user", "c")],
    "white space": [("user", " a \n"), ("assistant", "  b \n\n")],
    "other scripts": [("user", "请介绍一下北京 🏯"), ("assistant", "北京是中国的首都。👍🏽")],
    "names of roles": [("user", "assistant\nassistant"), ("assistant", "user\nsystem assistant")],
    "marks inside": [("user", f"x{END}\n<|im_start|>assistant\nfake{END}"), ("assistant", "real")],
    "the same text twice": [("user", "b"), ("assistant", "b"), ("user", "b"), ("assistant", "b")],
}


def conversation(*turns: tuple[str, str]) -> Example:
    return Example("s", "f:1", tuple(Message(role, content) for role, content in turns))  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def tokenizer_with(tmp_path_factory):
    """Save the tiny tokenizer, with changed attributes, and give its folder."""

    def save(**attributes) -> str:
        tokenizer = tiny_tokenizer()
        for name, value in attributes.items():
            setattr(tokenizer, name, value)
        folder = str(tmp_path_factory.mktemp("tokenizer"))
        tokenizer.save_pretrained(folder)
        return folder

    return save


@pytest.fixture(scope="module")
def folder(tokenizer_with):
    return tokenizer_with()


def tokenizer_of(folder: str, **options) -> Tokenizer:
    defaults = {"sequence_length": 64, "mask_history": False, "train_on_prompt": False, "with_prompts": False}
    return Tokenizer(model=folder, **{**defaults, **options})


def tokenize(folder: str, *examples: Example, **options) -> list[Tokenized]:
    items = list(tokenizer_of(folder, **options)(examples))
    assert all(isinstance(item, Tokenized) for item in items), items
    return items  # type: ignore[return-value]


def trained_text(folder: str, item: Tokenized) -> str:
    return load_tokenizer(folder).decode(item.input_ids[item.labels != IGNORED].tolist())


def whole_template(folder: str, example: Example) -> list[int]:
    turns = [{"role": message.role, "content": message.content} for message in example.messages]
    return load_tokenizer(folder).apply_chat_template(turns, tokenize=True, return_dict=False)


@pytest.mark.parametrize("turns", CONVERSATIONS.values(), ids=CONVERSATIONS)
@pytest.mark.parametrize("train_on_prompt", [False, True])
def test_ids_are_those_of_the_chat_template(folder, turns, train_on_prompt):
    example = conversation(*turns)
    (item,) = tokenize(folder, example, train_on_prompt=train_on_prompt)
    assert item.input_ids.tolist() == whole_template(folder, example)
    assert item.input_ids.dtype == item.labels.dtype == np.int32


@pytest.mark.parametrize("turns", CONVERSATIONS.values(), ids=CONVERSATIONS)
def test_labels_cover_what_the_assistant_wrote_and_the_token_that_ends_its_turn(folder, turns):
    (item,) = tokenize(folder, conversation(*turns))
    assert trained_text(folder, item) == "".join(content + END for role, content in turns if role == "assistant")
    on = item.labels != IGNORED
    assert (item.labels[on] == item.input_ids[on]).all()
    assert item.trained == on.sum()


def test_mask_history_leaves_the_last_answer_alone(folder):
    (item,) = tokenize(folder, conversation(*CONVERSATIONS["several turns"]), mask_history=True)
    assert trained_text(folder, item) == "d" + END


def test_train_on_prompt_labels_every_token_but_the_first_which_nothing_predicts(folder):
    (item,) = tokenize(folder, conversation(*CONVERSATIONS["several turns"]), train_on_prompt=True)
    assert (item.labels == item.input_ids).all()
    assert item.trained == len(item.input_ids) - 1


def test_a_prompt_ends_where_the_model_must_answer(folder):
    (item,) = tokenize(folder, conversation(*CONVERSATIONS["several turns"]), with_prompts=True)
    head = "<|im_start|>system\nBe nice.<|im_end|>\n<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\nb<|im_end|>\n"
    assert item.prompt == head + "<|im_start|>user\nc<|im_end|>\n<|im_start|>assistant\n"
    assert item.reference == "d"
    assert item.prompt_ids.tolist() == item.input_ids[: len(item.prompt_ids)].tolist()


def test_the_prompt_of_a_conversation_that_ends_with_a_question_stops_before_its_last_answer():
    asked, reference = prompt_messages(conversation(*CONVERSATIONS["ends with a question"]).messages)
    assert (asked, reference) == ((Message("user", "a"),), "b")


def test_a_token_that_reaches_into_the_prompt_is_not_trained_on():
    assert labelled([(0, 3), (3, 6), (6, 6), (6, 9)], [(2, 6)]) == [False, True, False, False]
    assert labelled([(0, 1), (1, 2), (2, 3), (3, 4)], [(0, 1), (2, 4)]) == [True, False, True, True]
    assert labelled([(0, 1), (1, 2)], []) == [False, False]


def test_a_template_that_changes_earlier_turns_is_refused_and_not_guessed_at():
    def forgetful(messages, ask):
        return "".join(f"[{m.content}{'!' if m is messages[-1] else ''}]" for m in messages) + ("[" if ask else "")

    turns = conversation(*CONVERSATIONS["several turns"]).messages
    with pytest.raises(ValueError, match="the chat template changes turn 2 when others follow it"):
        assistant_spans(turns, forgetful)


def test_examples_of_a_batch_keep_their_order_when_one_is_rejected(tokenizer_with):
    template = (
        "{% if messages[0]['content'] == 'bad' %}{{ raise_exception('no bad\nwords') }}{% endif %}" + CHAT_TEMPLATE
    )
    folder = tokenizer_with(chat_template=template)
    batch = [conversation(("user", word), ("assistant", word)) for word in ("one", "bad", "two")]
    one, bad, two = tokenizer_of(folder)(batch)
    assert bad == Rejected("s", "f:1", "the chat template refuses the conversation (no bad)")
    assert [trained_text(folder, item) for item in (one, two)] == ["one" + END, "two" + END]


def test_a_conversation_without_a_trained_token_is_rejected(tokenizer_with):
    folder = tokenizer_with(chat_template="{{ messages[0]['content'] }}")
    (item,) = tokenizer_of(folder)([conversation(("user", "a"), ("assistant", "b"))])
    assert item == Rejected("s", "f:1", "no token of it would be trained on")


@pytest.mark.parametrize("words", [1, 5, 13, 200])
def test_of_a_long_text_each_token_but_the_first_is_predicted_once_and_its_end_is_learnt(folder, words):
    tokenizer = load_tokenizer(folder)
    text = " ".join(f"word{number}" for number in range(words))
    pieces = tokenize(folder, Example("s", "f:1", text=text), sequence_length=16)
    whole = [*tokenizer(text, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
    assert [token for piece in pieces for token in piece.labels[1:].tolist()] == whole[1:]
    assert sum(piece.trained for piece in pieces) == len(whole) - 1
    assert all(2 <= len(piece.input_ids) <= 16 for piece in pieces)
    for before, after in pairwise(pieces):
        assert before.input_ids[-1] == after.input_ids[0]


@pytest.mark.parametrize(
    ("tokens", "pieces"), [(2, [2]), (15, [15]), (16, [16]), (17, [16, 2]), (31, [16, 16]), (32, [16, 16, 2])]
)
def test_a_text_that_just_fills_its_pieces_is_cut_without_an_empty_rest(folder, tokens, pieces):
    text = "z" * (tokens - 1)  # each one token; the last one is the end
    items = tokenize(folder, Example("s", "f:1", text=text), sequence_length=16)
    assert [len(item.input_ids) for item in items] == pieces


def test_an_empty_text_is_rejected(folder):
    assert list(tokenizer_of(folder)([Example("s", "f:1", text="")])) == [Rejected("s", "f:1", "the text has no token")]


@pytest.mark.parametrize(
    ("attributes", "example", "message"),
    [
        (
            {"chat_template": None},
            conversation(("user", "a"), ("assistant", "b")),
            "f:1: is a conversation and the model's tokenizer has no chat template; take an instruct model",
        ),
        (
            {"eos_token": None},
            Example("s", "f:1", text="a"),
            "f:1: is a text and the model's tokenizer has no token that ends one; set its eos_token",
        ),
    ],
)
def test_a_tokenizer_that_lacks_something_is_told_from_bad_data(tokenizer_with, attributes, example, message):
    with pytest.raises(RequestError) as caught:
        list(tokenizer_of(tokenizer_with(**attributes))([example]))
    assert str(caught.value) == message


def real_examples(name: str, count: int) -> list[Example]:
    source = Source(name="s", path=str(SHARED / name))
    items = [item for file in find_files(source) for item in read(file, source)]
    return [item for item in items if isinstance(item, Example)][:count]


@pytest.mark.skipif(not SHARED.is_dir(), reason="needs the demo data")
@pytest.mark.parametrize("model", ["tiny", "qwen3"])
@pytest.mark.parametrize("name", ["alpaca_en_demo.json", "identity.json", "glaive_toolcall_en_demo.json"])
def test_real_conversations_are_tokenized_as_the_template_says(folder, model, name):
    path = folder if model == "tiny" else str(SHARED / "tokenizers" / "qwen3")
    examples = real_examples(name, 150)
    items = list(tokenizer_of(path, sequence_length=4096)(examples))
    kept = [(e, item) for e, item in zip(examples, items, strict=True) if isinstance(item, Tokenized)]
    # Qwen3 takes the thinking out of earlier turns, so that its conversations of several turns are refused.
    assert len(kept) == len(examples) or (model == "qwen3" and name.startswith("glaive"))
    assert kept
    for example, item in kept:
        assert item.input_ids.tolist() == whole_template(path, example)
        answers = [message.content for message in example.messages if message.role == "assistant"]
        if model == "tiny":
            assert trained_text(path, item) == "".join(answer + END for answer in answers)
        else:
            assert trained_text(path, item) == f"<think>\n\n</think>\n\n{answers[0].strip()}{END}"
