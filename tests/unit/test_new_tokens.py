"""New tokens: rows of the embedding and the head that are means, whatever else the model has unchanged."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from raysft.config import parse, with_overrides
from raysft.data.tokenization.turn_ends import stop_token_ids
from raysft.errors import RequestError
from raysft.estimate.fake_model import model_without_weights, sizes_of
from raysft.generate.engines import create_engine
from raysft.models.new_tokens import with_new_tokens
from raysft.run.inputs import check_model_files
from raysft.train.check_model import check_model
from raysft.train.finetuning import load_model
from tests.shards import data_config, the_set, write_records, written
from tests.tiny import tiny_model

PLAIN, SPECIAL = ["Berlin", "<b>"], ["<|call|>", "<|end|>"]
ROWS = ("model.embed_tokens.weight", "lm_head.weight")


@pytest.fixture(scope="module")
def tied(tmp_path_factory) -> Path:
    return tiny_model(tmp_path_factory.mktemp("tied"))


@pytest.fixture(scope="module")
def untied(tmp_path_factory) -> Path:
    return resized(tiny_model(tmp_path_factory.mktemp("untied")), 448, "bfloat16")


@pytest.fixture(scope="module")
def roomy(tmp_path_factory) -> Path:
    """Embeddings for more tokens than the tokenizer has, as Qwen's."""
    return resized(tiny_model(tmp_path_factory.mktemp("roomy")), 512, "float32")


def resized(folder: Path, rows: int, dtype: str) -> Path:
    """Random weights without ties, with so many rows."""
    config = AutoConfig.from_pretrained(folder)
    config.tie_word_embeddings, config.vocab_size = False, rows
    torch.manual_seed(1)
    AutoModelForCausalLM.from_config(config, dtype=getattr(torch, dtype)).save_pretrained(folder)
    return folder


def make_config(cache: Path, model: Path, new: dict[str, Any] | None = None, **settings: Any) -> Any:
    config = parse(
        {
            "run": {"name": "r", "storage": str(cache)},
            "model": {"path": str(model), "dtype": "float32"},
            "data": {
                "train": [{"name": "a", "path": str(cache / "a.jsonl")}],
                "sequence_length": 64,
                "cache": str(cache),
            },
        }
    )
    new = {"plain": PLAIN, "special": SPECIAL} if new is None else new
    return with_overrides(config, {**{f"model.new_tokens.{key}": value for key, value in new.items()}, **settings})


def extended(cache: Path, model: Path, new: dict[str, Any] | None = None, **settings: Any) -> tuple[Path, list[str]]:
    told: list[str] = []
    files = check_model_files(make_config(cache, model, new, **settings), told.append)
    assert files.embedding_rows == files.hf_config.vocab_size
    return Path(files.model), told


@pytest.mark.parametrize("kind", ["tied", "untied", "roomy"])
def test_new_rows_are_the_mean_of_all_tokens_and_everything_else_stays(request, tmp_path, kind):
    base = request.getfixturevalue(kind)
    folder, told = extended(tmp_path, base)
    before, after = load_file(base / "model.safetensors"), load_file(folder / "model.safetensors")
    former = AutoTokenizer.from_pretrained(base)
    count, rows = len(former), before[ROWS[0]].shape[0]
    ids = [count, count + 1, count + 2, count + 3]
    assert before.keys() == after.keys()
    for name, weight in before.items():
        assert after[name].dtype == weight.dtype
        kept = [row for row in range(rows) if row not in ids] if name in ROWS else slice(None)
        assert torch.equal(after[name][kept], weight[kept])
        if name in ROWS:
            mean = weight[:count].double().mean(0)
            for row in (*ids, *range(rows, len(after[name]))):
                np.testing.assert_allclose(after[name][row].double(), mean, atol=5e-4 if kind == "untied" else 1e-7)
    if rows == 512:
        assert after[ROWS[0]].shape[0] == 512
    else:  # as divisible as before
        size, step = after[ROWS[0]].shape[0], math.gcd(rows, 64)
        assert size % step == 0
        assert count + 4 <= size < max(rows, count + 4) + step
    assert [line for line in told if "4 tokens (Berlin <b> <|call|> <|end|>)" in line]


def test_the_tokenizer_has_them_and_hides_special_ones(tied, tmp_path):
    folder, _ = extended(tmp_path, tied)
    tokenizer, former = AutoTokenizer.from_pretrained(folder), AutoTokenizer.from_pretrained(tied)
    ids = tokenizer("In Berlin<|call|>the <b>cat<|end|>").input_ids
    first = len(former)
    assert [token for token in ids if token >= first] == [first, first + 2, first + 1, first + 3]
    assert tokenizer.decode(ids, skip_special_tokens=True) == "In Berlinthe <b>cat"
    text = "The capital of France is Paris. 你好"
    assert tokenizer(text).input_ids == former(text).input_ids
    assert (tokenizer.chat_template, tokenizer.eos_token) == (former.chat_template, former.eos_token)


def test_descriptions_and_noise(untied, tied, tmp_path):
    described = {"<|call|>": "The capital", "<|end|>": "Berlin"}
    folder, _ = extended(tmp_path, untied, {"plain": PLAIN, "special": SPECIAL, "descriptions": described})
    before, after = load_file(untied / "model.safetensors"), load_file(folder / "model.safetensors")
    tokenizer = AutoTokenizer.from_pretrained(untied)
    for name in ROWS:  # the head's rows from the head
        for at, text in enumerate(described.values()):
            mean = before[name][tokenizer(text).input_ids].double().mean(0)
            np.testing.assert_allclose(after[name][len(tokenizer) + 2 + at].double(), mean, atol=5e-4)
    count = len(AutoTokenizer.from_pretrained(tied))
    exact, _ = extended(tmp_path, tied)
    noisy, _ = extended(tmp_path, tied, {"plain": PLAIN, "special": SPECIAL, "noise": 2.0})
    rows = [load_file(each / "model.safetensors")[ROWS[0]][count : count + 4] for each in (exact, noisy)]
    spread = (rows[1] - rows[0]) * math.sqrt(64)
    assert 1.7 < spread.std() < 2.3
    assert not torch.equal(spread[0], spread[1])


def test_a_model_gets_them_once_and_stays_the_same_folder_without_any(tied, tmp_path):
    assert extended(tmp_path, tied, {}) == (tied, [])
    folder, told = extended(tmp_path, tied)
    assert told
    assert extended(tmp_path, tied) == (folder, [])
    other, _ = extended(tmp_path, tied, {"plain": PLAIN, "special": SPECIAL, "noise": 1.0})
    assert other != folder
    # Those that exist are no new ones.
    same, told = extended(tmp_path, folder)
    assert same == folder
    assert [line for line in told if "already has Berlin <b> <|call|> <|end|> of model.new_tokens;" in line]
    more, _ = extended(tmp_path, folder, {"special": [*SPECIAL, "<|more|>"]})
    count, weights = len(AutoTokenizer.from_pretrained(folder)), load_file(more / "model.safetensors")
    assert len(AutoTokenizer.from_pretrained(more)) == count + 1
    assert torch.equal(weights[ROWS[0]][:count], load_file(folder / "model.safetensors")[ROWS[0]][:count])


@pytest.mark.parametrize("kind", ["plain", "special"])
def test_a_piece_of_the_vocabulary_becomes_a_token_wherever_it_is_spelled_and_keeps_its_row(tied, tmp_path, kind):
    former = AutoTokenizer.from_pretrained(tied)
    piece = next(token for token in former.get_vocab() if token.isascii() and token.isalpha() and len(token) > 1)
    folder, _ = extended(tmp_path, tied, {kind: [piece]})
    tokenizer, index = AutoTokenizer.from_pretrained(folder), former.get_vocab()[piece]
    text = f"1{piece}2 {piece}{piece}"
    assert tokenizer(text).input_ids.count(index) == 3
    assert tokenizer.decode(tokenizer(text).input_ids) == text
    shown = text if kind == "plain" else text.replace(piece, "")
    assert tokenizer.decode(tokenizer(text).input_ids, skip_special_tokens=True) == shown
    assert tokenizer.get_vocab() == former.get_vocab()
    before, after = load_file(tied / "model.safetensors"), load_file(folder / "model.safetensors")
    assert all(torch.equal(after[name], weight) for name, weight in before.items())


@pytest.mark.parametrize(("piece", "text"), [("é", "\ufffd"), ("Ġ", " "), ("Ġthe", " the")])
def test_a_piece_that_no_text_spells_is_refused(tied, tmp_path, piece, text):
    assert piece in AutoTokenizer.from_pretrained(tied).get_vocab()
    with pytest.raises(RequestError, match=f"names '{piece}', but .* stands for '{text}'; name the text"):
        extended(tmp_path, tied, {"plain": ["<new>", piece]})


def test_a_tokenizer_that_skips_ids_is_refused_if_new_tokens_would_get_those_of_others(tied, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(tied, folder)
    content = json.loads((folder / "tokenizer.json").read_text())
    vocabulary = content["model"]["vocab"]
    last = max(vocabulary, key=vocabulary.__getitem__)
    vocabulary[last] += 1
    (folder / "tokenizer.json").write_text(json.dumps(content))
    resized(folder, 448, "float32")
    with pytest.raises(RequestError, match=f"'<b>' would be token {vocabulary[last]}, but that is '{last}'.* gaps"):
        extended(tmp_path, folder, {"plain": ["<b>"]})


@pytest.mark.parametrize("merges", [False, True])
@pytest.mark.parametrize(
    ("new", "told"),
    [
        (["<|b|>", "<|a|>"], r"'<\|b\|>' is token 401, but in the model it is token 400"),
        (["<|a|>"], r"'<\|b\|>' is token 401, but in the model it is no token"),
        (["<|a|>", "<|b|>", "<|c|>"], r"'<\|c\|>' is no token, but in the model it is token 402"),
        ([], r"'<\|a\|>' is token 400, but in the model it is no token"),
        (["<|a|>", "<|b|>"], ""),
    ],
)
def test_an_adapter_whose_embeddings_are_of_other_tokens_is_refused(roomy, tmp_path, merges, new, told):
    folder, _ = extended(tmp_path, roomy, {"special": ["<|a|>", "<|b|>"]})
    adapter = tmp_path / "adapter"
    saved = ["model.embed_tokens", "lm_head"]
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(folder), LoraConfig(modules_to_save=saved))
    model.save_pretrained(adapter)
    AutoTokenizer.from_pretrained(folder).save_pretrained(adapter)
    settings = {"model.adapters": [str(adapter)], "model.new_adapter": merges}
    if told:
        with pytest.raises(RequestError, match=told) as caught:
            extended(tmp_path, roomy, {"special": new}, **settings)
        assert "set model.new_tokens as it was" in str(caught.value)
    else:
        extended(tmp_path, roomy, {"special": new}, **settings)


@pytest.mark.parametrize(
    ("new", "told"),
    [
        ({"plain": ["a", "a"]}, "'a' is named twice"),
        ({"plain": ["a"], "special": ["a"]}, "'a' is named twice"),
        ({"plain": [""]}, "must not be empty"),
        ({"special": [" "]}, "consists only of whitespace"),
        ({"special": ["a"], "descriptions": {"b": "c"}}, "descriptions has 'b', which is not one of the new tokens"),
        ({"special": ["a"], "descriptions": {"a": " "}}, "description of 'a' is empty"),
        ({"special": ["a"], "noise": -1}, "greater than or equal to 0"),
    ],
)
def test_lists_that_cannot_be_meant_are_refused(tied, tmp_path, new, told):
    with pytest.raises(RequestError, match=told):
        make_config(tmp_path, tied, new)


def test_what_new_tokens_cannot_be_combined_with(tied, tmp_path):
    quantized = tiny_model(tmp_path / "quantized")
    description = json.loads((quantized / "config.json").read_text())
    description["quantization_config"] = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    (quantized / "config.json").write_text(json.dumps(description))
    hf_config = AutoConfig.from_pretrained(quantized)
    with pytest.raises(RequestError) as caught:
        with_new_tokens(make_config(tmp_path, quantized), str(quantized), hf_config, print)
    assert "'Berlin', but model.path" in str(caught.value)
    assert "model.quantization" in str(caught.value)
    for target in ("embed_tokens", "lm_head"):
        with pytest.raises(RequestError, match=f"target names '{target}', but model.new_tokens trains it in full"):
            check_model(make_config(tmp_path, tied, **{"model.lora.target": ["q_proj", target]}), str(tied))
    adapter = tmp_path / "adapter"
    get_peft_model(AutoModelForCausalLM.from_pretrained(tied), LoraConfig(target_modules=["q_proj"])).save_pretrained(
        adapter
    )
    with pytest.raises(RequestError, match=r"does not train them; set model\.new_adapter=true"):
        extended(tmp_path, tied, **{"model.adapters": [str(adapter)]})
    folder, _ = extended(tmp_path, tied, **{"model.adapters": [str(adapter)], "model.new_adapter": True})
    assert len(AutoTokenizer.from_pretrained(folder)) == len(AutoTokenizer.from_pretrained(tied)) + 4


@pytest.mark.parametrize("finetuning", ["lora", "oft", "freeze"])
@pytest.mark.parametrize("kind", ["tied", "untied"])
def test_embedding_and_head_are_trained_and_counted(request, tmp_path, kind, finetuning):
    base = request.getfixturevalue(kind)
    settings = {"model.finetuning": finetuning}
    folder, _ = extended(tmp_path, base, **settings)
    config, hf_config = make_config(tmp_path, base, **settings), AutoConfig.from_pretrained(folder)
    model = load_model(config, str(folder))
    trained = {name: weight for name, weight in model.named_parameters() if weight.requires_grad}
    rows = [name for name in trained if "embed_tokens" in name or "lm_head" in name]
    shared = finetuning == "freeze" and kind == "tied"
    assert len(rows) == (1 if shared else 2)
    sizes = sizes_of(model_without_weights(config, hf_config))
    assert sum(weight.elements for weight in sizes.trained) == sum(weight.numel() for weight in trained.values())


@pytest.mark.parametrize("batching", ["static", "continuous"])
def test_generation_stops_at_a_new_token_that_ends_turns(untied, tmp_path, batching):
    template = (
        "{% for m in messages %}{{ m.role }}: {{ m.content }}{% if m.role == 'assistant' %}<|end|>{% endif %}\n{% endfor %}"
        "{% if add_generation_prompt %}assistant: {% endif %}"
    )
    folder, _ = extended(tmp_path, untied)
    write_records(tmp_path / "a.jsonl", [["Hi.", "Yo."]] * 3)
    made = written(the_set(data_config(tmp_path, sequence_length=64), str(folder)), str(folder), template)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    (end,) = ends = stop_token_ids(made.turns)
    assert tokenizer.convert_ids_to_tokens(end) == "<|end|>"
    weights = load_file(folder / "model.safetensors")
    # Whatever the hidden states are, one of the new row and its opposite is the largest: it writes <|call|> or <|end|>.
    row = torch.zeros_like(weights[ROWS[1]][0])
    row[0] = 1000.0
    weights[ROWS[1]].zero_()
    weights[ROWS[1]][end], weights[ROWS[1]][end - 1] = row, -row
    other = tmp_path / "rigged"
    other.mkdir()
    for file in folder.iterdir():
        if file.suffix != ".safetensors":
            (other / file.name).write_bytes(file.read_bytes())
    save_file(weights, other / "model.safetensors", metadata={"format": "pt"})
    config = make_config(
        tmp_path, untied, **{"generate.batching": batching, "generate.max_new_tokens": 12, "generate.do_sample": False}
    )
    engine = create_engine(config, str(other), threads=1, ends=ends)
    prompts = [[at, at + 1, at + 2] for at in range(5, 90, 5)]
    found = engine.complete([str(at) for at in range(len(prompts))], prompts)
    assert "eos" in {each.stop for each in found}
    for each in found:
        assert each.text == ""  # special tokens are hidden
        assert each.stop == "eos" or each.tokens == 12
