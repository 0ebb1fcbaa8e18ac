"""Several outputs of one pool of engines: what an engine holds in memory, and in which order outputs become complete."""

from __future__ import annotations

import weakref
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from transformers import AutoTokenizer

from raysft.config import Config, parse
from raysft.errors import RunFailed
from raysft.generate import batch_inference, engine_actor
from raysft.generate.batch_inference import Output, generate
from raysft.generate.engine_actor import EngineActor, batch_row
from raysft.generate.engines import continuous, create_engine
from raysft.generate.prediction_store import PredictionStore
from raysft.generate.prompts import ModelPrompts
from raysft.storage.json_files import read_jsonl
from tests.tiny import tiny_model

QUESTIONS = ("Hi", "What is the capital of France?", "a list of three", "x")


def config(**generate) -> Config:
    settings = {"max_new_tokens": 8, "do_sample": False, "metrics": ["exact_match"], **generate}
    data = {"train": [{"name": "a", "path": "a"}]}
    scaling = {"threads_per_worker": 1}
    return parse({"model": {"path": "m"}, "data": data, "generate": settings, "scaling": scaling})


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> list[str]:
    """Two models that answer differently."""
    folder = tmp_path_factory.mktemp("models")
    return [str(tiny_model(folder / str(seed), seed, spread=0.2)) for seed in (0, 1)]


@pytest.fixture
def prompts(models, tmp_path) -> Path:
    ids = AutoTokenizer.from_pretrained(models[0])(list(QUESTIONS))["input_ids"]
    table = {"id": list("abcd"), "source": ["s"] * 4, "prompt": QUESTIONS, "label": ["l"] * 4}
    pq.write_table(pa.table({**table, "input_ids": pa.array(ids, pa.list_(pa.int32()))}), tmp_path / "prompts.parquet")
    return tmp_path / "prompts.parquet"


def block(prompts: Path, model: int) -> pa.Table:
    return batch_row(pq.read_table(prompts, columns=["id", "input_ids"]), model)


@pytest.mark.parametrize("batching", ["static", "continuous"])
def test_an_engine_frees_a_model_before_it_loads_the_next(models, prompts, monkeypatch, batching):
    loaded, alive = [], []

    def watched(*arguments):
        alive.append([reference() is not None for reference in loaded])
        engine = create_engine(*arguments)
        loaded.append(weakref.ref(engine._model.get_input_embeddings().weight))  # pyright: ignore
        return engine

    # An import that warns inside the call would leave its frames, with the engine, in pytest's log.
    assert continuous.ContinuousEngine
    monkeypatch.setattr(engine_actor, "create_engine", watched)
    settings = config(batching=batching)
    actor = EngineActor(settings, models, (), 1)
    order = [0, 0, 1, 1, 0]  # back to the first: what a restarted engine was working on comes again
    found = [actor(block(prompts, model))["predict"].to_pylist() for model in order]
    assert alive == [[], [False], [False, False]]
    ids, tokens = pq.read_table(prompts)["id"].to_pylist(), pq.read_table(prompts)["input_ids"].to_pylist()
    expected = [[each.text for each in create_engine(settings, model).complete(ids, tokens)] for model in models]
    assert expected[0] != expected[1]
    assert found == [expected[model] for model in order]


def test_a_model_that_does_not_load_costs_no_other_its_engine(models, prompts, tmp_path):
    actor = EngineActor(config(), [models[0], str(tmp_path)], (), 1)
    before = actor(block(prompts, 0))
    assert "failed" in actor(block(prompts, 1)).column_names
    assert actor(block(prompts, 0))["predict"] == before["predict"]


def entries(ids: str, predict: str, **others) -> list[dict]:
    plain = {"predict": predict, "tokens": 2, "cut": 0, "stop": "eos", "error": "", "seconds": 0.001}
    return [{"id": id, **plain, **others} for id in ids]


def test_outputs_become_complete_in_any_order(models, prompts, tmp_path, monkeypatch, capfd):
    first, second = tmp_path / "first.jsonl", tmp_path / "second.jsonl"
    asked, complete, now = [], [], [100.0]
    monkeypatch.setattr("raysft.generate.progress.time.monotonic", lambda: now[0])

    def pool(config, models, *others):
        asked.append([each.ids for each in models])
        assert all(isinstance(each, ModelPrompts) for each in models)
        for index, ids in ((0, "da"), (1, "bc"), (1, "ad"), (0, "c"), (0, "b")):
            complete.append((first.exists(), second.exists()))
            now[0] += 1
            yield index, entries(ids, f"{index} {ids}", cut=int(index == 1))

    monkeypatch.setattr(batch_inference, "completions", pool)
    outputs = [Output(models[0], first, "base", "one"), Output(models[1], second, "trained", "two")]
    lines = []
    rows = generate(config(), prompts, outputs, notify=lines.append)
    assert asked == [[list("abcd"), list("abcd")]]
    assert complete == [(False, False)] * 3 + [(False, True)] * 2
    assert [row["predict"] for row in read_jsonl(first)] == ["0 da", "0 b", "0 c", "0 da"]
    assert [row["predict"] for row in read_jsonl(second)] == ["1 ad", "1 bc", "1 bc", "1 ad"]
    assert lines == ["generating with one", "generating with two"]
    told = capfd.readouterr().err.splitlines()
    assert [line.partition(" |")[0] for line in told[:2]] == ["generate first", "generate second"]
    assert all("| 4/4 prompts |" in line for line in told[:2])
    assert told[2].startswith("second: 4 of 4 prompts were truncated at the beginning")
    times = {row.model: row.value for row in rows if row.metric == "runtime"}
    assert 0 < times["trained"] < times["base"] == 5, "the second was complete earlier, and began later"


def test_the_time_of_a_later_output_begins_where_the_one_before_ended(models, prompts, tmp_path, monkeypatch):
    now = [100.0]
    monkeypatch.setattr("raysft.generate.progress.time.monotonic", lambda: now[0])

    def pool(config, models, *others):
        # The start of the engines takes 7 seconds, the first batch 4, the second 2; loading the next model 3, its batches 5.
        for seconds, index, ids, took in ((11, 0, "ab", 4), (2, 0, "cd", 2), (8, 1, "ab", 5), (5, 1, "cd", 5)):
            now[0] += seconds
            yield index, entries(ids, "text", seconds=took)

    monkeypatch.setattr(batch_inference, "completions", pool)
    outputs = [Output(models[0], tmp_path / "first.jsonl", "base"), Output(models[1], tmp_path / "second.jsonl")]
    rows = generate(config(), prompts, outputs, progress=False)
    of = {(row.model, row.metric): row.value for row in rows}
    assert (of["base", "runtime"], of["trained", "runtime"]) == (13, 13)
    assert (of["base", "samples_per_second"], of["trained", "samples_per_second"]) == pytest.approx(
        (4 / 13, 4 / 13), abs=1e-3
    )
    assert of["base", "tokens_per_second"] == pytest.approx(8 / 6, abs=1e-3)
    assert of["trained", "tokens_per_second"] == pytest.approx(8 / 10, abs=1e-3)


def test_each_output_goes_on_with_what_it_lacks(models, prompts, tmp_path, monkeypatch):
    outputs = [Output(models[0], tmp_path / "first.jsonl", "base"), Output(models[1], tmp_path / "second.jsonl")]
    asked = []

    def pool(config, models, *others):
        asked.append([(each.model, each.ids) for each in models])
        for index, each in enumerate(models):
            for id in each.ids:
                yield index, entries(id, f"call {len(asked)}")

    class Killed(BaseException):
        pass

    def killed_at(count: int):
        append, calls = PredictionStore.append, []

        def appended(self, entries):
            stored = append(self, entries)
            calls.append(1)
            if len(calls) == count:
                raise Killed
            return stored

        return appended

    monkeypatch.setattr(batch_inference, "completions", pool)
    for count in (3, 2):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(PredictionStore, "append", killed_at(count))
            with pytest.raises(Killed):
                generate(config(), prompts, outputs, progress=False)
    generate(config(), prompts, outputs, progress=False)
    first, second = models
    assert asked == [
        [(first, list("abcd")), (second, list("abcd"))],
        [(first, ["d"]), (second, list("abcd"))],
        [(second, list("bcd"))],
    ]
    written = [[row["predict"] for row in read_jsonl(output.path)] for output in outputs]
    assert written == [["call 1"] * 3 + ["call 2"], ["call 2"] + ["call 3"] * 3]
    again = generate(config(), prompts, outputs, progress=False)
    assert len(asked) == 3, "complete outputs are only scored"
    assert {row.model for row in again} == {"base", "trained"}


def test_an_output_whose_prompts_all_failed_leaves_the_complete_one(models, prompts, tmp_path, monkeypatch):
    first, second = tmp_path / "first.jsonl", tmp_path / "second.jsonl"

    def pool(config, models, *others):
        yield 0, entries("abcd", "text")
        yield 1, entries("abcd", "", error="no memory")

    monkeypatch.setattr(batch_inference, "completions", pool)
    with pytest.raises(RunFailed, match=r"^generation failed: no memory"):
        generate(config(), prompts, [Output(models[0], first, "base"), Output(models[1], second)], progress=False)
    assert [row["predict"] for row in read_jsonl(first)] == ["text"] * 4
    assert not second.exists()
