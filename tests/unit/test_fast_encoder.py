"""fastokens is used only if it gives the same tokens as the tokenizer."""

from __future__ import annotations

import json
import random
import sys

import pytest
import tokenizers
from transformers import AutoTokenizer

from raysft.data.tokenization.fast_encoder import FastEncoder
from raysft.errors import RequestError
from tests import samples
from tests.tiny import tiny_tokenizer

ALPHABETS = (
    "abcdefghijklmnopqrstuvwxyz      ABC",
    "aeiou  \n\t\r.,;:'\"!?()[]{}0123456789",
    "äöüßéèñçøåæœﬁﬂ½Ⅷ e\u0301o\u0308",
    "中文日本語テスト한국어 ไทย عربي हिन्दी עברית ελληνικά русский",
    "😀👨👩👧🏽🇩🇪\u200d\ufe0f \u00a0\u2003\u3000\ufeff\u200b\u0000\u0007\u2028",
    "\U00020000\U000e0061\ue000\uffff\U0010ffff𝔘𝕏 a",
)


def texts(added: list[str], count: int) -> list[str]:
    chance = random.Random(0)
    pieces = [*ALPHABETS, "".join(ALPHABETS)]
    made = []
    for _ in range(count):
        words = [
            "".join(chance.choices(chance.choice(pieces), k=chance.randint(0, 40)))
            for _ in range(chance.randint(0, 12))
        ]
        if chance.random() < 0.3:
            words.insert(chance.randint(0, len(words)), chance.choice(added))
        made.append(chance.choice(("", " ", "\n")).join(words))
    return made


@pytest.mark.parametrize("special", [False, True])
@pytest.mark.parametrize("folder", [None, *samples.tokenizers()], ids=str)
def test_any_text_has_the_tokens_of_the_tokenizer(folder, special):
    backend = (AutoTokenizer.from_pretrained(folder) if folder else tiny_tokenizer()).backend_tokenizer
    encode = FastEncoder(backend)
    assert encode.fast is not None
    written = texts([token.content for token in backend.get_added_tokens_decoder().values()], 4_000)
    expected = backend.encode_batch_fast(written, add_special_tokens=special)
    for text, ids, encoding in zip(written, encode(written, special), expected, strict=True):
        assert ids.tolist() == encoding.ids, text


def test_a_byte_that_the_vocabulary_lacks_is_skipped_as_the_tokenizer_does():
    described = json.loads(tiny_tokenizer().backend_tokenizer.to_str())
    vocabulary = described["model"]["vocab"]
    vocabulary["nothing"] = vocabulary.pop("ē")  # as byte-level BPE writes 0x13
    backend = tokenizers.Tokenizer.from_str(json.dumps(described))
    encode = FastEncoder(backend)
    assert encode.fast is not None
    written = ["Hi", "Hi \x13 there", "Berlin"]
    expected = [backend.encode(text, add_special_tokens=False).ids for text in written]
    assert [ids.tolist() for ids in encode(written)] == expected


def test_special_tokens_around_a_text_are_those_of_the_tokenizer():
    backend = tiny_tokenizer().backend_tokenizer
    end = backend.get_added_tokens_decoder()[0].content
    backend.post_processor = tokenizers.processors.TemplateProcessing(f"{end} $A {end}", special_tokens=[(end, 0)])
    encode = FastEncoder(backend)
    (ids,) = encode(["a b"], add_special_tokens=True)
    assert encode.fast is not None
    assert ids.tolist() == [0, *backend.encode("a b", add_special_tokens=False).ids, 0]


def test_a_tokenizer_of_another_kind_encodes_itself():
    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0, "b": 1, "?": 2}, unk_token="?"))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    encode = FastEncoder(backend)
    assert encode.fast is None
    assert [ids.tolist() for ids in encode(["a b c", ""])] == [[0, 1, 2], []]


def test_without_fastokens_the_tokenizer_encodes(monkeypatch):
    monkeypatch.setitem(sys.modules, "fastokens", None)
    backend = tiny_tokenizer().backend_tokenizer
    encode = FastEncoder(backend)
    assert encode.fast is None
    assert [ids.tolist() for ids in encode(["Hello there"])] == [backend.encode("Hello there").ids]


class _Wrong:
    """Gives one token too many for each text that contains a word."""

    def __init__(self, fast, word: str) -> None:
        self.fast, self.word = fast, word

    def encode_batch_flat(self, texts: list[str], special: bool) -> tuple[bytes, bytes]:
        return self.fast.encode_batch_flat([text.replace(self.word, self.word + " x") for text in texts], special)


@pytest.mark.parametrize("word", ["Hello", "façade", "한국어"])
def test_different_tokens_for_a_probe_disable_fastokens(monkeypatch, word):
    import fastokens

    right = fastokens.Tokenizer.from_json_str

    class Tokenizer:
        @staticmethod
        def from_json_str(text):
            return _Wrong(right(text), word)

    monkeypatch.setattr(fastokens, "Tokenizer", Tokenizer)
    assert FastEncoder(tiny_tokenizer().backend_tokenizer).fast is None


def test_different_tokens_for_a_text_of_a_batch_are_an_error():
    encode = FastEncoder(tiny_tokenizer().backend_tokenizer)
    encode.fast = _Wrong(encode.fast, "rare")
    encode(["a", "b", "c"])
    with pytest.raises(RequestError, match=r"different tokens for 'a rare word'.*pip uninstall fastokens"):
        encode(["a", "a rare word", "c"])


def test_a_vocabulary_that_lacks_bytes_of_the_probes_still_uses_fastokens():
    whole = json.loads(tiny_tokenizer().backend_tokenizer.to_str())
    vocabulary = whole["model"]["vocab"]
    vocabulary["nothing"] = vocabulary.pop("\u0100")  # as byte-level BPE writes 0
    whole["model"]["merges"] = [pair for pair in whole["model"]["merges"] if "\u0100" not in "".join(pair)]
    backend = tokenizers.Tokenizer.from_str(json.dumps(whole))
    encode = FastEncoder(backend)
    assert encode.fast is not None
    for text in ("Hello there", "a\u0000b"):
        assert [ids.tolist() for ids in encode([text])] == [backend.encode(text, add_special_tokens=False).ids]
