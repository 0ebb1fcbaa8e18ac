"""``raysft generate`` with any model, adapter or quantized checkpoint, over any source, through the command line."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from raysft.cli import main
from raysft.errors import RequestError
from raysft.storage.json_files import read_jsonl
from tests import samples
from tests.tiny import other_model, tiny_folder, tiny_model, with_code

pytestmark = pytest.mark.usefixtures("local_ray")

CONFIG = """
run: {{storage: {folder}/runs}}
model: {{path: {folder}/base, finetuning: lora, lora: {{rank: 4}}}}
data:
  train: [{{name: chat, path: {folder}/chat.jsonl}}, {{name: more, path: {folder}/more.jsonl}}]
  eval: [{{name: quiz, path: {folder}/quiz.jsonl}}]
  sequence_length: 128
train: {{max_steps: 2, global_batch_size: 4, learning_rate: 1.0e-2, zero_stage: 0}}
scaling: {{threads_per_worker: 1}}
generate: {{max_new_tokens: 8, do_sample: false, batch_size: 4}}
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("any")
    return tiny_folder(folder, CONFIG.format(folder=folder), spread=0.2, chat=7, more=5, quiz=4)


@pytest.fixture(scope="module")
def other(folder) -> Path:
    return other_model(folder / "other")


@pytest.fixture(scope="module")
def adapter(folder) -> Path:
    """An adapter without a tokenizer."""
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(1)
    base = AutoModelForCausalLM.from_pretrained(folder / "base")
    settings = LoraConfig(r=4, target_modules=["q_proj", "down_proj"], init_lora_weights=False)
    get_peft_model(base, settings).save_pretrained(folder / "adapter")
    return folder / "adapter"


def generate(folder: Path, name: str, *arguments: str) -> list[dict]:
    assert main(["generate", str(folder / "c.yaml"), f"run.name={name}", *arguments]) == 0
    return list(read_jsonl(folder / "runs" / name / "generated_predictions.jsonl"))


def refused(folder: Path, capsys, *arguments: str, verb: str = "generate") -> str:
    capsys.readouterr()
    assert main([verb, str(folder / "c.yaml"), "run.name=refused", *arguments]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert not (folder / "runs" / "refused").exists()
    return error


def expected(model, tokenizer, file: Path) -> list[tuple[str, str]]:
    """Prompts and what ``model.generate`` writes after each of them alone."""
    found = []
    for line in file.read_text().splitlines():
        prompt = tokenizer.apply_chat_template(
            json.loads(line)["messages"][:1], tokenize=False, add_generation_prompt=True
        )
        ids = tokenizer(prompt, return_tensors="pt", add_special_tokens=False)["input_ids"]
        with torch.inference_mode():
            out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=8, do_sample=False)
        found.append((prompt, tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True)))
    return found


def predicted(rows: list[dict]) -> list[tuple[str, str]]:
    return [(row["prompt"], row["predict"]) for row in rows]


def test_a_model_is_asked_with_its_own_tokenizer_and_template(folder, other, capsys):
    rows = generate(folder, "other", f"generate.model={other}", "model.chat_template=alpaca")
    model, tokenizer = AutoModelForCausalLM.from_pretrained(other), AutoTokenizer.from_pretrained(other)
    assert predicted(rows) == expected(model, tokenizer, folder / "quiz.jsonl")
    assert rows[0]["prompt"].startswith("user:\n")
    run = folder / "runs" / "other"
    ids = pq.read_table(run / "prompts.parquet")["input_ids"].to_pylist()
    assert ids == [tokenizer(row["prompt"], add_special_tokens=False)["input_ids"] for row in rows]
    results = json.loads((run / "predict_results.json").read_text())
    assert results["predict_examples"] == 4
    assert "predict_rouge-1" in results
    page = (run / "report.html").read_text()
    for shown in ("nothing was trained", ">Scores</a>", 'quiz <span class="soft">for generation', "generation time"):
        assert shown in page
    for absent in ("for training", ">before<", ">after<", "Before and after"):
        assert absent not in page
    assert not (run / "README.md").exists()
    assert not (run / "generated_predictions_base.jsonl").exists()
    assert f"other: predictions of {str(other)[:20]}" in capsys.readouterr().out


def test_a_conversation_longer_than_a_row_is_asked_all_the_same(folder, other):
    rows = generate(folder, "long", f"generate.model={other}", "data.sequence_length=16")
    assert predicted(rows) == predicted(generate(folder, "other", f"generate.model={other}"))


def test_a_template_of_the_config_serves_a_model_that_has_none(folder):
    bare = folder / "bare"
    shutil.copytree(folder / "base", bare)
    (bare / "chat_template.jinja").unlink()
    rows = generate(folder, "bare", f"generate.model={bare}", "model.chat_template=alpaca")
    assert "### " in rows[0]["prompt"]


def test_an_adapter_without_a_tokenizer_has_that_of_its_base(folder, adapter):
    from peft import PeftModel

    rows = generate(folder, "adapted", f"generate.model={adapter}")
    base = AutoModelForCausalLM.from_pretrained(folder / "base")
    tokenizer = AutoTokenizer.from_pretrained(folder / "base")
    plain = expected(base, tokenizer, folder / "quiz.jsonl")
    assert predicted(rows) == expected(PeftModel.from_pretrained(base, adapter), tokenizer, folder / "quiz.jsonl")
    assert predicted(rows) != plain


@pytest.mark.parametrize("bits", ["4bit", "8bit"])
def test_an_adapter_on_a_quantized_base_is_not_merged_into_it(folder, adapter, bits):
    from peft import PeftModel
    from transformers import BitsAndBytesConfig

    rows = generate(folder, f"adapted-{bits}", f"generate.model={adapter}", f"model.quantization={bits}")
    settings = (
        BitsAndBytesConfig(load_in_8bit=True)
        if bits == "8bit"
        else BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=torch.float32,
        )
    )
    base = AutoModelForCausalLM.from_pretrained(
        folder / "base", dtype=torch.float32, quantization_config=settings, device_map={"": "cpu"}
    )
    for module in base.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
    whole = PeftModel.from_pretrained(base, adapter).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder / "base")
    assert predicted(rows) == expected(whole, tokenizer, folder / "quiz.jsonl")
    assert predicted(rows) != predicted(generate(folder, "adapted", f"generate.model={adapter}"))
    arguments = [f"generate.model={adapter}", f"model.quantization={bits}", "generate.batching=continuous"]
    assert predicted(generate(folder, f"continuous-{bits}", *arguments)) == predicted(rows)


def test_a_checkpoint_that_is_quantized_already_is_loaded_as_it_is(folder, capsys):
    from transformers import BitsAndBytesConfig

    settings = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    model = AutoModelForCausalLM.from_pretrained(
        folder / "base", dtype=torch.float32, quantization_config=settings, device_map={"": "cpu"}
    )
    small = folder / "small"
    model.save_pretrained(small)
    AutoTokenizer.from_pretrained(folder / "base").save_pretrained(small)
    assert (small / "model.safetensors").stat().st_size < (folder / "base" / "model.safetensors").stat().st_size
    rows = generate(folder, "small", f"generate.model={small}")
    of_config = generate(
        folder, "fresh", f"generate.model={folder}/base", "model.quantization=4bit", "model.double_quantization=false"
    )
    assert predicted(rows) == predicted(of_config)
    told = refused(folder, capsys, f"generate.model={small}", "model.quantization=4bit")
    assert "is already quantized (bitsandbytes), but model.quantization=4bit; remove the key" in told
    described = json.loads((small / "config.json").read_text())
    described["quantization_config"] = {"quant_method": "gptq", "bits": 4}
    (small / "config.json").write_text(json.dumps(described))
    told = refused(folder, capsys, f"generate.model={small}")
    assert "is quantized with gptq, which needs the packages optimum and gptqmodel" in told


def test_any_source_is_generated_for(folder, other):
    rows = generate(folder, "sources", f"generate.model={other}", "generate.sources=[more, quiz]")
    assert [row["source"] for row in rows] == ["more"] * 5 + ["quiz"] * 4
    held = generate(folder, "held", f"generate.model={other}", "generate.sources=[chat]", "data.holdout=0.4")
    assert 0 < len(held) < 7


def test_a_trained_run_generates_for_a_training_source(folder, capsys):
    settings = ["model.quantization=4bit", "generate.compare_base=false"]
    assert main(["run", str(folder / "c.yaml"), "run.name=trained", *settings]) == 0
    run = folder / "runs" / "trained"
    before = predicted(list(read_jsonl(run / "generated_predictions.jsonl")))
    assert len(before) == 4
    rows = generate(folder, "trained", *settings, "generate.sources=[more]")
    assert [row["source"] for row in rows] == ["more"] * 5
    again = generate(folder, "again", "model.quantization=4bit", f"generate.model={run}/model")
    assert predicted(again) == before, "the base is quantized in both"
    capsys.readouterr()
    arguments = ["generate", str(folder / "c.yaml"), "run.name=trained", f"generate.model={folder}/base"]
    assert main(arguments) == 2
    assert "belongs to a training run, but generate.model=" in capsys.readouterr().err


def test_a_model_of_the_hub_is_taken_from_its_cache(folder, other, monkeypatch):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(folder / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    there, commit = folder / "hub" / "models--some--model", "0" * 40
    shutil.copytree(other, there / "snapshots" / commit)
    (there / "refs").mkdir()
    (there / "refs" / "main").write_text(commit)
    from raysft.storage.local_cache import model_copy

    assert model_copy("some/model") == there / "snapshots" / commit
    with pytest.raises(RequestError, match="some/none: is not a local folder, and HF_HUB_OFFLINE is set"):
        model_copy("some/none")


def test_what_cannot_be_is_refused_before_anything_starts(folder, other, adapter, tmp_path, capsys):
    told = refused(folder, capsys)
    assert "contains no trained model; train first (raysft train CONFIG), or set generate.model to any model" in told
    assert "did you mean 'quiz'?" in refused(folder, capsys, f"generate.model={other}", "generate.sources=[quitz]")
    told = refused(folder, capsys, f"generate.model={other}", verb="run")
    assert f"but generate.model={other}; remove generate.model, or use raysft generate" in told
    assert "did you mean 'quiz'?" in refused(
        folder, capsys, f"generate.model={other}", "generate.sources=[quitz]", verb="check"
    )
    assert "folder not found" in refused(folder, capsys, f"generate.model={tmp_path}/none")
    assert "contains no config.json" not in refused(folder, capsys, f"generate.model={tmp_path}")
    for file, part in (("adapter_model.safetensors", adapter), ("model.safetensors", other)):
        torn = tmp_path / part.name
        shutil.copytree(part, torn)
        (torn / file).unlink()
        assert "contains no weights" in refused(folder, capsys, f"generate.model={torn}")
    told = refused(folder, capsys, f"generate.model={other}/model.safetensors")
    assert "is a file, not a model folder" in told
    torn = tmp_path / "torn"
    shutil.copytree(other, torn)
    weights = (torn / "model.safetensors").read_bytes()
    (torn / "model.safetensors").write_bytes(weights[:-1])
    assert "model.safetensors is damaged (" in refused(folder, capsys, f"generate.model={torn}")
    (torn / "model.safetensors").write_bytes(weights)
    told = refused(folder, capsys, f"generate.model={torn}", "generate.stop_tokens=['<|im_ende|>']")
    assert "the tokenizer has no token '<|im_ende|>'; did you mean '<|im_end|>'?" in told
    (torn / "tokenizer.json").write_text("{")
    for more in ([], ["generate.stop_tokens=['<|im_end|>']"]):
        assert "its tokenizer cannot be loaded (" in refused(folder, capsys, f"generate.model={torn}", *more)
    for file in torn.glob("*token*"):
        file.unlink()
    assert "tokenizer" in refused(folder, capsys, f"generate.model={torn}")
    (torn / "config.json").write_text('{"model_type": "t5"}')
    assert "model_type=t5 is an encoder-decoder" in refused(folder, capsys, f"generate.model={torn}")
    shutil.copytree(adapter, tmp_path / "words")
    (tmp_path / "words" / "adapter_config.json").write_text("[]")
    told = refused(folder, capsys, f"generate.model={tmp_path}/words")
    assert "adapter_config.json: is not an adapter's configuration" in told
    lost = tmp_path / "lost"
    shutil.copytree(adapter, lost)
    described = json.loads((lost / "adapter_config.json").read_text())
    described["base_model_name_or_path"] = str(tmp_path / "gone")
    (lost / "adapter_config.json").write_text(json.dumps(described))
    assert "gone' is not a folder here; put the base model there" in refused(folder, capsys, f"generate.model={lost}")
    for made in ("expanded", "extended", "merged"):  # as with model.new_layers, model.new_tokens, model.adapters
        described["base_model_name_or_path"] = str(tmp_path / f"{made}-0123456789abcdef")
        (lost / "adapter_config.json").write_text(json.dumps(described))
        told = refused(folder, capsys, f"evaluate.model={lost}", verb="evaluate")
        assert (
            "was created in the cache by the run that trained the adapter, and no longer exists; run raysft check"
            in told
        )


def test_a_tokenizer_with_tokens_that_its_model_does_not_know_is_refused(folder, tmp_path, capsys):
    wrong = tmp_path / "wrong"
    shutil.copytree(folder / "base", wrong)
    model = AutoModelForCausalLM.from_pretrained(wrong)
    model.resize_token_embeddings(120)
    model.save_pretrained(wrong)
    assert main(["generate", str(folder / "c.yaml"), "run.name=wrong", f"generate.model={wrong}"]) == 2
    told = capsys.readouterr().err
    assert f"generate.model={wrong}: its tokenizer has 400 tokens, but the model embeddings for 120; prompt " in told
    (wrong / "config.json").write_text(json.dumps({**model.config.to_dict(), "vocab_size": 130}))
    told = refused(folder, capsys, f"generate.model={wrong}")
    assert "config.json has vocab_size=130, but its weights hold 120 embeddings" in told


def test_code_runs_only_where_this_model_is_named(folder, tmp_path, capsys):
    own = with_code(tiny_model(tmp_path / "own"), tmp_path / "ran")
    trusts_base = f"model.trust_remote_code=[{folder}/base]"
    told = refused(folder, capsys, f"generate.model={own}", trusts_base)
    assert f"generate.model={own} needs its own code" in told
    assert not (tmp_path / "ran").exists()
    assert len(generate(folder, "own", f"generate.model={own}", f"model.trust_remote_code=[{own}]")) == 4
    assert (tmp_path / "ran").exists()


ROLES = {"human": "user", "gpt": "assistant", "function_call": "assistant", "observation": "tool"}


def asked(record: dict) -> tuple[list[dict], list[dict]]:
    """What stands before the last assistant turn of a conversation in ShareGPT's form, and its functions."""
    turns = record["conversations"]
    last = max(index for index, turn in enumerate(turns) if ROLES[turn["from"]] == "assistant")
    messages = []
    for turn in turns[:last]:
        message = {"role": ROLES[turn["from"]], "content": turn["value"]}
        if turn["from"] == "function_call":
            message |= {"content": "", "tool_calls": [{"type": "function", "function": json.loads(turn["value"])}]}
        messages.append(message)
    tools = [{"type": "function", "function": each} for each in json.loads(record["tools"] or "[]")]
    return messages, tools


@pytest.mark.parametrize(
    "file", samples.files("calls.json", more=("glaive_toolcall_en_demo.json",)), ids=lambda f: f.name
)
def test_conversations_with_functions_are_asked_up_to_their_last_answer(folder, tokenizer_with, file, capsys):
    from transformers import LlamaConfig, LlamaForCausalLM

    ours = file.parent == samples.HERE
    from_folder = tokenizer_with(chat_template=samples.TOOLS_TEMPLATE) if ours else samples.tokenizers()[0]
    tokenizer = AutoTokenizer.from_pretrained(from_folder)
    wide = folder / f"wide-{file.stem}"
    LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer), hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1,
            max_position_embeddings=600, tie_word_embeddings=True,
        )
    ).save_pretrained(wide)  # fmt: skip
    tokenizer.save_pretrained(wide)
    sources = json.dumps([{"name": "calls", "path": str(file)}])
    arguments = [f"generate.model={wide}", f"data.eval={sources}", "generate.sources=[calls]"]
    rows = generate(folder, file.stem, *arguments, "generate.max_new_tokens=2", "generate.batch_size=16")
    records = json.loads(file.read_text())
    assert len(rows) == len(records)
    table = pq.read_table(folder / "runs" / file.stem / "prompts.parquet")
    several = with_tools = cut = 0
    for record, row, ids in zip(records, rows, table["input_ids"].to_pylist(), strict=True):
        messages, tools = asked(record)
        given = {"tools": tools or None, "add_generation_prompt": True}
        assert row["prompt"] == tokenizer.apply_chat_template(messages, tokenize=False, **given)
        assert ids == tokenizer.apply_chat_template(messages, tokenize=True, return_dict=False, **given)
        several, with_tools = several + (len(messages) > 2), with_tools + bool(tools)
        cut += len(ids) > 598
    assert min(several, with_tools) > (2 if ours else 100)
    assert (1 if ours else 10) <= cut < len(rows)
    assert (
        f"generated_predictions: {cut} of {len(rows)} prompts were truncated at the beginning"
        in capsys.readouterr().err
    )


@pytest.mark.parametrize("trained", [False, True])
def test_prompts_without_answers_are_generated_for_and_not_scored(folder, other, capsys, trained):
    """Also after a training, whose evaluation has nothing to do on them."""
    lines = (folder / "quiz.jsonl").read_text().splitlines()
    records = [json.loads(lines[0]), *({"messages": json.loads(line)["messages"][:1]} for line in lines[1:])]
    alone = records[1:] if trained else records
    (folder / "asked.jsonl").write_text("".join(json.dumps(record) + "\n" for record in alone))
    name, asked = f"asked-{trained}", [f"data.eval=[{{name: asked, path: {folder}/asked.jsonl}}]"]
    if trained:
        assert main(["run", str(folder / "c.yaml"), f"run.name={name}", "generate.compare_base=false", *asked]) == 0
        rows = list(read_jsonl(folder / "runs" / name / "generated_predictions.jsonl"))
    else:
        rows = generate(folder, name, f"generate.model={other}", *asked)
        model, tokenizer = AutoModelForCausalLM.from_pretrained(other), AutoTokenizer.from_pretrained(other)
        assert predicted(rows) == expected(model, tokenizer, folder / "quiz.jsonl")
    assert [bool(row["label"]) for row in rows] == [not trained, *[False] * 3][-len(rows) :]
    results = json.loads((folder / "runs" / name / "predict_results.json").read_text())
    assert (results["predict_examples"], results["predict_unscored"]) == (len(rows) - 3, 3)
    told = f"generated_predictions: 3 of {len(rows)} predictions are not scored, because their records have no answer"
    out, err = capsys.readouterr()
    assert told + ("; there are no metrics\n" if trained else "\n") in err
    assert ("none of the 3 prompts has an answer" in out) == trained
