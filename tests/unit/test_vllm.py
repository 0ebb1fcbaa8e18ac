"""Generation by vLLM: what it is asked, by settings that Ray takes, and what becomes of its answers and failures.

vLLM itself is not run. Ray's stage runs here too, on a stand-in that has of vLLM what the stage calls.
"""

from __future__ import annotations

import asyncio
import importlib.util
import json
import sys
import types
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image
from transformers import AutoTokenizer

from raysft.config import Config, parse, with_overrides
from raysft.data.shards.media_column import MEDIA
from raysft.errors import RequestError
from raysft.generate.batch_inference import Output, generate
from raysft.generate.engine_pool import Pool
from raysft.generate.engines import check_engine, vllm
from raysft.generate.engines.vllm import VllmModel
from raysft.generate.prompts import Prompts
from raysft.models.processor import load_processor
from tests import vision_prompts
from tests.tiny import tiny_model
from tests.tiny_vision import tiny_vision_model

ABSENT = importlib.util.find_spec("vllm") is None
OUT_OF_VOCABULARY = 10**6


def config(use_gpu: bool = True, **generate) -> Config:
    data = {"train": [{"name": "a", "path": "a"}]}
    settings = {"engine": "vllm", "max_new_tokens": 20, "batch_size": 2, **generate}
    return parse({"model": {"path": "m"}, "data": data, "scaling": {"use_gpu": use_gpu}, "generate": settings})


@pytest.fixture
def adapter(model, tmp_path) -> Path:
    folder = tmp_path / "adapter"
    AutoTokenizer.from_pretrained(model).save_pretrained(folder)
    describe(folder, base_model_name_or_path=str(model), peft_type="LORA", r=12, bias="none", use_dora=False)
    return folder


def describe(adapter: Path, **settings: Any) -> None:
    path = adapter / "adapter_config.json"
    before = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps(before | settings))


def prompts(*tokens: list[int]) -> pa.Table:
    ids = [f"q:{at}" for at in range(len(tokens))]
    return pa.table({"id": ids, "input_ids": pa.array(tokens, pa.list_(pa.int32()))})


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_beams": 2, "do_sample": False}, "generate.engine=vllm .* generate.num_beams=2; set"),
        ({"max_seconds": 9}, "generate.engine=vllm .* generate.max_seconds=9; remove"),
    ],
)
def test_what_vllm_cannot_do_is_refused(settings, message):
    with pytest.raises(RequestError, match=message):
        config(**settings)


@pytest.mark.parametrize(
    ("key", "value", "named"),
    [
        ("finetuning", "oft", "model.finetuning=oft"),
        ("lora", {"dora": True}, "model.lora.dora=true"),
        ("lora", {"extra_modules": ["x"]}, "model.lora.extra_modules="),
    ],
)
def test_adapters_that_vllm_does_not_serve_are_refused_before_they_are_trained(key, value, named):
    raw = config().model_dump(mode="json")
    raw["model"][key] = value
    with pytest.raises(RequestError, match=rf"generate\.engine=vllm .* LoRA .* {named}.*; change"):
        parse(raw)
    raw["generate"]["enabled"] = False
    parse(raw)


@pytest.mark.skipif(not ABSENT, reason="vLLM is installed")
def test_where_vllm_is_not_installed_it_is_said_first(tmp_path):
    check_engine(config(engine="transformers"))
    with pytest.raises(
        RequestError, match=r"^generate.engine=vllm, but vLLM is not installed; pip install 'raysft\[vllm\]'"
    ):
        generate(config(), tmp_path / "none", [Output("none", tmp_path / "out.jsonl")])
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("version", "use_gpu", "named"),
    [
        ("0.29.0", True, ""),
        ("0.29.0+cpu", False, ""),
        ("0.29.0", False, "use_gpu=false, but vLLM 0.29.0 is built for GPUs; install its build for CPUs"),
        ("0.29.0+cpu", True, "use_gpu=true, but vLLM 0.29.0[+]cpu is built for CPUs; install its build for GPUs"),
    ],
)
def test_a_build_of_vllm_runs_on_the_processors_that_it_is_for(monkeypatch, tmp_path, version, use_gpu, named):
    package = tmp_path / "vllm"
    package.mkdir()
    (package / "__init__.py").write_text("raise AssertionError('looking at it must not import it')")
    described = tmp_path / f"vllm-{version}.dist-info"
    described.mkdir()
    (described / "METADATA").write_text(f"Metadata-Version: 2.1\nName: vllm\nVersion: {version}\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    if not named:
        check_engine(config(use_gpu=use_gpu))
        return
    other = str(not use_gpu).lower()
    with pytest.raises(
        RequestError, match=rf"{named} on every node, set scaling.use_gpu={other}, or set generate.engine"
    ):
        check_engine(config(use_gpu=use_gpu))


def test_requests_are_tokens_and_settings_of_their_own(model):
    settings = config(do_sample=True, temperature=0.5, top_k=0, stop_tokens=["<|im_start|>"], max_new_tokens=400)
    served = VllmModel.of(settings, str(model))
    assert (served.positions, served.base, served.rank, served.padding) == (512, None, 0, 0)
    long = list(range(3, 303)) * 2
    table = vllm.requests(settings, served, prompts([5, 6], [], long))
    assert table.column_names == ["id", "cut", "tokenized_prompt", "sampling_params"]
    assert table["tokenized_prompt"].to_pylist() == [[5, 6], [served.padding], long[-256:]]
    assert table["cut"].to_pylist() == [0, 0, 600 - 256]
    first, second, third = table["sampling_params"].to_pylist()
    assert (first["max_tokens"], second["max_tokens"], third["max_tokens"]) == (400, 400, 256)
    assert first["stop_token_ids"] == [1, 2]
    assert (first["temperature"], first["top_p"], first["top_k"]) == (0.5, 0.7, 0)
    assert len({each["seed"] for each in (first, second, third)}) == 3
    alone = vllm.requests(settings, served, prompts([9])).to_pylist()[0]
    assert alone["sampling_params"]["seed"] == first["seed"], "the prompt's id and the run's seed alone"
    other = vllm.sampling(with_overrides(settings, {"run.seed": 1}), served, "q:0", 9)
    assert 0 <= other["seed"] != first["seed"]
    greedy = vllm.sampling(config(do_sample=False), served, "q:0", 9)
    assert greedy["temperature"] == 0.0
    assert not {"seed", "top_p", "top_k"} & set(greedy)


def test_ray_takes_the_settings(model, adapter):
    settings = config(do_sample=False, gpus_per_engine=2)
    served = VllmModel.of(settings, str(model))
    blocks = [vllm.requests(settings, served, prompts([5] * 30, [6]))] * 10
    made = vllm.processor_config(settings, served, Pool(4, 0.0, 2.0, 4), blocks)
    assert (made.model_source, made.batch_size, made.concurrency) == (str(model), 2, (4, 4))
    assert made.max_concurrent_batches == made.max_tasks_in_flight_per_actor == 3, "an engine's share of 10 batches"
    assert made.should_continue_on_error
    assert (made.engine_kwargs["tensor_parallel_size"], made.engine_kwargs["max_model_len"]) == (2, 50)
    assert (made.engine_kwargs["dtype"], made.engine_kwargs["trust_remote_code"]) == ("bfloat16", False)
    assert not any((made.chat_template_stage, made.tokenize_stage, made.detokenize_stage))

    served = VllmModel.of(settings, str(adapter))
    assert (served.base, served.folder, served.rank) == (model, adapter, 12)
    blocks = [vllm.requests(settings, served, prompts([5]))] * 9000
    made = vllm.processor_config(settings, served, Pool(1, 0.0, 1.0, 1), blocks)
    assert (made.model_source, made.engine_kwargs["tokenizer"]) == (str(model), str(adapter))
    assert (made.engine_kwargs["enable_lora"], made.engine_kwargs["max_lora_rank"]) == (True, 16)
    assert made.max_concurrent_batches == vllm.IN_FLIGHT / 2
    assert blocks[0]["model"].to_pylist() == [str(adapter)]


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"peft_type": "OFT"}, "peft_type=OFT"),
        ({"use_dora": True}, "use_dora"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"rank_pattern": {"q_proj": 2}}, "rank_pattern"),
        ({"bias": "all"}, "bias=all"),
        ({"r": 513}, "r=513"),
    ],
)
def test_an_adapter_that_vllm_does_not_serve_is_refused(adapter, settings, named):
    describe(adapter, **settings)
    with pytest.raises(RequestError, match=f"vLLM does not support adapters with {named}; merge it into its model"):
        VllmModel.of(config(), str(adapter))


def test_gpus_that_do_not_divide_the_heads_are_refused(model):
    with pytest.raises(RequestError, match=r"4 attention heads, but generate.gpus_per_engine=3"):
        VllmModel.of(config(gpus_per_engine=3), str(model))


def test_stops_are_those_of_the_model_that_transformers_would_load(tmp_path):
    folder = tiny_model(tmp_path / "stops")
    path = folder / "generation_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "eos_token_id": [7, 9]}))
    assert VllmModel.of(config(), str(folder)).stops == [2, 7, 9]
    path.unlink()
    assert VllmModel.of(config(), str(folder)).stops == [2]


def answered(id: str, tokens: list[int], seconds: float, error: str = "") -> dict[str, Any]:
    text = {"generated_text": " ".join(map(str, tokens)), "generated_tokens": tokens}
    return {"id": id, "cut": 0, **text, "time_taken_llm": seconds, "__inference_error__": error}


def test_answers_become_entries():
    rows = [answered("a", [5, 2], 1.5), answered("b", [5, 6], 0.5), answered("c", [], -1, "ValueError: too\nlong")]
    first, second, third = vllm.entries(rows, stops=[2])
    shared = {"cut": 0, "seconds": 1.5}
    assert first == {"id": "a", "predict": "5 2", "tokens": 2, "stop": "eos", "error": "", **shared}
    assert second == {"id": "b", "predict": "5 6", "tokens": 2, "stop": "length", "error": "", **shared}
    assert third == {"id": "c", "predict": "", "tokens": 0, "stop": "error", "error": "ValueError: too long", **shared}


def plain_stage(settings: Config, served: VllmModel, blocks: list[pa.Table], pool: Pool) -> Any:
    """Ray's stage around vLLM, with the settings of this project."""
    from ray.llm._internal.batch.stages import vLLMEngineStage

    made = vllm.processor_config(settings, served, pool, blocks)
    made_of = {"batch_size", "max_concurrent_batches", "engine_kwargs", "task_type", "should_continue_on_error"}
    return vLLMEngineStage(
        fn_constructor_kwargs={
            "model": made.model_source,
            "log_engine_metrics": made.log_engine_metrics,
            **{name: getattr(made, name) for name in made_of},
        },
        map_batches_kwargs={},
    )


@pytest.mark.parametrize(("cpus", "gpus"), [(1.0, 0.0), (0.0, 2.0)])
def test_an_engine_takes_the_gpus_of_the_pool_and_none_on_cpus(model, cpus, gpus):
    settings = config(use_gpu=bool(gpus), gpus_per_engine=int(gpus) or 1)
    served = VllmModel.of(settings, str(model))
    blocks = [vllm.requests(settings, served, prompts([5]))]
    made = plain_stage(settings, served, blocks, Pool(1, cpus, gpus, 1))
    vllm.adapt(made, served.source, Pool(1, cpus, gpus, 1), restarts=3)
    taken = made.get_dataset_map_batches_kwargs(batch_size=2, data_column="__data")
    assert {name: taken[name] for name in ("num_cpus", "num_gpus", "max_restarts")} == {
        "num_cpus": cpus,
        "num_gpus": gpus,
        "max_restarts": 3,
    }


def stage(settings: Config, served: VllmModel, blocks: list[pa.Table]) -> Any:
    """The stage's engine, made as Ray Data makes it in an actor."""
    plain = plain_stage(settings, served, blocks, Pool(1, 0.0, 1.0, 1))
    arguments = plain.get_dataset_map_batches_kwargs(batch_size=2, data_column="__data")["fn_constructor_kwargs"]
    return vllm.on_each_node(plain.fn, served.source)(**arguments)


def run(engine: Any, block: pa.Table) -> list[dict[str, Any]]:
    async def collect() -> list[dict[str, Any]]:
        rows = np.array([dict(row) for row in block.to_pylist()], dtype=object)
        return [row async for batch in engine({"__data": rows}) for row in batch["__data"]]

    return asyncio.run(collect())


@pytest.mark.skipif(not ABSENT, reason="vLLM is installed")
def test_an_engine_that_does_not_start_says_why_in_its_rows(model):
    settings = config()
    served = VllmModel.of(settings, str(model))
    block = vllm.requests(settings, served, prompts([5, 6], [7]))
    for entry in vllm.entries(run(stage(settings, served, [block]), block), served.stops):
        assert entry["stop"] == "error"
        assert entry["error"].startswith("ImportError: vLLM is not installed")


@dataclass
class _Sampled:
    text: str
    token_ids: list[int]
    logprobs: None = None


class _RequestOutput(types.SimpleNamespace):
    pass


class _Engine:
    """Answers with the prompt's last token and the one that stops; keeps what it was asked."""

    asked: ClassVar[list[tuple[Any, Any]]] = []
    prompts: ClassVar[list[dict[str, Any]]] = []

    @classmethod
    def from_engine_args(cls, arguments: Any, stat_loggers: Any) -> _Engine:
        return cls()

    async def generate(self, request_id: str, prompt: Any, sampling_params: Any, lora_request: Any):
        tokens = prompt["prompt_token_ids"]
        if OUT_OF_VOCABULARY in tokens:
            raise ValueError("Token id is out of vocabulary")
        self.asked.append((sampling_params, lora_request))
        self.prompts.append(prompt)
        answer = [_Sampled(str(tokens[-1]), [tokens[-1], 2])]
        yield _RequestOutput(
            finished=True, prompt=None, prompt_token_ids=tokens, outputs=answer, metrics=None, prompt_logprobs=None
        )


class _Arguments(types.SimpleNamespace):
    def create_engine_config(self) -> Any:
        scheduler = types.SimpleNamespace(max_num_seqs=4)
        return types.SimpleNamespace(
            scheduler_config=scheduler, parallel_config=types.SimpleNamespace(pipeline_parallel_size=1)
        )


@pytest.fixture
def installed_vllm(monkeypatch) -> type[_Engine]:
    """A module of that name, with what Ray's stage takes from it."""
    module = types.ModuleType("vllm")
    parts = {
        "vllm.inputs": types.SimpleNamespace(),
        "vllm.inputs.llm": types.SimpleNamespace(TokensPrompt=dict, TextPrompt=dict),
        "vllm.lora": types.SimpleNamespace(request=types.SimpleNamespace(LoRARequest=types.SimpleNamespace)),
        "vllm.outputs": types.SimpleNamespace(RequestOutput=_RequestOutput, PoolingRequestOutput=None),
    }
    for name, value in {
        **{name.rpartition(".")[2]: part for name, part in parts.items() if name.count(".") == 1},
        "AsyncEngineArgs": _Arguments,
        "AsyncLLMEngine": _Engine,
        "SamplingParams": types.SimpleNamespace,
    }.items():
        setattr(module, name, value)
    for name, part in {"vllm": module, **parts}.items():
        monkeypatch.setitem(sys.modules, name, part)  # pyright: ignore
    monkeypatch.setattr("ray.llm._internal.batch.stages.vllm_engine_stage._VLLM_PROMPT_CLASSES", None)
    monkeypatch.setattr(_Engine, "asked", [])
    monkeypatch.setattr(_Engine, "prompts", [])
    return _Engine


def test_rays_stage_takes_the_requests_and_one_that_fails_costs_no_other(model, adapter, installed_vllm):
    settings = config(do_sample=True)
    for folder, named in ((model, None), (adapter, str(adapter))):
        installed_vllm.asked.clear()
        served = VllmModel.of(settings, str(folder))
        block = vllm.requests(settings, served, prompts([5, 6], [OUT_OF_VOCABULARY], [7]))
        first, second, third = vllm.entries(run(stage(settings, served, [block]), block), served.stops)
        assert (first["id"], first["predict"], first["tokens"], first["stop"]) == ("q:0", "6", 2, "eos")
        assert (second["id"], second["stop"]) == ("q:1", "error")
        assert second["error"] == "ValueError: Token id is out of vocabulary"
        assert (third["id"], third["predict"]) == ("q:2", "7")
        assert [each.seed for each, _ in installed_vllm.asked] == [
            vllm.sampling(settings, served, id, 20)["seed"] for id in ("q:0", "q:2")
        ]
        assert {lora and lora.lora_path for _, lora in installed_vllm.asked} == {named}


def test_vllm_stops_where_the_turns_of_the_data_end_and_where_an_adapter_says(model, adapter):
    eos = AutoTokenizer.from_pretrained(model).eos_token_id
    assert VllmModel.of(config(), str(model), ends=[7]).stops == [eos, 7]
    (adapter / "generation_config.json").write_text(json.dumps({"eos_token_id": [eos, 9]}))
    assert VllmModel.of(config(), str(adapter)).stops == [eos, 9]


@pytest.mark.parametrize("family", ["llava", "idefics3", "qwen2.5-vl"])
def test_an_image_is_one_token_and_a_picture_of_the_size_that_was_tokenized(tmp_path, installed_vllm, family):
    folder = tiny_vision_model(tmp_path / "model", family)
    processor, pictures = load_processor(folder), vision_prompts.draw(tmp_path)
    # The places of images in shards include the tags that a chat template writes around them.
    tags = 1 if family.startswith("qwen") else 0
    file = vision_prompts.write_prompts_file(tmp_path / "prompts.parquet", processor, pictures, tags)
    table = Prompts.read(file).table(np.arange(len(vision_prompts.ASKED)))
    settings = config(do_sample=False, max_new_tokens=40)
    served = VllmModel.of(settings, str(folder))
    block = vllm.requests(settings, served, table)
    for parts, tokens in zip(vision_prompts.ASKED, block["tokenized_prompt"].to_pylist(), strict=True):
        text = vision_prompts.rendered(processor, pictures, parts)
        assert tokens == processor.tokenizer.encode(text, add_special_tokens=False)
    made = vllm.processor_config(settings, served, Pool(1, 0.0, 1.0, 1), [block])
    assert made.engine_kwargs["limit_mm_per_prompt"] == {"image": 2}
    longest = max(map(len, table["input_ids"].to_pylist()))
    assert made.engine_kwargs["max_model_len"] == longest + 40, "vLLM puts all tokens of an image in place of the one"

    pictures["other"].unlink()
    Image.new("RGB", (168, 112)).save(pictures["small"])
    rows = run(stage(settings, served, [block]), block)
    assert not any("multimodal_data" in row or "media" in row for row in rows)
    found = vllm.entries(rows, served.stops)
    assert [each["stop"] for each in found] == ["eos", "eos", "error", "error", "eos", "eos"]
    assert "small.png: has changed since it was tokenized" in found[2]["error"]
    assert "other.png: cannot be read" in found[3]["error"]
    shown = [
        [image.size for image in (each["multi_modal_data"] or {}).get("image", [])] for each in installed_vllm.prompts
    ]
    size = vision_prompts.SIZES
    assert shown == [[size["wide"]], [], [], [size["tall"], size["wide"]]]


def test_of_a_prompt_that_vllm_has_too_few_positions_for_no_part_of_an_image_stays(tmp_path):
    settings = config(max_new_tokens=4)
    folder = tiny_vision_model(tmp_path / "model", "qwen2.5-vl")
    processor, pictures = load_processor(folder), vision_prompts.draw(tmp_path)
    ids, media = vision_prompts.tokenized(processor, pictures, ["<small>", "<wide>", "Hi"])
    served = VllmModel.of(settings, str(folder))
    served = replace(served, positions=4 + len(ids) - media[1].start - 1)
    described = pa.array([[asdict(each) for each in media]], MEDIA)
    table = pa.table({"id": ["a"], "input_ids": pa.array([ids], pa.list_(pa.int32())), "media": described})
    [row] = vllm.requests(settings, served, table).to_pylist()
    assert (row["tokenized_prompt"], row["media"], row["cut"]) == (ids[media[1].stop :], [], media[1].stop)
    served = replace(served, positions=4 + len(ids) - media[0].stop)
    image = processor.image_token_id
    [row] = vllm.requests(settings, served, table).to_pylist()
    assert row["tokenized_prompt"] == [*ids[media[0].stop : media[1].start], image, *ids[media[1].stop :]]
    assert [each["location"] for each in row["media"]] == [str(pictures["wide"])]
