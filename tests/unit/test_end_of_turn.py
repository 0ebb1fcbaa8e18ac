"""The token that ends turns in the data is the EOS token of the trained model, in all of its files."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from raysft.config import parse
from raysft.data.tokenization.turn_ends import stop_token_ids
from raysft.generate.engines import create_engine
from raysft.generate.engines.vllm import VllmModel
from raysft.models.end_of_turn import use_as_eos
from raysft.models.merging import merge
from raysft.run.inputs import ModelFiles
from raysft.run.pipeline import train_job
from raysft.storage.path import StoragePath
from raysft.storage.run_directory import RunDirectory
from raysft.train.export import export, gather
from raysft.train.job import TrainJob
from tests.shards import data_config, the_set, write_records, written
from tests.tiny import CHAT_TEMPLATE, tiny_model

FILES = ("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json")
MESSAGES = [{"role": "user", "content": "Hi."}, {"role": "assistant", "content": "Yo."}]
OTHER = "<|pad|>"
"""The EOS token of a base model here: it ends documents, and no turn."""


@pytest.fixture
def group():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def base_model(folder: Path) -> Path:
    """A model whose turns end with <|im_end|>, and whose EOS token is another one."""
    model = tiny_model(folder)
    tokenizer = AutoTokenizer.from_pretrained(model)
    tokenizer.eos_token = OTHER
    tokenizer.save_pretrained(model)
    for name in ("config.json", "generation_config.json"):
        settings = json.loads((model / name).read_text())
        (model / name).write_text(json.dumps({**settings, "eos_token_id": tokenizer.convert_tokens_to_ids(OTHER)}))
    return model


def ends_of(model: Path, template: str | None = None) -> tuple[int, ...]:
    """What ends the turns of a conversation."""
    write_records(model.parent / "a.jsonl", [{"messages": MESSAGES}] * 3)
    config = data_config(model.parent, sequence_length=256)
    return stop_token_ids(written(the_set(config, str(model)), str(model), template).turns)


def trained(base: Path, folder: Path, finetuning: str = "full", template: str | None = None) -> Path:
    """Export the base as if it had been trained; returns the folder."""
    model: Any = AutoModelForCausalLM.from_pretrained(base)
    if finetuning == "lora":
        model = get_peft_model(model, LoraConfig(target_modules=["q_proj"], base_model_name_or_path=str(base)))
        model.name_or_path = str(base)
    settings: dict[str, Any] = {"path": str(base), "finetuning": finetuning}
    if template:
        (base.parent / "t.jinja").write_text(template)
        settings["chat_template"] = str(base.parent / "t.jinja")
    config = parse({"model": settings, "data": {"train": [{"name": "a", "path": "a.jsonl"}]}})
    run = RunDirectory.of(StoragePath.of(folder))
    job = TrainJob(config, str(base), run, None, {}, ends=ends_of(base, config.chat_template))
    weights = gather(model)
    assert weights is not None
    export(model, weights, job.tokenizer(), StoragePath.of(folder), job.ends)
    return folder


def named(folder: Path) -> tuple[Any, Any, Any]:
    """EOS of tokenizer, generation config and config."""
    eos = (
        json.loads((folder / name).read_text())["eos_token_id"] for name in ("generation_config.json", "config.json")
    )
    return AutoTokenizer.from_pretrained(folder).eos_token, *eos


@pytest.mark.usefixtures("group")
def test_a_base_model_gets_the_token_that_ends_its_turns(tmp_path):
    base = base_model(tmp_path / "base")
    tokenizer = AutoTokenizer.from_pretrained(base)
    end, other = tokenizer.convert_tokens_to_ids(["<|im_end|>", OTHER])
    assert named(trained(base, tmp_path / "full")) == ("<|im_end|>", [end, other], end)
    model, ids = AutoModelForCausalLM.from_pretrained(tmp_path / "full"), torch.tensor([[5, 6, 7]])
    with torch.no_grad():  # a head that says <|im_end|>, whatever came before
        model.set_output_embeddings(torch.nn.Linear(64, len(tokenizer)))
        model.get_output_embeddings().weight.zero_()
        model.get_output_embeddings().bias.zero_()[end] = 1.0
    assert model.generate(ids, max_new_tokens=4, do_sample=False).tolist() == [[5, 6, 7, end]]
    # Prompts and conversations read as before.
    after = AutoTokenizer.from_pretrained(tmp_path / "full")
    for options in ({"tokenize": False}, {"add_generation_prompt": True}):
        assert after.apply_chat_template(MESSAGES, **options) == tokenizer.apply_chat_template(MESSAGES, **options)
    assert after("Hi.<|im_end|>").input_ids == tokenizer("Hi.<|im_end|>").input_ids


@pytest.mark.usefixtures("group")
def test_an_adapter_of_a_base_model_stops_there_too_alone_and_merged(tmp_path):
    base = base_model(tmp_path / "base")
    end, other = AutoTokenizer.from_pretrained(base).convert_tokens_to_ids(["<|im_end|>", OTHER])
    adapter = trained(base, tmp_path / "adapter", "lora")
    assert AutoTokenizer.from_pretrained(adapter).eos_token == "<|im_end|>"
    assert json.loads((adapter / "generation_config.json").read_text())["eos_token_id"] == [end, other]
    merge(adapter, tmp_path / "merged")
    assert named(tmp_path / "merged") == ("<|im_end|>", [end, other], end)


@pytest.mark.usefixtures("group")
@pytest.mark.parametrize("finetuning", ["full", "lora"])
def test_engines_find_it_in_the_files_alone(tmp_path, finetuning):
    base = base_model(tmp_path / "base")
    end, other = AutoTokenizer.from_pretrained(base).convert_tokens_to_ids(["<|im_end|>", OTHER])
    folder = trained(base, tmp_path / "out", finetuning)
    settings = {"model": {"path": str(base)}, "data": {"train": [{"name": "a", "path": "a.jsonl"}]}}
    assert VllmModel.of(parse(settings), str(folder)).stops == sorted([end, other])
    for batching in ("static", "continuous"):
        config = parse({**settings, "generate": {"batching": batching, "do_sample": False}})
        assert create_engine(config, str(folder), threads=1)._stops == sorted([end, other])
        assert create_engine(config, str(base), threads=1)._stops == [other]
        assert create_engine(config, str(base), threads=1, ends=(end,))._stops == sorted([end, other])


@pytest.mark.usefixtures("group")
@pytest.mark.parametrize("finetuning", ["full", "lora"])
def test_the_files_of_a_model_that_stops_there_already_stay_as_they_are(tmp_path, finetuning):
    base = tiny_model(tmp_path / "base")
    AutoTokenizer.from_pretrained(base).save_pretrained(base)
    out = trained(base, tmp_path / "out", finetuning)
    if finetuning == "lora":
        merge(out, tmp_path / "merged")
        out = tmp_path / "merged"
    AutoModelForCausalLM.from_pretrained(base).save_pretrained(tmp_path / "again")  # as transformers writes them
    AutoTokenizer.from_pretrained(base).save_pretrained(tmp_path / "again")
    for name in FILES:
        assert (out / name).read_text() == (tmp_path / "again" / name).read_text()


@pytest.mark.usefixtures("group")
@pytest.mark.parametrize("end", ["\n\n### End\n\n", "{{ eos_token }}\n\n"])
def test_the_eos_token_stays_where_turns_end_with_text_or_with_it(tmp_path, end):
    base = base_model(tmp_path / "base")
    other = AutoTokenizer.from_pretrained(base).convert_tokens_to_ids(OTHER)
    alpaca = (
        "{% for m in messages %}{% if m.role == 'user' %}### Instruction:\n{{ m.content }}\n\n{% else %}### Response:\n"
        "{% generation %}{{ m.content }}" + end + "{% endgeneration %}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}### Response:\n{% endif %}"
    )
    assert named(trained(base, tmp_path / "out", template=alpaca)) == (OTHER, other, other)


def test_a_template_that_writes_the_eos_token_elsewhere_goes_on_to_write_the_former_one(tmp_path):
    template = "  {{ eos_token }}" + CHAT_TEMPLATE
    tokenizer = AutoTokenizer.from_pretrained(base_model(tmp_path / "base"))
    tokenizer.chat_template = template
    before = tokenizer.apply_chat_template(MESSAGES, tokenize=False)
    use_as_eos(tokenizer, ends_of(tmp_path / "base", template))
    tokenizer.save_pretrained(tmp_path / "out")
    after = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert (after.eos_token, after.apply_chat_template(MESSAGES, tokenize=False)) == ("<|im_end|>", before)
    assert before.startswith(f"  {OTHER}<|im_start|>")


def test_of_several_tokens_that_end_turns_the_most_frequent_is_chosen_and_the_eos_token_if_it_is_one(tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(base_model(tmp_path / "base"))
    end, start = tokenizer.convert_tokens_to_ids(["<|im_end|>", "<|im_start|>"])
    use_as_eos(tokenizer, (start, tokenizer.eos_token_id))
    assert tokenizer.eos_token == OTHER
    use_as_eos(tokenizer, ())
    assert tokenizer.eos_token == OTHER
    use_as_eos(tokenizer, (end, start))
    assert tokenizer.eos_token == "<|im_end|>"


@pytest.mark.parametrize(("stage", "ends"), [("sft", (7,)), ("pt", ())])
def test_texts_end_with_the_eos_token_that_is_there(tmp_path, stage, ends):
    config = parse({"stage": stage, "model": {"path": "m"}, "data": {"train": [{"name": "a", "path": "a.jsonl"}]}})
    prepared = SimpleNamespace(train_rows=None, eval_rows={}, end_tokens=(7,))
    run = RunDirectory.of(StoragePath.of(tmp_path))
    files = ModelFiles("m", None, None)
    context = SimpleNamespace(
        config=config, files=files, directory=run, prepared=prepared, identity={}, generation=None
    )
    assert train_job(context).ends == ends  # type: ignore[arg-type]
