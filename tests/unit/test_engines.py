"""Engines: how a prediction ends, and what becomes of prompts that cannot be completed."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PromptTuningConfig, get_peft_model
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    DynamicCache,
    Lfm2Config,
    MistralConfig,
    MistralForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
    RwkvConfig,
    RwkvForCausalLM,
)

from raysft.config import Config, parse
from raysft.errors import RequestError
from raysft.generate.engines import Completion, check_suitable, create_engine, shrinking
from raysft.generate.engines.batching import obstacle
from raysft.generate.engines.bisection import complete
from raysft.generate.engines.model import named_tokens
from raysft.generate.engines.roomy_cache import joined, roomy_cache
from raysft.generate.engines.static import TransformersEngine
from raysft.models import onednn
from tests.tiny import tiny_model, tiny_tokenizer

QUESTIONS = ("Hi", "What is the capital of France?", "a list of three", "x")


def config(model: Path | str = "m", **generate) -> Config:
    settings = {"max_new_tokens": 12, "do_sample": False, **generate}
    data = {"train": [{"name": "a", "path": "a"}]}
    return parse({"model": {"path": str(model)}, "data": data, "generate": settings})


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return tiny_model(tmp_path_factory.mktemp("model"), spread=0.2)


@pytest.fixture(scope="module")
def prompts(model) -> list[list[int]]:
    return AutoTokenizer.from_pretrained(model)(list(QUESTIONS))["input_ids"]


def test_a_beam_search_is_that_of_transformers(model, prompts):
    engine = TransformersEngine(config(model, num_beams=3, length_penalty=0.5), str(model))
    plain = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(model)
    for prompt, completion in zip(prompts, engine.complete(QUESTIONS, prompts), strict=True):
        rows = torch.tensor([prompt])
        found = plain.generate(
            rows,
            max_new_tokens=12,
            do_sample=False,
            num_beams=3,
            length_penalty=0.5,
            eos_token_id=tokenizer.eos_token_id,
        )
        assert completion.text == tokenizer.decode(found[0, len(prompt) :], skip_special_tokens=True)


def alone(plain, tokenizer, prompts: list[list[int]], new_tokens: int, stops: list[int]) -> list[str]:
    """What ``model.generate`` writes for each prompt by itself."""
    written = []
    for prompt in prompts:
        rows = plain.generate(torch.tensor([prompt]), max_new_tokens=new_tokens, do_sample=False, eos_token_id=stops)
        tokens = rows[0, len(prompt) :].tolist()
        tokens = tokens[: -1 if tokens[-1] in stops else None]
        written.append(tokenizer.decode(tokens, skip_special_tokens=True))
    return written


@pytest.mark.parametrize("kind", ["full", "sliding"])
def test_rows_that_have_finished_leave_the_batch_and_change_no_other(model, tmp_path, monkeypatch, kind):
    monkeypatch.setattr(shrinking, "GROUP_TOKENS", 60)
    tokenizer = AutoTokenizer.from_pretrained(model)
    if kind == "sliding":
        torch.manual_seed(0)
        sizes = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
        special = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, "initializer_range": 0.2}
        described = MistralConfig(
            vocab_size=len(tokenizer), sliding_window=8, num_key_value_heads=2, **sizes, **special
        )
        MistralForCausalLM(described).save_pretrained(tmp_path)
        tokenizer.save_pretrained(tmp_path)
        model = tmp_path
    plain = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    torch.manual_seed(1)
    asked = [torch.randint(3, len(tokenizer), (2 + at * at % 29,)).tolist() for at in range(16)]
    ends = torch.randperm(len(tokenizer))[: len(tokenizer) // 12].tolist()
    stops = sorted({tokenizer.eos_token_id, plain.generation_config.eos_token_id or 2, *ends})
    engine = TransformersEngine(config(model, max_new_tokens=40), str(model), ends=ends)
    assert engine._ignores_padding
    assert engine._shrinks
    assert engine._token_bytes == 2 * 2 * 32 * 4, "keys and values of two layers, 32 float32 numbers each"
    shapes = []
    engine._model.register_forward_pre_hook(
        lambda _, args, kwargs: shapes.append(tuple(kwargs["input_ids"].shape)), with_kwargs=True
    )
    found = engine.complete([str(at) for at in range(16)], asked)
    assert [each.text for each in found] == alone(plain, tokenizer, asked, 40, stops)
    assert len({each.tokens for each in found}) > 4
    groups = [shape for shape in shapes if shape[1] > 1]
    assert sum(rows for rows, _ in groups) == 16
    assert max(rows * tokens for rows, tokens in groups) <= 60
    together = sum(rows * tokens for rows, tokens in groups)
    assert together <= 1.2 * sum(map(len, asked)) < 0.7 * 16 * max(map(len, asked))
    steps = [rows for rows, tokens in shapes if tokens == 1]
    assert steps == sorted(steps, reverse=True)
    assert len(set(steps)) > 3
    # All rows until the end would be 16 · 39; without those that have finished it is the tokens after the first ones.
    assert sum(steps) == sum(each.tokens - 1 for each in found)


def test_a_cache_with_room_holds_the_same_numbers_and_is_not_copied(model, monkeypatch):
    monkeypatch.setattr("raysft.generate.engines.roomy_cache.ROOM", 5)
    plain = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    roomy, usual = roomy_cache(plain.config), DynamicCache(config=plain.config)
    torch.manual_seed(2)
    places = []
    with torch.inference_mode():
        for at, tokens in enumerate([3, 1, 1, 2, 1, 1, 1, 1, 1]):
            ids = torch.randint(3, 200, (4 if at < 4 else 2, tokens))
            if at == 4:
                for cache in (roomy, usual):
                    cache.batch_select_indices(torch.tensor([3, 1]))
            found, expected = (plain(ids, past_key_values=cache).logits for cache in (roomy, usual))
            torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
            for one, other in zip(roomy.layers, usual.layers, strict=True):
                assert torch.equal(one.keys, other.keys)
                assert torch.equal(one.values, other.values)
            places.append(roomy.layers[0].keys.data_ptr())
    assert roomy.get_seq_length() == 12
    # Room for 5 after the first 3 tokens, and again after 8; the rows that are left stay where they are.
    assert len(set(places[:5])) == 1
    assert len(set(places[5:])) == 1
    assert places[4] != places[5]


def test_caches_that_are_joined_pad_the_shorter_one_and_forget_what_is_padding_in_all(model):
    plain = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    torch.manual_seed(3)
    prompts = [torch.randint(3, 200, (rows, tokens)) for rows, tokens in ((1, 9), (3, 4))]
    with torch.inference_mode():
        caches = [plain(ids, past_key_values=DynamicCache(config=plain.config)).past_key_values for ids in prompts]
        apart = [[(layer.keys, layer.values) for layer in cache.layers] for cache in caches]
        batch = shrinking.Batch(
            torch.arange(4), torch.zeros(4, 10).long(), torch.tensor([0, 5, 5, 5]), 9, joined(plain.config, caches, 9)
        )
        assert batch.cache.get_seq_length() == 9
        assert [cache.get_seq_length() for cache in caches] == [0, 0]
        for layer, long, short in zip(batch.cache.layers, *apart, strict=True):
            for found, one, three in zip((layer.keys, layer.values), long, short, strict=True):
                assert torch.equal(found[:1], one)
                assert torch.equal(found[1:, :, 5:], three)
                assert not found[1:, :, :5].any()
        batch.keep(torch.tensor([False, True, False, True]))
        assert (batch.prompts.tolist(), batch.pads.tolist(), batch.begin) == ([3, 1], [0, 0], 4)
        for layer, short in zip(batch.cache.layers, apart[1], strict=True):
            assert torch.equal(layer.keys, short[0][[2, 0]])
            assert torch.equal(layer.values, short[1][[2, 0]])


@pytest.mark.parametrize(
    ("memory", "engines", "beams", "most"),
    [(1e9, 1, 1, 5), (240_000, 1, 1, 3), (720_000, 3, 1, 3), (240_000, 1, 2, 1), (240_000, 3, 1, 1), (1.0, 1, 1, 1)],
)
def test_the_cache_of_a_batch_takes_no_more_than_its_share(model, monkeypatch, memory, engines, beams, most):
    monkeypatch.setattr("raysft.generate.engines.static.cpu_cache_bytes", lambda engines: memory / engines)
    settings = config(model, batch_size=5, max_new_tokens=3, num_beams=beams)
    engine = TransformersEngine(settings, str(model), engines_per_node=engines)
    description = engine._model.config
    # Keys and values of two layers in float32; the longest prompt has 14 tokens, 3 follow, and a layer makes room for 128.
    width = description.num_key_value_heads * description.hidden_size // description.num_attention_heads
    each = 2 * 2 * width * 4 * (14 + 3 + 128) * beams
    assert most == max(1, min(5, int(memory / engines // each)))
    sizes, batch = [], engine._batch
    monkeypatch.setattr(engine, "_batch", lambda ids, *more: sizes.append(len(ids)) or batch(ids, *more))
    asked = [[5 + at] * (14 if at == 2 else 4) for at in range(7)]
    found = engine.complete([str(at) for at in range(7)], asked)
    assert (max(sizes), sum(sizes)) == (most, 7)
    roomy = TransformersEngine(config(model, max_new_tokens=3, num_beams=beams), str(model))
    monkeypatch.setattr("raysft.generate.engines.static.cpu_cache_bytes", lambda engines: 1e12)
    assert found == roomy.complete([str(at) for at in range(7)], asked)


@pytest.mark.parametrize("generate", [{"do_sample": True, "top_k": 0}, {"repetition_penalty": 1.4}])
def test_a_draw_and_a_penalty_are_the_same_in_a_batch_that_shrinks(model, monkeypatch, generate):
    monkeypatch.setattr(shrinking, "GROUP_TOKENS", 60)
    torch.manual_seed(1)
    asked = [torch.randint(3, 200, (2 + at * at % 29,)).tolist() for at in range(16)]
    settings, names, ends = config(model, max_new_tokens=40, **generate), [str(at) for at in range(16)], range(3, 40)
    engine = TransformersEngine(settings, str(model), ends=list(ends))
    assert engine._shrinks
    whole = TransformersEngine(settings, str(model), ends=list(ends))
    whole._shrinks = False
    found = engine.complete(names, asked)
    assert found == whole.complete(names, asked)
    assert len({each.tokens for each in found}) > 3


def test_packed_weights_change_no_token(model, prompts, monkeypatch):
    monkeypatch.setattr(onednn, "is_slow_with_mkl", lambda: True)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX512")
    monkeypatch.setattr("raysft.generate.engines.base.use_onednn", lambda: True)  # it would stay in this process
    engine = TransformersEngine(config(model, batch_size=128), str(model))
    packed = [name for name, module in engine._model.named_modules() if isinstance(module, onednn.PackedLinear)]
    assert "lm_head" in packed
    assert len(packed) > 4
    plain = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(model)
    found = engine.complete(QUESTIONS, prompts)
    assert [each.text for each in found] == alone(plain, tokenizer, prompts, 12, engine._stops)


def test_a_model_that_reads_its_padding_is_given_none(tmp_path):
    tokenizer = tiny_tokenizer()
    special = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    description = RwkvConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        attention_hidden_size=64,
        num_hidden_layers=2,
        initializer_range=0.2,
        **special,
    )
    torch.manual_seed(0)
    plain = RwkvForCausalLM(description).eval()
    for weights in plain.parameters():
        weights.data += torch.randn_like(weights) * 0.2
    plain.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    asked = tokenizer([*QUESTIONS, "y"])["input_ids"]
    alone = [plain.generate(torch.tensor([ids]), max_new_tokens=12, do_sample=False)[0, len(ids) :] for ids in asked]
    engine = TransformersEngine(config(tmp_path), str(tmp_path))
    written = [completion.text for completion in engine.complete([*QUESTIONS, "y"], asked)]
    assert written == [tokenizer.decode(tokens, skip_special_tokens=True) for tokens in alone]
    assert not engine._ignores_padding
    assert not engine._shrinks


def test_a_model_with_recurrent_layers_keeps_its_batch_whole(tmp_path):
    """Its cache has layers without keys."""
    tokenizer = tiny_tokenizer()
    described = Lfm2Config(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2, layer_types=["conv", "full_attention"], initializer_range=0.2, pad_token_id=0,
    )  # fmt: skip
    torch.manual_seed(0)
    plain: Any = AutoModelForCausalLM.from_config(described).eval()
    plain.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    asked = tokenizer(list(QUESTIONS))["input_ids"]
    alone = [plain.generate(torch.tensor([ids]), max_new_tokens=12, do_sample=False)[0, len(ids) :] for ids in asked]
    engine = TransformersEngine(config(tmp_path), str(tmp_path))
    assert not engine._shrinks
    written = [completion.text for completion in engine.complete(QUESTIONS, asked)]
    assert written == [tokenizer.decode(tokens, skip_special_tokens=True) for tokens in alone]


def test_an_adapter_of_virtual_tokens_keeps_its_batch_whole(model, prompts, tmp_path):
    plain = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    torch.manual_seed(0)
    adapter: Any = get_peft_model(plain, PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)).eval()
    adapter.peft_config["default"].base_model_name_or_path = str(model)
    adapter.save_pretrained(tmp_path)
    engine = TransformersEngine(config(model), str(tmp_path))
    tokenizer = AutoTokenizer.from_pretrained(model)
    found = engine.complete(QUESTIONS, prompts)
    assert not engine._shrinks
    for prompt, completion in zip(prompts, found, strict=True):
        rows = torch.tensor([prompt])
        written = adapter.generate(
            input_ids=rows, attention_mask=torch.ones_like(rows), max_new_tokens=12, do_sample=False
        )
        assert completion.text == tokenizer.decode(written[0, len(prompt) :], skip_special_tokens=True)


def test_a_scale_that_the_longest_prompt_decides_is_that_of_each_alone(tmp_path):
    tokenizer = tiny_tokenizer()
    tokenizer.save_pretrained(tmp_path)
    rope = {"rope_type": "longrope", "short_factor": [1.0] * 16, "long_factor": [4.0] * 16, "rope_theta": 1e4}
    sizes = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    positions = {"max_position_embeddings": 256, "original_max_position_embeddings": 32}
    special = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    torch.manual_seed(0)
    plain = Phi3ForCausalLM(
        Phi3Config(
            vocab_size=len(tokenizer),
            rope_parameters={**rope, "original_max_position_embeddings": 32},
            initializer_range=0.2,
            **{**sizes, "num_key_value_heads": 2, **positions, **special},
        )
    ).eval()
    plain.save_pretrained(tmp_path)
    asked = [[5, 6, 7, 8, 9, 10], list(range(3, 63)), [11, 12, 13]]
    alone = [plain.generate(torch.tensor([ids]), max_new_tokens=12, do_sample=False)[0, len(ids) :] for ids in asked]
    written = TransformersEngine(config(tmp_path), str(tmp_path)).complete(["a", "b", "c"], asked)
    assert [each.text for each in written] == [tokenizer.decode(ids, skip_special_tokens=True) for ids in alone]
    assert "longrope" in obstacle(config(tmp_path), str(tmp_path))


def test_padding_is_a_token_that_the_model_knows(model, prompts, tmp_path):
    shutil.copytree(model, tmp_path / "padded")
    tokenizer = AutoTokenizer.from_pretrained(model)
    tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    tokenizer.save_pretrained(tmp_path / "padded")
    assert tokenizer.pad_token_id == AutoModelForCausalLM.from_pretrained(model).config.vocab_size
    expected = TransformersEngine(config(model), str(model))
    assert expected._ignores_padding
    engine = TransformersEngine(config(model), str(tmp_path / "padded"))
    assert engine.complete(QUESTIONS, prompts) == expected.complete(QUESTIONS, prompts)


def test_a_prediction_says_why_it_ended(model, prompts):
    greedy = TransformersEngine(config(model), str(model)).complete(QUESTIONS, prompts)
    longest = next(completion for completion in greedy if completion.stop == "length")
    assert longest.tokens == 12
    prompt = torch.tensor([prompts[greedy.index(longest)]])
    written = AutoModelForCausalLM.from_pretrained(model).generate(prompt, max_new_tokens=12, do_sample=False)
    fourth = AutoTokenizer.from_pretrained(model).convert_ids_to_tokens(written[0, prompt.shape[1] + 3].item())
    other = config(model, stop_tokens=[fourth], skip_special_tokens=False)
    stopped = TransformersEngine(other, str(model)).complete(QUESTIONS, prompts)[greedy.index(longest)]
    assert stopped.stop == "eos"
    assert stopped.tokens <= 4
    assert longest.text.startswith(stopped.text)
    hurried = TransformersEngine(config(model, max_seconds=1e-6), str(model)).complete(QUESTIONS, prompts)
    assert {completion.stop for completion in hurried} <= {"time", "eos"}
    assert all(completion.tokens <= 1 for completion in hurried)


def test_a_stop_token_that_the_model_does_not_have_is_found_before_it_starts(model):
    check_suitable(config(model, stop_tokens=["<|im_start|>"]), str(model))
    with pytest.raises(RequestError, match=r"^generate.stop_tokens: the tokenizer has no token '<stop>'"):
        check_suitable(config(model, stop_tokens=["<stop>"]), str(model))


def test_a_stop_token_that_is_none_is_refused():
    tokenizer = tiny_tokenizer()
    assert named_tokens(tokenizer, ["<|im_start|>"]) == [tokenizer.bos_token_id]
    with pytest.raises(RequestError, match=r"has no token '<\|im_stop\|>'; did you mean '<\|im_start\|>'\?"):
        named_tokens(tokenizer, ["<|im_stop|>"])


class Choosy:
    """Completes prompts of one token, in batches as small as it likes."""

    def __init__(self, most: int, error: type[Exception] = ValueError) -> None:
        self._most, self._error = most, error

    def complete(self, ids, prompts, media=()) -> list[Completion]:
        if len(ids) > self._most or any(len(prompt) != 1 for prompt in prompts):
            raise self._error("too\nmuch")
        return [Completion(id, tokens=1, stop="eos") for id in ids]


def test_one_prompt_that_fails_costs_no_other():
    found = complete(Choosy(8), list("abcde"), [[1], [1], [1, 2], [1], [1]])
    assert [(each.text, each.stop, each.error) for each in found] == [
        ("a", "eos", ""),
        ("b", "eos", ""),
        ("", "error", "ValueError: too much"),
        ("d", "eos", ""),
        ("e", "eos", ""),
    ]


def test_a_batch_that_is_too_large_is_halved():
    assert [each.text for each in complete(Choosy(2, torch.OutOfMemoryError), list("abcde"), [[1]] * 5)] == list(
        "abcde"
    )


def test_prompts_that_are_too_large_end_nothing_though_they_are_a_whole_batch():
    found = complete(Choosy(0, torch.OutOfMemoryError), list("ab"), [[1], [1]])
    assert [each.error for each in found] == ["OutOfMemoryError: too much"] * 2


def test_what_fails_with_every_prompt_is_no_matter_of_a_prompt():
    with pytest.raises(ValueError, match="too\nmuch"):
        complete(Choosy(0), list("ab"), [[1], [1]])


def test_beams_and_draws_do_not_go_together():
    with pytest.raises(RequestError, match=r"generate.num_beams=4 .* generate.do_sample=false"):
        config(num_beams=4, do_sample=True)


def test_of_a_prompt_that_is_too_long_the_tail_is_asked(model):
    engine = TransformersEngine(config(model), str(model))
    prompt = [3 + index * index % 197 for index in range(700)]
    (long,) = engine.complete(["a"], [prompt])
    (tail,) = engine.complete(["a"], [prompt[-500:]])
    (head,) = engine.complete(["a"], [prompt[:500]])
    assert (long.cut, tail.cut) == (200, 0)
    assert long.text == tail.text != head.text


@pytest.mark.parametrize("batching", ["static", "continuous"])
def test_generation_stops_where_the_turns_of_the_data_end(model, prompts, batching):
    plain = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(model)
    written = plain.generate(torch.tensor([prompts[1]]), max_new_tokens=12, do_sample=False)[
        0, len(prompts[1]) :
    ].tolist()
    end = next(at for at, token in enumerate(written) if at and token not in written[:at])
    engine = create_engine(config(model, batching=batching), str(model), threads=1, ends=[written[end]])
    completion = engine.complete(QUESTIONS, prompts)[1]
    assert (completion.stop, completion.tokens) == ("eos", end + 1)
    assert completion.text == tokenizer.decode(written[:end], skip_special_tokens=True)
