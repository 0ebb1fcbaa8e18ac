"""``raysft evaluate`` with any model, adapter or quantized checkpoint, through the command line."""

from __future__ import annotations

import json
import math
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig, GPT2Config, GPT2LMHeadModel

from raysft.cli import main
from raysft.errors import RunFailed
from raysft.storage.json_files import read_jsonl
from raysft.train import launch
from tests.tiny import other_model, tiny_folder

pytestmark = pytest.mark.usefixtures("local_ray")

CONFIG = """
run: {{storage: {folder}/runs}}
model: {{path: {folder}/base, finetuning: lora, lora: {{rank: 4}}}}
data:
  train: [{{name: chat, path: {folder}/chat.jsonl}}]
  eval: [{{name: quiz, path: {folder}/quiz.jsonl}}]
  sequence_length: 128
train: {{max_steps: 2, global_batch_size: 4, learning_rate: 1.0e-2, zero_stage: 0}}
scaling: {{threads_per_worker: 1}}
generate: {{max_new_tokens: 4, do_sample: false}}
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("evaluate")
    return tiny_folder(folder, CONFIG.format(folder=folder), spread=0.2, chat=9, quiz=6)


@pytest.fixture(scope="module")
def other(folder) -> Path:
    return other_model(folder / "other")


def evaluate(folder: Path, name: str, *arguments: str) -> dict[str, Any]:
    assert main(["evaluate", str(folder / "c.yaml"), f"run.name={name}", *arguments]) == 0
    return json.loads((folder / "runs" / name / "eval_results.json").read_text())


def numbers(results: dict[str, Any]) -> dict[str, Any]:
    """Results without the time that they took."""
    return {name: value for name, value in results.items()
            if name.startswith("eval_") and not name.endswith(("runtime", "per_second"))}  # fmt: skip


def refused(folder: Path, capsys, *arguments: str) -> str:
    capsys.readouterr()
    assert main(["evaluate", str(folder / "c.yaml"), "run.name=refused", *arguments]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert not (folder / "runs" / "refused").exists()
    return error


def losses(model: Any, tokenizer: Any, file: Path) -> tuple[float, float, int]:
    """Mean loss, accuracy and number of the tokens of all answers, by transformers, one conversation after the other."""
    for module in model.eval().modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False  # that layout computes in bfloat16
    total, right, count = 0.0, 0, 0
    for line in file.read_text().splitlines():
        messages = json.loads(line)["messages"]
        asked = tokenizer.apply_chat_template(messages[:1], tokenize=False, add_generation_prompt=True)
        text = tokenizer.apply_chat_template(messages, tokenize=False)
        end = len(asked) + len(messages[1]["content"] + "<|im_end|>")
        encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        ids = torch.tensor([encoded["input_ids"]])
        labelled = [len(asked) <= start and stop <= end for start, stop in encoded["offset_mapping"]]
        labels = torch.where(torch.tensor([labelled]), ids, -100)
        with torch.no_grad():
            out = model(input_ids=ids, labels=labels)
        tokens = sum(labelled)
        total += out.loss.double().item() * tokens
        right += int((out.logits[0, :-1].argmax(-1) == labels[0, 1:]).sum())
        count += tokens
    return total / count, right / count, count


def assert_results(results: dict[str, Any], expected: tuple[float, float, int], tolerance: float = 1e-5) -> None:
    loss, accuracy, tokens = expected
    assert results["eval_loss"] == pytest.approx(loss, rel=tolerance)
    assert results["eval_perplexity"] == pytest.approx(math.exp(loss), rel=10 * tolerance)
    assert (results["eval_accuracy"], results["eval_tokens"]) == (pytest.approx(accuracy), tokens)


def test_a_model_is_evaluated_with_its_own_tokenizer_and_template(folder, other, capsys):
    results = evaluate(folder, "template", f"evaluate.model={other}", "model.chat_template=alpaca")
    model, tokenizer = AutoModelForCausalLM.from_pretrained(other), AutoTokenizer.from_pretrained(other)
    assert_results(results, losses(model, tokenizer, folder / "quiz.jsonl"))
    run = folder / "runs" / "template"
    assert json.loads((run / "all_results.json").read_text()) == results
    out = capsys.readouterr().out
    assert "its own chat template is used; model.chat_template=alpaca is for models that have none" in out
    assert f"eval loss {results['eval_loss']:.4f} | perplexity" in out
    assert "memory: about" in out
    assert f"template: evaluation of {other}" in out
    page = (run / "report.html").read_text()
    assert "evaluation, nothing was trained" in page
    assert f"{results['eval_loss']:.4f}" in page
    shown = re.sub(r"<[^>]*>|\s+", " ", page)
    assert re.search(rf"data type +float32 .* ZeRO stage +0 +loss tokens +{results['eval_tokens']}", shown)
    assert not [name for name in ("model", "checkpoints", "README.md", "trainer_log.jsonl") if (run / name).exists()]
    assert yaml.safe_load((run / "config.yaml").read_text())["evaluate"] == {"model": str(other)}
    assert main(["status", str(run)]) == 0
    assert "state: done" in capsys.readouterr().out


@pytest.mark.parametrize("settings", [[], ["train.zero_stage=3", "scaling.sequence_parallel=2"]])
def test_two_workers_give_the_same_numbers(folder, other, settings):
    alone = evaluate(folder, "other", f"evaluate.model={other}")
    workers = ["scaling.num_workers=2", "scaling.cpus_per_worker=0.5", "train.micro_batch_size=1"]
    results = evaluate(folder, f"two-{len(settings)}", f"evaluate.model={other}", *workers, *settings)
    near = {"eval_loss": pytest.approx(alone["eval_loss"], rel=1e-6),
            "eval_perplexity": pytest.approx(alone["eval_perplexity"], rel=1e-5)}  # fmt: skip
    assert numbers(results) == numbers(alone) | near


@pytest.mark.parametrize("bits", ["4bit", "8bit"])
def test_a_quantized_model_has_the_loss_of_transformers(folder, other, bits):
    """Also of a checkpoint that is quantized already, which is loaded as it is, and may hold packed weights as bfloat16."""
    four = {"bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True, "bnb_4bit_compute_dtype": torch.float32,
            "bnb_4bit_quant_storage": torch.bfloat16}  # fmt: skip
    settings = (
        BitsAndBytesConfig(load_in_8bit=True) if bits == "8bit" else BitsAndBytesConfig(load_in_4bit=True, **four)
    )
    model = AutoModelForCausalLM.from_pretrained(
        other, dtype=torch.float32, quantization_config=settings, device_map={"": "cpu"}
    )
    tokenizer = AutoTokenizer.from_pretrained(other)
    small = folder / f"small-{bits}"
    model.save_pretrained(small)
    tokenizer.save_pretrained(small)
    loss, accuracy, tokens = losses(model, tokenizer, folder / "quiz.jsonl")
    on_the_way = [f"evaluate.model={other}", f"model.quantization={bits}", "model.finetuning=full"]
    # LLM.int8 rounds a token depending on those beside it.
    alone = ["data.packing=false", "train.micro_batch_size=1"] if bits == "8bit" else []
    for name, arguments in (("way", on_the_way), ("already", [f"evaluate.model={small}"])):
        results = evaluate(folder, f"{bits}-{name}", *arguments, *alone)
        assert_results(results, (loss, accuracy, tokens), 1e-5 if bits == "4bit" else 1e-4)
    if bits == "4bit":
        assert loss != pytest.approx(evaluate(folder, "other", f"evaluate.model={other}")["eval_loss"], rel=1e-3)


def test_an_adapter_without_a_tokenizer_has_the_loss_of_peft(folder):
    from peft import LoraConfig, PeftModel, get_peft_model

    torch.manual_seed(1)
    base = AutoModelForCausalLM.from_pretrained(folder / "base")
    lora = LoraConfig(r=4, target_modules=["q_proj", "down_proj"], init_lora_weights=False)
    get_peft_model(base, lora).save_pretrained(folder / "adapter")
    results = evaluate(folder, "adapter", f"evaluate.model={folder}/adapter")
    base, tokenizer = (
        AutoModelForCausalLM.from_pretrained(folder / "base"),
        AutoTokenizer.from_pretrained(folder / "base"),
    )
    plain = losses(base, tokenizer, folder / "quiz.jsonl")
    assert_results(
        results, losses(PeftModel.from_pretrained(base, folder / "adapter"), tokenizer, folder / "quiz.jsonl")
    )
    assert results["eval_loss"] != pytest.approx(plain[0], rel=1e-3)


@pytest.fixture(scope="module")
def run(folder) -> Path:
    assert main(["train", str(folder / "c.yaml"), "run.name=trained", "data.holdout=0.4"]) == 0
    return folder / "runs" / "trained"


def test_before_and_after_a_training_a_model_has_the_numbers_of_the_training(folder, run, capsys):
    held = "data.holdout=0.4"
    first = next(record for record in read_jsonl(run / "trainer_log.jsonl") if record["current_steps"] == 0)
    before = evaluate(folder, "before", f"evaluate.model={folder}/base", held)
    assert numbers(before) == numbers(first)
    assert {"eval_chat_loss", "eval_quiz_loss"} < before.keys(), "the held-out part is a set, too"
    after = json.loads((run / "eval_results.json").read_text())
    assert numbers(evaluate(folder, "after", f"evaluate.model={run}/model", held)) == numbers(after) != numbers(before)
    files = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    capsys.readouterr()
    arguments = ["evaluate", str(folder / "c.yaml"), "run.name=trained", f"evaluate.model={folder}/base"]
    assert main(arguments) == 2
    assert "belongs to a training run, but evaluate.model=" in capsys.readouterr().err
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == files


def test_raw_text_is_evaluated_too(folder, other):
    texts = ["The sum of 12 and 30 is 42. " * 3, "The capital of France is Paris."]
    (folder / "texts.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    source = f"[{{name: texts, path: {folder}/texts.jsonl}}]"
    asked = [f"evaluate.model={other}", "stage=pt", f"data.train={source}", f"data.eval={source}"]
    results = evaluate(folder, "texts", *asked)
    model, tokenizer = AutoModelForCausalLM.from_pretrained(other), AutoTokenizer.from_pretrained(other)
    total, tokens = 0.0, 0
    for text in texts:
        ids = torch.tensor([[*tokenizer(text, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]])
        with torch.no_grad():
            total += model(input_ids=ids, labels=ids).loss.double().item() * (ids.shape[1] - 1)
        tokens += ids.shape[1] - 1
    assert (results["eval_loss"], results["eval_tokens"]) == (pytest.approx(total / tokens, rel=1e-5), tokens)


def test_predictions_and_evaluation_of_a_model_share_a_directory(folder, other, capsys):
    results = evaluate(folder, "both", f"evaluate.model={other}")
    arguments = ["generate", str(folder / "c.yaml"), "run.name=both"]
    assert main([*arguments, f"generate.model={other}"]) == 0
    assert f"both: evaluation and predictions of {other}" in capsys.readouterr().out
    run = folder / "runs" / "both"
    assert json.loads((run / "all_results.json").read_text()).items() >= results.items()
    assert json.loads((run / "plan.json").read_text()).keys() >= {"evaluation", "generation"}
    assert main([*arguments, f"generate.model={folder}/base"]) == 2
    assert (
        f"has results of generate.model={other}, but generate.model={folder}/base is a different model"
        in capsys.readouterr().err
    )


def test_results_stay_until_there_are_new_ones(folder, other, capsys, monkeypatch):
    """Those of another model or of other settings stay for good; they would be lost without a word."""
    quiz = folder / "again.jsonl"
    quiz.write_text((folder / "quiz.jsonl").read_text() + '{"messages": []}\n')
    asked = [f"data.eval=[{{name: quiz, path: {quiz}}}]", "data.max_rejected=0.5"]
    before = evaluate(folder, "again", f"evaluate.model={other}", *asked)
    run = folder / "runs" / "again"

    def files() -> dict[str, bytes]:
        return {path.name: path.read_bytes() for path in run.iterdir()}

    kept = files()
    assert len(list(read_jsonl(run / "rejected.jsonl"))) == 1
    command = ["evaluate", str(folder / "c.yaml"), "run.name=again", *asked]
    capsys.readouterr()
    assert main([*command, f"evaluate.model={folder}/base"]) == 2
    assert f"has results of evaluate.model={other}, but evaluate.model={folder}/base is" in capsys.readouterr().err
    assert main([*command, f"evaluate.model={other}", "data.keep_prompt=tail"]) == 2
    told = capsys.readouterr().err
    assert "with other settings: data.keep_prompt='tail' (the run has 'head'); restore the old value, or choose" in told
    assert files() == kept
    quiz.write_text("\n".join(quiz.read_text().splitlines()[:3]) + "\n")  # the file has others now
    with monkeypatch.context() as patch:
        patch.setattr(launch, "evaluate", failing)
        assert main([*command, f"evaluate.model={other}"]) == 1
    assert files() == kept
    after = evaluate(folder, "again", f"evaluate.model={other}", *asked, "train.learning_rate=0.5", "model.lora.rank=2")
    assert after["eval_tokens"] < before["eval_tokens"]
    assert not list(read_jsonl(run / "rejected.jsonl"))


def failing(*_: Any) -> None:
    raise RunFailed("a worker died")


def test_rejected_records_of_predictions_stay_beside_an_evaluation(folder, other):
    (folder / "more.jsonl").write_text((folder / "quiz.jsonl").read_text() + '{"messages": []}\n')
    sources = [f"data.train=[{{name: more, path: {folder}/more.jsonl}}]", "data.max_rejected=0.5"]
    command = ["generate", str(folder / "c.yaml"), "run.name=beside", f"generate.model={other}", *sources]
    assert main([*command, "generate.sources=[more]"]) == 0
    rejected = list(read_jsonl(folder / "runs" / "beside" / "rejected.jsonl"))
    evaluate(folder, "beside", f"evaluate.model={other}")
    assert rejected == list(read_jsonl(folder / "runs" / "beside" / "rejected.jsonl")) != []


@pytest.mark.parametrize(
    "settings", [[], ["train.zero_stage=3", "scaling.num_workers=2", "scaling.cpus_per_worker=0.5"]]
)
def test_an_adapter_with_whole_modules_has_the_loss_of_peft(folder, settings):
    """Also where they are divided among workers as they are loaded."""
    from peft import LoraConfig, PeftModel, get_peft_model

    torch.manual_seed(2)
    whole = folder / "whole"
    lora = LoraConfig(
        r=4, target_modules=["q_proj"], modules_to_save=["embed_tokens", "lm_head", "norm"], init_lora_weights=False
    )
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(folder / "base"), lora)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "modules_to_save" in name:
                weight.add_(0.1 * torch.randn_like(weight))
    model.save_pretrained(whole)
    results = evaluate(folder, f"whole-{len(settings)}", f"evaluate.model={whole}", *settings)
    base = AutoModelForCausalLM.from_pretrained(folder / "base")
    tokenizer = AutoTokenizer.from_pretrained(folder / "base")
    assert_results(results, losses(PeftModel.from_pretrained(base, whole), tokenizer, folder / "quiz.jsonl"))


def test_records_without_an_answer_are_counted_and_have_no_loss(folder, other, capsys):
    lines = (folder / "quiz.jsonl").read_text().splitlines()
    prompts = [json.dumps({"messages": json.loads(line)["messages"][:1]}) for line in lines[:2]]
    (folder / "mixed.jsonl").write_text("\n".join([*lines, *prompts]) + "\n")
    (folder / "prompts.jsonl").write_text("\n".join(prompts) + "\n")
    mixed, alone = (f"{{name: {name}, path: {folder}/{name}.jsonl}}" for name in ("mixed", "prompts"))
    results = evaluate(folder, "mixed", f"evaluate.model={other}", f"data.eval=[{mixed}, {alone}]")
    assert results["eval_loss"] == pytest.approx(evaluate(folder, "other", f"evaluate.model={other}")["eval_loss"])
    out = capsys.readouterr().out
    assert "2 without an answer" in out
    assert "evaluation: prompts is skipped, because none of its examples has an answer" in out
    told = refused(folder, capsys, f"evaluate.model={other}", f"data.eval=[{alone}]")
    assert "no example of prompts has an answer to evaluate; name other sources in data.eval" in told


@pytest.mark.parametrize(
    ("description", "reason"),
    [
        (
            {"peft_type": "PREFIX_TUNING", "num_virtual_tokens": 4},
            "prepends its own states to each text (prefix_tuning)",
        ),
        (
            {"peft_type": "LORA", "alora_invocation_tokens": [5]},
            "takes effect only after its invocation tokens (aLoRA)",
        ),
    ],
)
def test_an_adapter_that_acts_on_places_of_one_text_is_refused(folder, tmp_path, capsys, description, reason):
    (tmp_path / "adapter_config.json").write_text(
        json.dumps({**description, "base_model_name_or_path": f"{folder}/base"})
    )
    save_file({"weight": torch.zeros(2)}, tmp_path / "adapter_model.safetensors")
    told = refused(folder, capsys, f"evaluate.model={tmp_path}")
    assert (
        f"evaluate.model={tmp_path}: {reason}, which does not work in rows with several examples; use another" in told
    )


def test_what_cannot_be_is_refused_before_anything_starts(folder, other, tmp_path, capsys):
    assert "or set evaluate.model to any model" in refused(folder, capsys)
    assert "folder not found; check the path" in refused(folder, capsys, f"evaluate.model={tmp_path}/none")
    assert "contains no adapter_config.json or config.json" in refused(folder, capsys, f"evaluate.model={tmp_path}")
    learned = tmp_path / "learned"
    shutil.copytree(other, learned)
    GPT2LMHeadModel(GPT2Config(n_embd=8, n_layer=1, n_head=1, n_positions=512, vocab_size=400)).save_pretrained(learned)
    told = refused(folder, capsys, f"evaluate.model={learned}", "data.sequence_length=1024")
    assert "data.sequence_length=1024, but the model has 512 positions" in told
    wrong = tmp_path / "wrong"
    shutil.copytree(other, wrong)
    described = json.loads((wrong / "config.json").read_text())
    small = AutoModelForCausalLM.from_pretrained(other)
    small.resize_token_embeddings(120, mean_resizing=False)
    small.save_pretrained(wrong)
    assert described["vocab_size"] > 120
    told = refused(folder, capsys, f"evaluate.model={wrong}")
    assert f"evaluate.model={wrong}: its tokenizer has" in told
    assert "but the model embeddings for 120" in told
    torn = tmp_path / "torn"
    shutil.copytree(other, torn)
    (torn / "model.safetensors").unlink()
    assert "contains no weights" in refused(folder, capsys, f"evaluate.model={torn}")
    (torn / "model.safetensors").write_bytes((other / "model.safetensors").read_bytes()[:-9])
    assert "model.safetensors is damaged (" in refused(folder, capsys, f"evaluate.model={torn}")
