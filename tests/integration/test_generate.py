"""Generation on a real local cluster of Ray with a tiny random model."""

from __future__ import annotations

import json
import os
import threading
import time
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, AutoTokenizer

from raysft.cluster.placement import Node
from raysft.config import Config, parse, with_overrides
from raysft.errors import RequestError, RunFailed, RunStopped
from raysft.generate import batch_inference, engine_pool, metrics, ray_pipeline
from raysft.generate.batch_inference import Output
from raysft.generate.engines import Completion
from raysft.generate.engines.sampling import choose_tokens
from raysft.generate.engines.static import TransformersEngine
from raysft.generate.prediction_store import PredictionStore
from raysft.generate.prompts import ModelPrompts, Prompts
from raysft.models.processor import load_processor
from raysft.stopping import Stopping, stoppable
from raysft.storage.json_files import read_jsonl
from tests import vision_prompts
from tests.processes import children_named
from tests.tiny import tiny_model
from tests.tiny_vision import tiny_vision_model

QUESTIONS = [
    "Hi",
    "What is the capital of France?",
    "Write a short poem about the sea and the wind that blows over it, in four lines.",
    "你好，请介绍一下北京。",
    "Name three animals.",
    "What is the sum of 12 and 30? " * 4,
    "x",
    "a list of three",
]


def config(model: Path | str = "m", **generate) -> Config:
    settings = {"max_new_tokens": 24, "batch_size": 3, "do_sample": False, **generate}
    return Config.model_validate(
        {"model": {"path": str(model)}, "data": {"train": [{"name": "a", "path": "a"}]}, "generate": settings}
    )


def generate(settings: Config, *, model: str, prompts: Path, output: Path, **options) -> list[metrics.MetricRow]:
    """Generate with one model."""
    return batch_inference.generate(settings, prompts, [Output(model, output)], **options)


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return tiny_model(tmp_path_factory.mktemp("model"), spread=0.2)


@pytest.fixture(scope="module")
def other(tmp_path_factory) -> Path:
    """A model that answers otherwise, with the same tokenizer."""
    return tiny_model(tmp_path_factory.mktemp("other"), seed=1, spread=0.2)


@pytest.fixture(scope="module")
def prompts(model, tmp_path_factory) -> Path:
    tokenizer = AutoTokenizer.from_pretrained(model)
    rows = []
    for i, question in enumerate(QUESTIONS):
        turn = [{"role": "user", "content": question}]
        prompt = tokenizer.apply_chat_template(turn, tokenize=False, add_generation_prompt=True)
        ids = tokenizer(prompt, add_special_tokens=False)["input_ids"]
        rows.append(
            {"id": f"q:{i}", "source": ("one", "two")[i % 2], "prompt": prompt, "input_ids": ids, "label": question}
        )
    path = tmp_path_factory.mktemp("prompts") / "prompts.parquet"
    text = pa.string()
    schema = {"id": text, "source": text, "prompt": text, "input_ids": pa.list_(pa.int32()), "label": text}
    pq.write_table(pa.Table.from_pylist(rows, schema=pa.schema(schema)), path)
    return path


def alone(model: Path, prompts: Path, new_tokens: int = 24, **options) -> list[list[int]]:
    """New tokens of plain ``model.generate`` on each prompt alone."""
    loaded = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    written = []
    for ids in pq.read_table(prompts)["input_ids"].to_pylist():
        output = loaded.generate(torch.tensor([ids]), max_new_tokens=new_tokens, do_sample=False, **options)
        written.append(output[0, len(ids) :].tolist())
    return written


def read(prompts: Path) -> tuple[list[str], list[list[int]]]:
    table = pq.read_table(prompts)
    return table["id"].to_pylist(), table["input_ids"].to_pylist()


def as_text(model: Path, tokens: list[list[int]]) -> list[str]:
    tokenizer = AutoTokenizer.from_pretrained(model)
    return [tokenizer.decode(each, skip_special_tokens=True) for each in tokens]


@pytest.mark.usefixtures("local_ray")
def test_predictions_are_those_of_each_prompt_alone_in_order(model, prompts, tmp_path, capfd):
    output = tmp_path / "generated_predictions.jsonl"
    metric_rows = generate(config(num_actors=2), model=str(model), prompts=prompts, output=output)
    results = metrics.flat_results(metric_rows)

    rows = list(read_jsonl(output))
    table = pq.read_table(prompts)
    assert [list(row) for row in rows] == [["prompt", "predict", "label", "id", "source", "tokens", "stop"]] * len(
        QUESTIONS
    )
    assert [row["predict"] for row in rows] == as_text(model, alone(model, prompts))
    for column in ("prompt", "label", "id", "source"):
        assert [row[column] for row in rows] == table[column].to_pylist()
    assert (results["predict_examples"], results["predict_one_examples"]) == (8, 4)
    assert {"predict_rouge-1", "predict_bleu-4", "predict_two_rouge-l"} <= set(results)
    assert results["predict_runtime"] > 0
    assert results["predict_tokens_per_second"] > 0
    assert sorted(os.listdir(tmp_path)) == [".generated_predictions.jsonl.done", "generated_predictions.jsonl"]

    capfd.readouterr()
    before = output.stat().st_mtime_ns
    assert generate(config(batch_size=8), model=str(model), prompts=prompts, output=output) == metric_rows
    assert output.stat().st_mtime_ns == before
    assert capfd.readouterr().err == ""


@pytest.mark.usefixtures("local_ray")
@pytest.mark.parametrize(("batch_size", "engines", "blocks"), [(2, 1, [8]), (1, 2, [4, 4]), (3, 2, [4, 4])])
def test_continuous_batches_are_supplied_with_several_at_a_time(
    model, prompts, tmp_path, monkeypatch, batch_size, engines, blocks
):
    append, written = PredictionStore.append, []
    monkeypatch.setattr(
        PredictionStore, "append", lambda self, entries: (written.append(len(entries)), append(self, entries))[1]
    )
    settings = config(batching="continuous", batch_size=batch_size, num_actors=engines)
    output = tmp_path / "out.jsonl"
    generate(settings, model=str(model), prompts=prompts, output=output, progress=False)
    assert [row["predict"] for row in read_jsonl(output)] == as_text(model, alone(model, prompts))
    assert written == blocks


@pytest.mark.usefixtures("local_ray")
@pytest.mark.parametrize("family", ["idefics3", "qwen2.5-vl"])
def test_prompts_with_images_are_completed_and_their_predictions_name_the_files(tmp_path, monkeypatch, family):
    folder = tiny_vision_model(tmp_path / "model", family)
    processor, pictures = load_processor(folder), vision_prompts.draw(tmp_path)
    prompts = vision_prompts.write_prompts_file(tmp_path / "prompts.parquet", processor, pictures)
    append, written = PredictionStore.append, []
    monkeypatch.setattr(
        PredictionStore, "append", lambda self, entries: (written.append(len(entries)), append(self, entries))[1]
    )
    output = tmp_path / "out.jsonl"
    generate(config(folder, batch_size=2), model=str(folder), prompts=prompts, output=output, progress=False)
    assert written == [6], "several batches at a time, so that images are prepared ahead"
    rows = list(read_jsonl(output))
    plain = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32).eval()
    for row, parts in zip(rows, vision_prompts.ASKED, strict=True):
        asked = vision_prompts.conversation(pictures, parts)
        batch = processor.apply_chat_template(
            asked, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
        )
        with torch.inference_mode():
            found = plain.generate(**batch, max_new_tokens=24, do_sample=False)
        assert row["predict"] == processor.tokenizer.decode(
            found[0, batch["input_ids"].shape[1] :], skip_special_tokens=True
        )
        named = [
            {"kind": "image", "location": str(pictures[name]), "width": width, "height": height}
            for name, (width, height) in ((part[1:-1], vision_prompts.SIZES.get(part[1:-1], (0, 0))) for part in parts)
            if name in pictures
        ]
        assert row.get("media", []) == named
        assert row["prompt"].count(processor.image_token) == len(named)
    with pytest.raises(RequestError, match=r"^generate.batching=continuous, but some prompts have images"):
        generate(
            config(folder, batching="continuous"), model=str(folder), prompts=prompts, output=tmp_path / "other.jsonl"
        )


@pytest.mark.usefixtures("local_ray")
def test_a_killed_call_goes_on_with_what_is_missing(model, prompts, tmp_path, capfd):
    output, settings = tmp_path / "out.jsonl", config()
    partial = tmp_path / ".out.jsonl.partial"

    class Killed(BaseException):
        pass

    append = PredictionStore.append

    def killed_after_one(self, entries):
        append(self, entries)
        raise Killed

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(PredictionStore, "append", killed_after_one)
        with pytest.raises(Killed):
            generate(settings, model=str(model), prompts=prompts, output=output, progress=False)
    kept = list(read_jsonl(partial))[1:]
    assert len(kept) == len(QUESTIONS) % 3, "the longest prompts are the batch that is not full"
    assert not output.exists()
    # Mark what is kept, so that it shows in the output, and tear the last line as a dying machine does.
    lines = partial.read_text(encoding="utf-8").splitlines()
    marked = [lines[0], *(json.dumps({**json.loads(line), "predict": "kept"}) for line in lines[1:])]
    partial.write_text("\n".join(marked) + '\n{"id": "q:', encoding="utf-8")

    generate(settings, model=str(model), prompts=prompts, output=output)
    assert "8/8 prompts" in capfd.readouterr().err
    expected = as_text(model, alone(model, prompts))
    for row, text in zip(read_jsonl(output), expected, strict=True):
        assert row["predict"] == ("kept" if row["id"] in {entry["id"] for entry in kept} else text)
    assert not partial.exists()

    generate(config(max_new_tokens=4), model=str(model), prompts=prompts, output=output, progress=False)
    shorter = as_text(model, alone(model, prompts, new_tokens=4))
    assert [row["predict"] for row in read_jsonl(output)] == shorter


@pytest.mark.usefixtures("local_ray")
def test_a_prompt_that_failed_is_tried_again_by_the_next_call(model, prompts, tmp_path, capfd):
    output, completions, asked = tmp_path / "out.jsonl", batch_inference.completions, []

    def without_memory(config, models, *others):
        asked.append(models[0].ids)
        for index, batch in completions(config, models, *others):
            failed = {"predict": "", "error": "no memory"} if len(asked) == 1 else {}
            yield index, [{**each, **failed} if each["id"] == "q:2" else each for each in batch]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(batch_inference, "completions", without_memory)
        results = metrics.flat_results(generate(config(), model=str(model), prompts=prompts, output=output))
        assert results["predict_examples"] == len(QUESTIONS)
        assert [row.get("error") for row in read_jsonl(output)] == [None, None, "no memory", *[None] * 5]
        told = "1 of 8 prompts failed, the first of them q:2: no memory"
        assert told in capfd.readouterr().err
        generate(config(), model=str(model), prompts=prompts, output=output, progress=False)
    assert asked[1:] == [["q:2"]]
    assert [row["predict"] for row in read_jsonl(output)] == as_text(model, alone(model, prompts))
    assert not (tmp_path / ".out.jsonl.partial").exists()


@pytest.mark.usefixtures("local_ray")
def test_two_models_take_turns_in_one_pool(model, other, prompts, tmp_path, monkeypatch, capfd):
    started, size_pool = [], engine_pool.size_pool
    monkeypatch.setattr(engine_pool, "size_pool", lambda *given: started.append(given[2]) or size_pool(*given))
    outputs = [Output(str(model), tmp_path / "a.jsonl", "base", "one"), Output(str(other), tmp_path / "b.jsonl")]
    lines = []
    rows = batch_inference.generate(config(num_actors=2), prompts, outputs, notify=lines.append)
    assert started == [6], "one pool for the three batches of each"
    for each, output in zip((model, other), outputs, strict=True):
        assert [row["predict"] for row in read_jsonl(output.path)] == as_text(each, alone(each, prompts))
    assert [row.model for row in rows if row.metric == "tokens_per_second" and row.value > 0] == ["base", "trained"]
    assert lines == ["generating with one", "generating with the model"]
    told = capfd.readouterr().err
    assert told.index("generate a | 8/8 prompts") < told.index("generate b | 8/8 prompts")

    outputs[1].path.unlink()
    again = batch_inference.generate(config(num_actors=1), prompts, outputs, progress=False)
    assert started == [6, 3], "only for what is missing"
    assert [row["predict"] for row in read_jsonl(outputs[1].path)] == as_text(other, alone(other, prompts))
    scores = [[row for row in found if row.model == "base"] for found in (rows, again)]
    assert scores[0] == scores[1]


@pytest.mark.usefixtures("local_ray")
def test_a_second_model_that_does_not_load_leaves_the_predictions_of_the_first(model, prompts, tmp_path):
    broken, weights = tiny_model(tmp_path / "broken"), tmp_path / "broken" / "model.safetensors"
    save_file({name: value[:1] for name, value in load_file(weights).items()}, weights, {"format": "pt"})
    outputs = [Output(str(model), tmp_path / "a.jsonl", "base"), Output(str(broken), tmp_path / "b.jsonl")]
    with pytest.raises(RunFailed, match=f"generation failed: .*{broken}: its weights have different shapes"):
        batch_inference.generate(config(), prompts, outputs, progress=False)
    assert [row["predict"] for row in read_jsonl(outputs[0].path)] == as_text(model, alone(model, prompts))
    assert not outputs[1].path.exists()


@pytest.mark.usefixtures("local_ray")
def test_an_engine_that_is_killed_is_started_again(model, other, prompts, tmp_path):
    outputs = [Output(str(model), tmp_path / "a.jsonl", "base"), Output(str(other), tmp_path / "b.jsonl")]
    partial = tmp_path / ".b.jsonl.partial"
    killed = []

    def kill_one():
        deadline = time.monotonic() + 120
        while len(list(read_jsonl(partial))) < 2 and time.monotonic() < deadline:
            time.sleep(0.01)
        for process in children_named("EngineActor"):
            process.kill()
            killed.append(len(list(read_jsonl(partial))) - 1)

    thread = threading.Thread(target=kill_one)
    thread.start()
    settings = config(batch_size=1, max_new_tokens=100)
    batch_inference.generate(settings, prompts, outputs, progress=False)
    thread.join()
    assert len(killed) == 1
    assert 1 <= killed[0] < len(QUESTIONS)
    for each, output in zip((model, other), outputs, strict=True):
        expected = as_text(each, alone(each, prompts, new_tokens=100))
        assert [row["predict"] for row in read_jsonl(output.path)] == expected


@pytest.mark.usefixtures("local_ray")
def test_a_run_that_is_asked_to_stop_keeps_its_predictions_and_generates_only_the_others_later(
    model, prompts, tmp_path
):
    output, partial = tmp_path / "out.jsonl", tmp_path / ".out.jsonl.partial"
    settings = config(batch_size=1, num_actors=1, max_new_tokens=100)
    asked_at: list[float] = []

    def ask(stopping: Stopping) -> None:
        deadline = time.monotonic() + 120
        while len(list(read_jsonl(partial))) < 3 and time.monotonic() < deadline:
            time.sleep(0.01)
        asked_at.append(time.monotonic())
        stopping.ask("SIGTERM")

    with stoppable() as stopping:
        thread = threading.Thread(target=ask, args=[stopping])
        thread.start()
        with pytest.raises(RunStopped) as stopped:
            generate(settings, model=str(model), prompts=prompts, output=output, progress=False)
        thread.join()
    assert time.monotonic() - asked_at[0] < 15
    _, *kept = read_jsonl(partial)
    assert 2 <= len(kept) < len(QUESTIONS)
    assert str(stopped.value) == f"stopped: SIGTERM; {len(kept)} of {len(QUESTIONS)} predictions are kept"
    first, *lines = partial.read_text(encoding="utf-8").splitlines()
    marked = [json.dumps({**json.loads(line), "predict": "kept"}) for line in lines]
    partial.write_text("\n".join([first, *marked]) + "\n", encoding="utf-8")
    generate(settings, model=str(model), prompts=prompts, output=output, progress=False)
    expected = as_text(model, alone(model, prompts, new_tokens=100))
    for row, text in zip(read_jsonl(output), expected, strict=True):
        assert row["predict"] == ("kept" if row["id"] in {entry["id"] for entry in kept} else text)


@pytest.mark.usefixtures("local_ray")
def test_what_cannot_be_is_refused_before_anything_starts(model, prompts, tmp_path):
    output = tmp_path / "out.jsonl"
    with pytest.raises(RequestError, match=r"num_actors=3 needs 3 CPUs, but the cluster has 2 .*; use 2, or add nodes"):
        generate(config(num_actors=3, batch_size=1), model=str(model), prompts=prompts, output=output)
    with pytest.raises(RequestError, match="similarty"):
        generate(config(metrics=["similarty"]), model=str(model), prompts=prompts, output=output)
    with pytest.raises(RequestError, match="is not a model folder"):
        generate(config(), model=str(tmp_path / "none"), prompts=prompts, output=output)
    gpus = with_overrides(config(), {"scaling.use_gpu": True})
    with pytest.raises(RequestError, match="needs 1 GPU, but the cluster has none"):
        generate(gpus, model=str(model), prompts=prompts, output=output)


@pytest.mark.usefixtures("local_ray")
def test_a_model_that_does_not_load_fails_in_one_line(model, prompts, tmp_path):
    broken, weights = tiny_model(tmp_path / "broken"), tmp_path / "broken" / "model.safetensors"
    save_file({name: value[:1] for name, value in load_file(weights).items()}, weights, {"format": "pt"})
    with pytest.raises(RunFailed, match="generation failed: ") as failed:
        generate(config(), model=str(broken), prompts=prompts, output=tmp_path / "out.jsonl", progress=False)
    assert "\n" not in str(failed.value)
    assert f"{broken}: its weights have different shapes from those in its config.json; copy it again" in str(
        failed.value
    )
    weights.write_bytes(b"no weights")
    with pytest.raises(RequestError, match=r"broken: model\.safetensors is damaged \(.*; copy it again"):
        generate(config(), model=str(broken), prompts=prompts, output=tmp_path / "out.jsonl", progress=False)


@pytest.mark.usefixtures("local_ray")
def test_metrics_of_many_predictions_are_the_same_from_tasks(monkeypatch):
    from tests.unit.test_metrics import PAIRS, rows

    every = config(metrics=list(metrics.BUILTIN_METRICS))
    here = metrics.score(every, rows(PAIRS * 20, sources=("x", "y")))
    monkeypatch.setattr("raysft.generate.metrics.blocks.PARALLEL_FROM", 1)
    monkeypatch.setattr("raysft.generate.metrics.blocks._BLOCK", 33)
    assert metrics.score(every, rows(PAIRS * 20, sources=("x", "y"))) == here


@pytest.mark.usefixtures("local_ray")
def test_a_metric_that_fails_in_a_task_is_one_line(monkeypatch):
    from tests.unit.test_metrics import rows

    monkeypatch.setattr("raysft.generate.metrics.blocks.PARALLEL_FROM", 1)
    with pytest.raises(RunFailed, match=r"^generate.metrics: 'rouge' failed: .*NoneType") as failed:
        metrics.score(config(metrics=["rouge", "bleu"]), rows([("text", "text"), ("text", None)]))
    assert len(str(failed.value)) < 350


def test_no_prompts_give_an_empty_output(model, prompts, tmp_path):
    empty = tmp_path / "empty.parquet"
    pq.write_table(pq.read_table(prompts).slice(0, 0), empty)
    rows = generate(config(), model=str(model), prompts=empty, output=tmp_path / "out.jsonl", progress=False)
    assert metrics.flat_results(rows)["predict_examples"] == 0
    assert (tmp_path / "out.jsonl").read_text() == ""


@pytest.mark.parametrize("padding", ["<|pad|>", "<|im_end|>"])
@pytest.mark.parametrize("penalty", [1.0, 1.5])
def test_a_batch_is_greedy_like_each_prompt_alone(model, prompts, tmp_path, padding, penalty):
    tokenizer = AutoTokenizer.from_pretrained(model)
    tokenizer.pad_token = padding
    same = AutoModelForCausalLM.from_pretrained(model)
    folder = tmp_path / "same"
    same.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    engine = TransformersEngine(config(repetition_penalty=penalty), str(folder))
    expected = alone(model, prompts, repetition_penalty=penalty)
    assert len({tuple(tokens) for tokens in expected}) == len(QUESTIONS)
    assert [c.text for c in engine.complete(*read(prompts))] == as_text(model, expected)


def test_generation_ends_at_the_stop_tokens_of_tokenizer_and_generation_config(model, prompts, tmp_path):
    free = alone(model, prompts)
    stop = free[0][2]
    folder = tiny_model(tmp_path / "stops", spread=0.2)
    settings = json.loads((folder / "generation_config.json").read_text())
    (folder / "generation_config.json").write_text(json.dumps({**settings, "eos_token_id": [stop], "temperature": 9}))
    completions = TransformersEngine(config(), str(folder)).complete(*read(prompts))
    cut = [tokens[: tokens.index(stop)] if stop in tokens else tokens for tokens in free]
    assert [c.text for c in completions] == as_text(model, cut)
    assert completions[0] == Completion(text=as_text(model, [free[0][:2]])[0], tokens=3, stop="eos")


def test_a_row_ends_where_the_model_has_no_more_positions(model):
    engine = TransformersEngine(config(max_new_tokens=400), str(model))
    short, long = engine.complete(["a", "b"], [[5, 6, 7], list(range(3, 303)) * 2])
    assert short.tokens <= 400
    assert long.tokens <= 256
    assert (short.cut, long.cut) == (0, 600 - 256)


def test_sampling_depends_on_the_seed_and_the_prompt_alone(model, prompts):
    ids, tokens = read(prompts)
    settings = config(do_sample=True)
    engine = TransformersEngine(settings, str(model))
    together = [c.text for c in engine.complete(ids, tokens)]
    apart = [engine.complete([id], [prompt])[0].text for id, prompt in zip(ids, tokens, strict=True)]
    assert together == apart
    assert [c.text for c in engine.complete(ids[::-1], tokens[::-1])][::-1] == together
    other_seed = TransformersEngine(with_overrides(settings, {"run.seed": 1}), str(model))
    assert [c.text for c in other_seed.complete(ids, tokens)] != together
    assert engine.complete(["other"], tokens[:1])[0].text != together[0]


@pytest.mark.parametrize(("temperature", "top_k", "top_p"), [(0.95, 50, 0.7), (2.0, 0, 0.9), (0.5, 5, 1.0), (1, 1, 1)])
def test_sampling_has_the_distribution_of_transformers(temperature, top_k, top_p):
    from transformers import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

    logits = torch.randn(1, 200, generator=torch.Generator().manual_seed(3)) * 2
    warped = TemperatureLogitsWarper(float(temperature))(None, logits)  # pyright: ignore
    if top_k:
        warped = TopKLogitsWarper(top_k)(None, warped)  # pyright: ignore
    expected = torch.softmax(TopPLogitsWarper(float(top_p))(None, warped), -1)[0]  # pyright: ignore

    draws = 20_000
    uniforms = (torch.arange(draws) + 0.5) / draws
    tokens = choose_tokens(logits.expand(draws, -1), uniforms, temperature, top_k, top_p)
    share = torch.bincount(tokens, minlength=200) / draws
    assert torch.allclose(share, expected, atol=2 / draws)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_an_adapter_is_generated_with(model, prompts, tmp_path, dtype):
    from peft import LoraConfig, PeftModel, get_peft_model

    base = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    torch.manual_seed(1)
    adapted = get_peft_model(base, LoraConfig(r=4, target_modules=["q_proj", "down_proj"], init_lora_weights=False))
    folder = tmp_path / "adapter"
    adapted.save_pretrained(folder)
    AutoTokenizer.from_pretrained(model).save_pretrained(folder)

    settings = with_overrides(config(), {"model.dtype": dtype})
    completions = TransformersEngine(settings, str(folder)).complete(*read(prompts))
    plain = AutoModelForCausalLM.from_pretrained(model, dtype=getattr(torch, dtype))
    both = PeftModel.from_pretrained(plain, str(folder)).eval()
    ids = read(prompts)[1][1]
    tokens = both.generate(input_ids=torch.tensor([ids]), max_new_tokens=24, do_sample=False)[0, len(ids) :].tolist()
    alike = as_text(model, [tokens[: 24 if dtype == "float32" else 3]])[0]
    assert completions[1].text.startswith(alike)  # bfloat16 rounds otherwise in another shape, sooner or later
    assert completions[1].text != as_text(model, alone(model, prompts))[1]


@pytest.mark.parametrize(
    ("prompts", "engines", "settings", "size"),
    [
        (1000, 1, {}, 128),
        (200, 4, {}, 64),
        (200, 2, {}, 100),
        (9, 2, {}, 64),
        (1000, 2, {"batch_size": 16}, 16),
        (9, 2, {"batch_size": 16}, 16),
        (1000, 2, {"batching": "continuous"}, 500),
        (1000, 1, {"batching": "continuous"}, 512),
        (200, 2, {"batching": "continuous"}, 100),
        (20, 2, {"batching": "continuous", "batch_size": 16}, 16),
    ],
)
def test_a_large_batch_is_divided_among_the_engines(model, prompts, engines, settings, size):
    given = {"model": {"path": str(model)}, "data": {"train": [{"name": "a", "path": "a"}]}, "generate": settings}
    table = pa.table({"id": list(map(str, range(prompts))), "input_ids": [[1]] * prompts})
    asked = ModelPrompts.all(str(model), Prompts.of(table))
    pool = engine_pool.Pool(engines, cpus=1.0, gpus=0.0, engines_per_node=1)
    assert ray_pipeline._block_size(parse(given), asked, pool) == size


def test_the_pool_follows_the_cluster():
    head, two, four = Node(0), Node(2), Node(4)
    assert engine_pool.size_pool(config(), [head, two, four], batches=9).engines == 2
    assert engine_pool.size_pool(config(), [head, two, four], batches=1).engines == 1
    asked = engine_pool.size_pool(config(num_actors=6), [head, two, four], batches=9)
    assert (asked.engines, asked.engines_per_node, asked.cpus) == (6, 3, 1.0)
    with pytest.raises(RequestError, match=r"generate\.num_actors=6 needs 6 CPUs, but the cluster has 4"):
        engine_pool.size_pool(config(num_actors=6), [head, four], batches=9)
    left = engine_pool.size_pool(config(num_actors=6), [head, four], batches=9, shrinks=True)
    assert (left.engines, left.engines_per_node) == (4, 4), "a node died meanwhile"
    gpus = with_overrides(config(), {"scaling.use_gpu": True})
    pool = engine_pool.size_pool(gpus, [Node(1, gpus=8), Node(1, gpus=8)], batches=99)
    assert (pool.engines, pool.gpus, pool.cpus) == (16, 1.0, 0.0)
    nodes = [Node(1, gpus=8), Node(1, gpus=3), Node(1, gpus=1)]
    large = with_overrides(gpus, {"generate.gpus_per_engine": 2})
    pool = engine_pool.size_pool(large, nodes, batches=99)
    assert (pool.engines, pool.gpus) == (5, 2.0), "an engine lies on one node"
    with pytest.raises(RequestError, match="num_actors=6 needs 6 times 2 GPUs, but the cluster can place 5"):
        engine_pool.size_pool(with_overrides(large, {"generate.num_actors": 6}), nodes, batches=99)
    with pytest.raises(RequestError, match="gpus_per_engine=9 needs 9 GPUs on one node, but no node has that many"):
        engine_pool.size_pool(with_overrides(gpus, {"generate.gpus_per_engine": 9}), nodes, batches=99)


@pytest.mark.usefixtures("local_ray")
def test_ray_data_takes_engines_that_reserve_gpus(model, prompts):
    table = pq.read_table(prompts, columns=["id", "input_ids"])
    settings = with_overrides(config(model), {"scaling.use_gpu": True})
    pool = engine_pool.size_pool(settings, [Node(cpus=2.0, gpus=2.0)], batches=6)
    assert (pool.engines, pool.gpus) == (2, 1.0)
    batches = [table.slice(0, 3), table.slice(3)]
    dataset, _ = ray_pipeline._by_actors(settings, [str(model)], (), [batches], pool, None)
    assert "EngineActor" in repr(dataset)
