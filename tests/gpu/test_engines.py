"""Predictions of a GPU: those of ``model.generate``, however prompts are batched."""

import gc
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from raysft.config import Config, parse
from raysft.generate.engine_actor import EngineActor, batch_row
from raysft.generate.engines import create_engine
from raysft.generate.engines.continuous import ContinuousEngine
from raysft.generate.engines.static import TransformersEngine
from tests.tiny import SENTENCES, tiny_model

NEW_TOKENS = 40
QUESTIONS = [sentence[: 7 + 5 * index] for index, sentence in enumerate(SENTENCES)] * 4
IDS = [f"q:{index}" for index in range(len(QUESTIONS))]


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> list[Path]:
    """Two models that answer differently."""
    folder = tmp_path_factory.mktemp("models")
    return [tiny_model(folder / str(seed), seed, spread=0.2) for seed in (0, 1)]


@pytest.fixture(scope="module")
def prompts(models) -> list[list[int]]:
    return AutoTokenizer.from_pretrained(models[0])(QUESTIONS)["input_ids"]


def config(device: str, **generate: Any) -> Config:
    dtype = generate.pop("dtype", "float32")
    settings = {"max_new_tokens": NEW_TOKENS, "do_sample": False, "batching": "continuous", "batch_size": 5, **generate}
    return parse(
        {
            "model": {"path": "m", "dtype": dtype},
            "data": {"train": [{"name": "a", "path": "a"}]},
            "scaling": {"use_gpu": device == "cuda"},
            "generate": settings,
        }
    )


@pytest.fixture(autouse=True)
def _memory(device):
    """An engine takes most of the memory that is free, and its parts refer to each other."""
    yield
    gc.collect()
    if device == "cuda":
        torch.cuda.empty_cache()


@pytest.mark.parametrize("batching", ["continuous", "static"])
def test_greedy_predictions_are_those_of_each_prompt_alone(device, models, prompts, batching):
    plain = AutoModelForCausalLM.from_pretrained(models[0], dtype=torch.float32).to(device).eval()
    tokenizer = AutoTokenizer.from_pretrained(models[0])
    engine = create_engine(config(device, batching=batching), str(models[0]))
    assert isinstance(engine, ContinuousEngine if batching == "continuous" else TransformersEngine)
    found = engine.complete(IDS, prompts)
    for prompt, completion in zip(prompts, found, strict=True):
        row = torch.tensor([prompt], device=device)
        options = {"attention_mask": torch.ones_like(row), "do_sample": False}
        written = plain.generate(row, max_new_tokens=NEW_TOKENS, **options)[0, row.shape[1] :].tolist()
        ended = written[-1] == tokenizer.eos_token_id
        assert completion.text == tokenizer.decode(written[:-1] if ended else written, skip_special_tokens=True)
        assert (completion.tokens, completion.stop) == (len(written), "eos" if ended else "length")
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
def test_predictions_are_those_of_static_batches(device, models, prompts, settings):
    static = create_engine(config(device, batching="static", **settings), str(models[0])).complete(IDS, prompts)
    assert create_engine(config(device, **settings), str(models[0])).complete(IDS, prompts) == static


def test_an_engine_on_a_gpu_batches_continuously_in_bfloat16(device, models, prompts, capfd):
    batching = "auto" if device == "cuda" else "continuous"
    engine = create_engine(config(device, batching=batching, dtype="bfloat16"), str(models[0]))
    assert isinstance(engine, ContinuousEngine), capfd.readouterr().err
    assert not any(completion.error for completion in engine.complete(IDS, prompts))


def test_an_actor_goes_on_with_another_model_in_the_same_memory(device, models, prompts):
    actor = EngineActor(config(device), [str(model) for model in models], (), 1)
    found, free = [], []
    for index in (0, 1, 0, 1):
        table = actor(batch_row(pa.table({"id": IDS, "input_ids": prompts}), index))
        assert "failed" not in table.column_names, table["failed"].to_pylist()
        assert not any(table["error"].to_pylist())
        found.append(table["predict"].to_pylist())
        free.append(torch.cuda.mem_get_info()[0] if device == "cuda" else 0)
    assert found[:2] == found[2:]
    assert found[0] != found[1]
    print("GiB free on the GPU after each model:", [round(value / 2**30, 2) for value in free])
    assert min(free) >= 0.9 * max(free)
    del actor
    gc.collect()
    if device == "cuda":
        torch.cuda.empty_cache()
        assert torch.cuda.memory_reserved() < 2**30
