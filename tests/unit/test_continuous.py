"""Continuous batches: predictions as of each prompt alone, what they cannot do, and what becomes of failures."""

from __future__ import annotations

import json
import shutil
import threading
import time
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, MambaConfig
from transformers.generation.continuous_batching import ContinuousBatchingManager
from transformers.generation.continuous_batching.scheduler import Scheduler

from raysft.config import Config, parse
from raysft.errors import RequestError
from raysft.generate.engines import batching, continuous, create_engine
from raysft.generate.engines.bisection import complete
from raysft.generate.engines.continuous import ContinuousEngine
from raysft.generate.engines.static import TransformersEngine
from tests.tiny import tiny_model, tiny_tokenizer

QUESTIONS = (
    "Hi",
    "What is the capital of France?",
    "Write a short poem about the sea and the wind that blows over it. " * 4,
    "a list of three",
    "x",
    "你好，请介绍一下北京。",
    "The capital of Germany",
    "",
)
IDS = [f"q:{index}" for index in range(len(QUESTIONS))]


def config(model: Path | str = "m", use_gpu: bool = False, dtype: str = "float32", **generate) -> Config:
    settings = {"max_new_tokens": 24, "do_sample": False, "batching": "continuous", "batch_size": 3, **generate}
    return parse(
        {
            "model": {"path": str(model), "dtype": dtype},
            "data": {"train": [{"name": "a", "path": "a"}]},
            "scaling": {"use_gpu": use_gpu},
            "generate": settings,
        }
    )


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return tiny_model(tmp_path_factory.mktemp("model"), spread=0.2)


@pytest.fixture(scope="module")
def prompts(model) -> list[list[int]]:
    return AutoTokenizer.from_pretrained(model)(list(QUESTIONS))["input_ids"]


@pytest.fixture(scope="module")
def engine(model) -> ContinuousEngine:
    return ContinuousEngine(config(model), str(model), threads=1)


def test_greedy_predictions_are_those_of_each_prompt_alone(model, prompts):
    plain = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(model)
    sixth = plain.generate(torch.tensor([prompts[1]]), max_new_tokens=6, do_sample=False)[0, -1].item()
    stops = [tokenizer.eos_token_id, sixth]
    engine = ContinuousEngine(
        config(model, stop_tokens=[tokenizer.convert_ids_to_tokens(sixth)]), str(model), threads=1
    )
    found = engine.complete(IDS, prompts)
    for prompt, completion in zip(prompts, found, strict=True):
        row = torch.tensor([prompt or [tokenizer.pad_token_id]])
        options = {"attention_mask": torch.ones_like(row), "eos_token_id": stops, "do_sample": False}
        written = plain.generate(row, max_new_tokens=24, **options)[0, row.shape[1] :].tolist()
        ended = written[-1] in stops
        assert completion.text == tokenizer.decode(written[:-1] if ended else written, skip_special_tokens=True)
        assert (completion.tokens, completion.stop) == (len(written), "eos" if ended else "length")
    assert {completion.stop for completion in found} == {"eos", "length"}
    # Another call, in another order, goes on with what the first one left.
    assert engine.complete(IDS[::-1], prompts[::-1]) == found[::-1]


@pytest.mark.parametrize(
    "settings",
    [
        {"do_sample": True},
        {"do_sample": True, "top_k": 0, "temperature": 1.4, "repetition_penalty": 1.3},
        {"repetition_penalty": 1.5},
    ],
)
def test_predictions_are_those_of_static_batches(model, prompts, settings):
    static = TransformersEngine(config(model, **settings, batch_size=8), str(model), threads=1).complete(IDS, prompts)
    assert ContinuousEngine(config(model, **settings), str(model), threads=1).complete(IDS, prompts) == static


def test_a_cache_without_room_for_all_delays_predictions_and_changes_none(model, prompts, monkeypatch):
    settings = {"max_new_tokens": 40, "do_sample": True, "batch_size": 8}
    static = TransformersEngine(config(model, **settings), str(model), threads=1).complete(IDS, prompts)
    engine = ContinuousEngine(config(model, **settings), str(model), threads=1)
    monkeypatch.setattr(engine, "_most_pages", lambda: 0)
    assert engine.complete(IDS, prompts) == static
    # Pages of 32 tokens for the longest request alone, of which there are eight at once.
    assert engine._pages == -(-(max(map(len, prompts)) + 40) // continuous.CPU_PAGE_TOKENS) + 1


def test_the_positions_of_the_model_bound_prompt_and_prediction(model, prompts, tmp_path):
    short = shutil.copytree(model, tmp_path / "short")
    described = json.loads((short / "config.json").read_text())
    (short / "config.json").write_text(json.dumps(described | {"max_position_embeddings": 40}))
    long = [(prompts[2] * 3)[:35], (prompts[2] * 3)[:90], prompts[0]]
    for limit, cuts in ((10, [5, 60, 0]), (60, [15, 70, 0])):
        settings = config(short, max_new_tokens=limit)
        static = TransformersEngine(settings, str(short), threads=1).complete(IDS[:3], long)
        assert ContinuousEngine(settings, str(short), threads=1).complete(IDS[:3], long) == static
        assert [completion.cut for completion in static] == cuts


def test_an_adapter_takes_part_beside_the_weights(model, prompts, tmp_path):
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(1)
    lora = LoraConfig(r=4, target_modules=["q_proj", "down_proj"], init_lora_weights=False)
    get_peft_model(AutoModelForCausalLM.from_pretrained(model), lora).save_pretrained(tmp_path)
    AutoTokenizer.from_pretrained(model).save_pretrained(tmp_path)
    settings = {"dtype": "bfloat16", "max_new_tokens": 4}
    engine = ContinuousEngine(config(model, **settings), str(tmp_path), threads=1)
    assert type(engine._model) is not type(engine._inner)
    found = engine.complete(IDS, prompts)
    assert found == TransformersEngine(config(model, **settings), str(tmp_path), threads=1).complete(IDS, prompts)
    assert found != ContinuousEngine(config(model, **settings), str(model), threads=1).complete(IDS, prompts)


def test_a_request_that_fails_costs_no_other(prompts, engine, monkeypatch):
    before = engine.complete(IDS, prompts)
    admit = Scheduler.add_waiting_request

    def choosy(self, state):
        if state.initial_tokens == prompts[1]:
            raise ValueError("not\nthis one")
        admit(self, state)

    monkeypatch.setattr(Scheduler, "add_waiting_request", choosy)
    found = engine.complete(IDS, prompts)
    assert (found[1].stop, found[1].error, found[1].text, found[1].tokens) == ("error", "not this one", "", 0)
    assert found[:1] + found[2:] == before[:1] + before[2:]


def test_a_prompt_that_breaks_the_model_costs_no_other(prompts, engine):
    before = engine.complete(IDS, prompts)
    found = complete(engine, IDS, [*prompts[:3], [10**6], *prompts[4:]])
    assert found[3].stop == "error"
    assert "index out of range" in found[3].error
    assert found[:3] + found[4:] == before[:3] + before[4:]


def test_a_thread_that_dies_is_no_wait_without_end(model, prompts, monkeypatch):
    engine = ContinuousEngine(config(model), str(model), threads=1)
    monkeypatch.setattr(ContinuousBatchingManager, "_run_generation_loop", lambda self: None)
    with pytest.raises(RuntimeError, match="continuous batching ended without 8 of 8 predictions"):
        engine.complete(IDS, prompts)
    monkeypatch.undo()
    assert [completion.error for completion in engine.complete(IDS, prompts)] == [""] * 8


def test_a_thread_that_hangs_is_given_up(model, prompts, monkeypatch):
    engine = ContinuousEngine(config(model), str(model), threads=1)
    step = ContinuousBatchingManager._generation_step
    monkeypatch.setattr(continuous, "STALL_SECONDS", 0.5)
    monkeypatch.setattr(continuous, "STOP_SECONDS", 0.1)
    released = threading.Event()
    monkeypatch.setattr(ContinuousBatchingManager, "_generation_step", lambda self: (released.wait(60), step(self)))
    begun = time.monotonic()
    try:
        for _ in range(2):  # the thread may come back to life with the model, which nobody else may use then
            with pytest.raises(TimeoutError, match=r"made no progress in 0.5 s while waiting for 8 of 8 predictions"):
                engine.complete(IDS, prompts)
        assert time.monotonic() - begun < 30
    finally:
        released.set()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_beams": 4}, "generate.batching=continuous .* generate.num_beams=4; set"),
        ({"max_seconds": 5}, "generate.batching=continuous .* generate.max_seconds=5; set"),
    ],
)
def test_settings_that_it_cannot_follow_are_refused(settings, message):
    with pytest.raises(RequestError, match=message):
        config(**settings)


def recurrent(folder: Path) -> Path:
    tokenizer = tiny_tokenizer()
    described = MambaConfig(vocab_size=len(tokenizer), hidden_size=16, num_hidden_layers=1, state_size=4)
    AutoModelForCausalLM.from_config(described).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def test_a_model_without_support_is_refused_or_generated_with_as_before(tmp_path):
    folder = str(recurrent(tmp_path))
    with pytest.raises(RequestError, match=r"model_type=mamba is recurrent; set generate.batching to auto or static"):
        batching(config(folder), folder)
    assert batching(config(folder, use_gpu=True, batching="auto"), folder) == "static"


def test_auto_is_continuous_on_gpus_where_it_can_be(model):
    def decided(**settings) -> str:
        return batching(config(model, **{"batching": "auto", **settings}), str(model))

    assert decided() == "static"
    assert decided(use_gpu=True) == "continuous"
    assert decided(use_gpu=True, batching="static") == "static"
    assert decided(use_gpu=True, num_beams=2) == "static"
    assert decided(use_gpu=True, max_seconds=3) == "static"
    assert isinstance(create_engine(config(model), str(model), threads=1), ContinuousEngine)
    assert isinstance(create_engine(config(model, batching="auto"), str(model), threads=1), TransformersEngine)


def test_a_model_that_its_description_promises_too_much_of_is_found_out(model, monkeypatch, capsys):
    # As with attention that has no notion of pages: what was written before is not seen.
    from transformers.generation.continuous_batching.cache import PagedAttentionCache

    monkeypatch.setattr(PagedAttentionCache, "update", lambda self, key, value, layer_idx, kwargs: (key, value))
    with pytest.raises(
        RequestError, match=r"generate.batching=continuous does not support .*; set generate.batching to auto"
    ):
        create_engine(config(model), str(model), threads=1)
    monkeypatch.setattr("raysft.generate.engines.batching", lambda config, model: "continuous")
    engine = create_engine(config(model, batching="auto"), str(model), threads=1)
    assert isinstance(engine, TransformersEngine)
    assert "using static batches, because continuous batching fails with" in capsys.readouterr().err
