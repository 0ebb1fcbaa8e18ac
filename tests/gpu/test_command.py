"""The command on a GPU: when it holds one, what it does without, and a run that is killed."""

import json
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch

from raysft.storage.json_files import read_jsonl
from tests.faults.runs import attempt, compared, prepare, said, steps_of
from tests.tiny import tiny_model, tiny_tokenizer

LARGE = {"hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30, "num_attention_heads": 9,
         "num_key_value_heads": 3, "vocab_size": 49152, "tie_word_embeddings": True}  # fmt: skip
"""Sizes of SmolLM2-135M."""
CONFIG = """
run: {{storage: {folder}/runs, seed: 1}}
model: {{path: {folder}/large, finetuning: lora}}
data:
  train: [{{name: chat, path: {folder}/chat.jsonl}}]
  holdout: 0.1
  sequence_length: 256
train: {{max_steps: 8, global_batch_size: 8, micro_batch_size: 4, learning_rate: 1.0e-3, eval_every_steps: 4, save_every_steps: 4}}
scaling: {{use_gpu: {use_gpu}, address: local}}
generate: {{max_examples: 64, max_new_tokens: 64, do_sample: false, metrics: [rouge, bleu]}}
"""
PARTS = {
    "data": "train chat:",
    "plan": "resources:",
    "worker": "model:",
    "first evaluation": "after step 0",
    "first step": "step 1/",
    "trained": "generating with",
    "generated": "large:",
    "end": "",
}
"""Part of a run → beginning of the line that it ends with."""
SECONDS = 300


@pytest.fixture(scope="module")
def folder(device, tmp_path_factory) -> Path:
    """Two models, conversations, and the configs of a run and of a campaign of faults."""
    from transformers import LlamaConfig, LlamaForCausalLM

    folder = tmp_path_factory.mktemp("command")
    prepare(folder, large=True)
    sizes = LARGE if device == "cuda" else {**LARGE, "num_hidden_layers": 2, "vocab_size": 512}
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(**sizes, max_position_embeddings=8192)).save_pretrained(folder / "large")
    tokenizer = tiny_tokenizer()
    tokenizer.model_max_length = 8192
    tokenizer.save_pretrained(folder / "large")
    (folder / "large.yaml").write_text(CONFIG.format(folder=folder, use_gpu=str(device == "cuda").lower()))
    return folder


def held() -> int:
    """MiB that processes hold on all GPUs."""
    asked = ["nvidia-smi", "--query-gpu=memory.used", "--format=csv,noheader,nounits"]
    try:
        return sum(map(int, subprocess.run(asked, capture_output=True, text=True, check=True).stdout.split()))
    except (OSError, subprocess.CalledProcessError):
        return 0


def watched(*arguments: str) -> tuple[int, list[tuple[float, str]], list[tuple[float, int]]]:
    """Run ``raysft``: (exit code, (seconds, line) printed, (seconds, MiB held on GPUs) four times a second)."""
    started, ended = time.perf_counter(), threading.Event()
    memory: list[tuple[float, int]] = []

    def watch() -> None:
        while not ended.wait(0.2):
            memory.append((time.perf_counter() - started, held()))

    watcher = threading.Thread(target=watch)
    watcher.start()
    command = [sys.executable, "-u", "-m", "raysft", *arguments]
    lines = []
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
        limit = threading.Timer(SECONDS, process.kill)
        limit.start()
        assert process.stdout is not None
        for line in process.stdout:
            lines.append((time.perf_counter() - started, line.rstrip()))
            print(f"{lines[-1][0]:6.1f} {lines[-1][1]}", flush=True)
    limit.cancel()
    ended.set()
    watcher.join()
    return process.returncode, lines, memory


def test_a_run_holds_the_gpu_from_its_workers_on_and_no_longer(device, folder):
    before = held()
    code, lines, memory = watched("run", str(folder / "large.yaml"))
    assert code == 0, "\n".join(line for _, line in lines[-30:])
    ends = {part: next(s for s, line in lines if line.startswith(begin)) for part, begin in PARTS.items() if begin}
    ends["end"] = lines[-1][0]
    print("seconds:", ", ".join(f"{part} {seconds:.1f}" for part, seconds in ends.items()))
    print("MiB held:", " ".join(f"{seconds:.1f}:{mib - before}" for seconds, mib in memory))
    run = folder / "runs" / "large"
    records = steps_of(run)
    assert len(records) == 8
    print("tokens/s:", [record["throughput"] for record in records], "GiB:", records[-1]["memory_gib"])
    if device == "cuda":
        estimated = json.loads((run / "plan.json").read_text())["memory"]
        print(
            "estimated GiB:",
            estimated["tensors_gib"],
            "allocated:",
            max(each["memory_gib"] for each in records),
            estimated,
        )
    print("mfu:", [record.get("mfu") for record in records])
    print("results:", json.loads((run / "all_results.json").read_text()))
    for name in ("generated_predictions", "generated_predictions_base"):
        predictions = list(read_jsonl(run / f"{name}.jsonl"))
        assert len(predictions) == 64
        assert not any(prediction.get("error") for prediction in predictions)
        # A model that was trained a little may end at once; the one with random weights does not.
        assert sum(prediction["tokens"] for prediction in predictions) >= (
            64 if name == "generated_predictions" else 65
        )
    assert (run / "report.html").exists()
    if device == "cuda":
        while_prepared = [mib - before for seconds, mib in memory if seconds < ends["plan"]]
        assert max(while_prepared, default=0) < 100, "something holds a GPU while data is tokenized"
        assert max(mib for _, mib in memory) - before > 500
        time.sleep(2)
        assert held() - before < 100, "something holds a GPU after the command"


def test_predictions_of_a_step_are_those_of_its_exported_checkpoint(device, folder):
    """On one GPU, which the training holds, the model of a step predicts between two steps."""
    varied = tiny_model(folder / "varied", spread=0.2)
    config = str(folder / "faults.yaml")
    settings = (
        f"model.path={varied}",
        f"scaling.use_gpu={str(device == 'cuda').lower()}",
        *("generate.enabled=true", "generate.max_examples=8", "generate.max_new_tokens=16"),
    )
    during = ("run.name=steps", "generate.every_steps=4", "train.max_steps=6", "train.save_every_steps=4")
    code, lines, _ = watched("run", config, *during, *settings, "train.learning_rate=1.0e-3", "train.keep_last=9")
    assert code == 0, "\n".join(line for _, line in lines[-30:])
    if device == "cuda":
        assert any("between two steps" in line for _, line in lines)
    run, exported = folder / "runs" / "steps", folder / "exported"
    code, lines, _ = watched("export", f"{run}/checkpoints/4", "--output", str(exported))
    assert code == 0, "\n".join(line for _, line in lines[-30:])
    code, lines, _ = watched("generate", config, "run.name=alone", *settings, f"generate.model={exported}")
    assert code == 0, "\n".join(line for _, line in lines[-30:])
    ours, theirs = (
        [prediction["predict"] for prediction in read_jsonl(place / "generated_predictions.jsonl")]
        for place in (run / "generation" / "4", folder / "runs" / "alone")
    )
    assert len(ours) == 8
    assert len(set(ours) - {""}) > 1
    assert ours == theirs


def test_a_model_of_4_bits_is_evaluated_without_training(device, folder):
    losses = {}
    for name in ("none", "4bit") if device == "cuda" else ("none",):
        code, lines, _ = watched(
            "evaluate", str(folder / "large.yaml"), f"run.name=evaluated-{name}", f"evaluate.model={folder}/large",
            *([] if name == "none" else [f"model.quantization={name}"]),
        )  # fmt: skip
        assert code == 0, "\n".join(line for _, line in lines[-30:])
        results = json.loads((folder / "runs" / f"evaluated-{name}" / "eval_results.json").read_text())
        losses[name] = results["eval_loss"]
    print("losses:", losses)
    assert losses["none"] == pytest.approx(losses.get("4bit", losses["none"]), rel=0.02)
    assert device == "cpu" or losses["4bit"] != losses["none"]


def test_a_worker_more_than_gpus_is_refused_in_one_line(device, folder):
    if device == "cpu":
        pytest.skip("needs a GPU")
    count = torch.cuda.device_count()
    ended = subprocess.run(
        [sys.executable, "-m", "raysft", "run", str(folder / "large.yaml"), "run.name=more",
         f"scaling.num_workers={count + 1}"],
        check=False, capture_output=True, text=True, timeout=SECONDS,
    )  # fmt: skip
    said_last = ended.stderr.strip().splitlines()
    print(ended.stderr)
    assert ended.returncode == 2
    assert f"scaling.num_workers={count + 1} needs {count + 1} GPUs" in said_last[-1]
    assert len(said_last) == 1
    assert not ended.stdout.strip()


@pytest.fixture(scope="module")
def left_alone(device, folder) -> tuple[str, ...]:
    """Settings of a training on the GPU, which has been done without a fault."""
    settings = (f"scaling.use_gpu={str(device == 'cuda').lower()}", "model.dtype=float32")
    assert attempt(folder, "left-alone", None, *settings) == 0, said(folder, "left-alone")[-2000:]
    return settings


def test_a_run_that_is_killed_goes_on_from_its_checkpoint(folder, left_alone):
    def moment(run: Path, seconds: float) -> bool:
        return len(steps_of(run)) >= 8  # checkpoints are every 3 steps

    assert attempt(folder, "killed", moment, *left_alone) is None, "it ended before it was killed"
    assert attempt(folder, "killed", None, *left_alone) == 0, said(folder, "killed")[-2000:]
    assert "resum" in said(folder, "killed")
    outcome = compared(folder, "left-alone", "killed", "killed", 1, 0)
    print(outcome.line())
    assert outcome.lost == 0
    assert max(outcome.losses, outcome.weights) < 1e-3


def test_a_run_without_gpus_leaves_those_of_the_machine_alone(device, folder, left_alone):
    before = held()
    settings = (
        "scaling.use_gpu=false",
        "generate.enabled=true",
        "generate.max_examples=4",
        "generate.max_new_tokens=8",
    )
    code, lines, memory = watched("run", str(folder / "faults.yaml"), "run.name=on-cpu", *settings, "train.epochs=1")
    assert code == 0, "\n".join(line for _, line in lines[-30:])
    print("MiB held:", sorted({mib - before for _, mib in memory}))
    assert max(mib for _, mib in memory) - before < 100
    ours, theirs = (steps_of(folder / "runs" / name)[0]["loss"] for name in ("on-cpu", "left-alone"))
    assert ours == pytest.approx(theirs, rel=1e-4)
