"""Training and generation with images through the command line: every model of a run predicts with them."""

import json
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForImageTextToText

from raysft.cli import main
from raysft.models.processor import load_processor
from raysft.storage.json_files import read_jsonl
from tests import vision_prompts
from tests.tiny_vision import tiny_vision_model

pytestmark = pytest.mark.usefixtures("local_ray")
CONFIG = """
run: {{storage: {folder}/runs, seed: 1, name: trained}}
model: {{path: {folder}/base, dtype: float32, lora: {{rank: 4}}}}
data:
  train: [{{name: chat, path: {folder}/chat.jsonl}}]
  eval: [{{name: ask, path: {folder}/ask.jsonl}}]
  sequence_length: 256
train: {{max_steps: 2, global_batch_size: 2, learning_rate: 1.0e-2, schedule: constant, warmup_steps: 0, save_every_minutes: null}}
scaling: {{cpus_per_worker: 0.5, threads_per_worker: 1}}
generate: {{every_steps: 1, max_new_tokens: 8, do_sample: false, batch_size: 2, metrics: [exact_match]}}
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("vision")
    tiny_vision_model(folder / "base", "qwen2.5-vl")
    pictures = vision_prompts.draw(folder)
    spare = folder / "spare.png"
    spare.write_bytes(next(iter(pictures.values())).read_bytes())

    def record(parts: list[str], answer: str) -> dict:
        content = [
            {"type": "image", "image": f"{part[1:-1]}.png"} if part.startswith("<") else {"type": "text", "text": part}
            for part in parts
        ]
        return {"messages": [{"role": "user", "content": content}, {"role": "assistant", "content": answer}]}

    asked = [json.dumps(record(parts, "It is a picture.")) for parts in vision_prompts.ASKED]
    (folder / "ask.jsonl").write_text("\n".join(asked))
    (folder / "chat.jsonl").write_text(
        "\n".join(json.dumps(record([f"<{name}>"], f"It is {name}.")) for name in [*pictures, "spare"])
    )
    (folder / "sft.yaml").write_text(CONFIG.format(folder=folder))
    return folder


def written(folder: Path, model) -> list[str]:
    """What ``model.generate`` writes for each question alone."""
    processor = load_processor(folder / "base")
    pictures = {name: folder / f"{name}.png" for name in vision_prompts.SIZES}
    texts = []
    for parts in vision_prompts.ASKED:
        batch = processor.apply_chat_template(
            vision_prompts.conversation(pictures, parts),
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
        )
        with torch.inference_mode():
            found = model.eval().generate(**batch, max_new_tokens=8, do_sample=False)
        texts.append(processor.tokenizer.decode(found[0, batch["input_ids"].shape[1] :], skip_special_tokens=True))
    return texts


def predictions(path: Path) -> list[str]:
    return [row["predict"] for row in read_jsonl(path)]


def test_every_model_of_a_run_predicts_with_images(folder, capsys):
    assert main(["run", str(folder / "sft.yaml")]) == 0
    assert f"images     {folder}/wide.png" in capsys.readouterr().out
    run = folder / "runs" / "trained"
    base = AutoModelForImageTextToText.from_pretrained(folder / "base", dtype=torch.float32)
    untrained = written(folder, base)
    assert predictions(run / "generated_predictions_base.jsonl") == untrained
    trained = written(folder, PeftModel.from_pretrained(base, run / "model"))
    assert trained != untrained
    assert predictions(run / "generated_predictions.jsonl") == trained
    assert predictions(run / "generation" / "2" / "generated_predictions.jsonl") == trained
    assert predictions(run / "generation" / "1" / "generated_predictions.jsonl") != trained
    assert (run / "report.html").read_text().count("<img src=") == 6
    other = ["run.name=other", f"generate.model={run / 'model'}", "generate.every_steps=null"]
    assert main(["generate", str(folder / "sft.yaml"), *other]) == 0
    assert predictions(folder / "runs" / "other" / "generated_predictions.jsonl") == trained


def test_a_run_that_is_trained_does_without_the_images_of_its_training(folder, capsys):
    config = str(folder / "sft.yaml")
    settings = ["run.name=short", "generate.every_steps=null", f"data.cache={folder}/cache"]
    assert main(["train", config, *settings]) == 0
    (folder / "spare.png").unlink()  # shown in no question
    for verb in ("evaluate", "generate", "run"):
        assert main([verb, config, *settings]) == 0, verb
    assert main(["train", config, *settings, "run.name=next"]) == 2
    assert f"{folder}/spare.png: no longer exists; restore it" in capsys.readouterr().err
