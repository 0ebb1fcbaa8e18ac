"""Files of LLaMA-Factory, as they are: checked, trained, and predicted with."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from raysft.cli import main
from tests.llamafactory import EXAMPLES
from tests.tiny import tiny_model, write_chats

ON_GPU = ("qlora", "fp8")
"""Examples that need a GPU."""
OTHER_VERB = ("predict",)


@pytest.fixture(scope="module")
def folder(local_ray, tmp_path_factory) -> Path:
    """A folder as LLaMA-Factory is used in: a model, and data with its registry."""
    folder = tmp_path_factory.mktemp("factory")
    tiny_model(folder / "m")
    data = folder / "data"
    data.mkdir()
    write_chats(data / "chats.jsonl", 40)
    (data / "texts.json").write_text(
        json.dumps([{"text": f"The sum of {n} and 1 is {n + 1}. " * 8} for n in range(30)])
    )
    chats = {
        "file_name": "chats.jsonl", "formatting": "sharegpt", "columns": {"messages": "messages"},
        "tags": {"role_tag": "role", "content_tag": "content", "user_tag": "user", "assistant_tag": "assistant"},
    }  # fmt: skip
    texts = {"file_name": "texts.json", "columns": {"prompt": "text"}}
    registry = dict.fromkeys(("identity", "alpaca_en_demo", "a", "b"), chats) | {"c4": texts}
    (data / "dataset_info.json").write_text(json.dumps(registry))
    return folder


@pytest.fixture
def write(folder, monkeypatch):
    """Write a file of LLaMA-Factory into the folder, which is the working directory."""
    monkeypatch.chdir(folder)

    def write(name: str, keys: dict[str, Any]) -> str:
        keys = {**keys, "model_name_or_path": str(folder / "m"), "cutoff_len": 256, "use_cpu": True}
        (folder / name).write_text(yaml.safe_dump(keys, sort_keys=False))
        return name

    return write


@pytest.mark.parametrize("name", [name for name in EXAMPLES if name not in (*ON_GPU, *OTHER_VERB)])
def test_examples_pass_check(write, capsys, name):
    small = {"freeze_trainable_layers": 2} if name == "llama_pro" else {}  # the model has two
    path = write(f"{name}.yaml", {**EXAMPLES[name], **small, "ray_num_workers": 1})
    assert main(["check", path]) == 0, capsys.readouterr().err
    out = capsys.readouterr().out
    assert "steps" in out
    if name != "badam":
        # All checkpoints are kept: that of the end, the newest by time, and the one that displaces it.
        assert re.search("storage: [1-3] checkpoints of", out)


def test_a_file_trains_and_another_predicts_with_its_output(folder, write, capsys):
    keys = {
        "stage": "sft", "do_train": True, "dataset": "a", "finetuning_type": "lora", "lora_rank": 2, "bf16": False,
        "output_dir": "saves/m/lora/sft", "num_train_epochs": 1, "per_device_train_batch_size": 4, "max_samples": 10,
        "learning_rate": "1e-3", "val_size": 0.2, "eval_strategy": "epoch",
        "save_strategy": "no", "report_to": "none",
    }  # fmt: skip
    path = write("train.yaml", keys)
    assert main(["run", path]) == 0, capsys.readouterr().err
    run = folder / "saves/m/lora/sft"
    log = [json.loads(line) for line in (run / "trainer_log.jsonl").read_text().splitlines()]
    rates = [record["lr"] for record in log if "loss" in record]
    plan = json.loads((run / "plan.json").read_text())
    steps = -(-plan["examples"] // 4)
    assert rates == pytest.approx([1e-3 * (steps - step) / steps for step in range(steps)])
    assert not (run / "generated_predictions.jsonl").exists()
    predict = {
        "adapter_name_or_path": "saves/m/lora/sft", "do_predict": True, "predict_with_generate": True, "eval_dataset": "b",
        "max_samples": 3, "max_new_tokens": 4, "output_dir": "saves/m/lora/predict",
    }  # fmt: skip
    path = write("predict.yaml", predict)
    capsys.readouterr()
    assert main(["check", path]) == 0, capsys.readouterr().err
    planned = capsys.readouterr().out
    assert "generate: generate.model=saves/m/lora/sft/model with transformers, up to 4 tokens for a prompt" in planned
    assert "generation b: " in planned
    assert planned.endswith("saves/m/lora/predict, for raysft generate\n")
    assert not (folder / "saves/m/lora/predict").exists()
    assert main(["generate", path]) == 0, capsys.readouterr().err
    lines = (folder / "saves/m/lora/predict/generated_predictions.jsonl").read_text().splitlines()
    assert len(lines) == 3
    evaluate = {"do_eval": True, "eval_dataset": "b", "max_samples": 3, "output_dir": "saves/m/lora/eval"}
    assert main(["check", write("evaluate.yaml", evaluate)]) == 0, capsys.readouterr().err
    planned = capsys.readouterr().out
    assert f"evaluate: evaluate.model={folder / 'm'} on " in planned
    assert planned.endswith("saves/m/lora/eval, for raysft evaluate\n")
    assert main(["run", path]) == 2
    assert "use raysft generate" in capsys.readouterr().err.replace("or use", "use")
