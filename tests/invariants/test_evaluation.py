"""Evaluations without a training: the numbers of those within one, of peft and of transformers, on any number of workers."""

from __future__ import annotations

import os
import queue
import socket
import time
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from raysft.config import Config, with_overrides
from raysft.data.rows.packed_dataset import PackedDataset
from raysft.models.new_tokens import with_new_tokens
from raysft.storage.run_directory import RunDirectory
from raysft.telemetry.events import EvaluationDone
from raysft.train.job import EvaluationJob
from tests.processes import forks
from tests.shards import the_set, written
from tests.training import WITHIN_SECONDS, Case, Result, examples_of, make_config, prepare, rows_of, train_all

CASES: dict[str, dict[str, Any]] = {
    "full": {},
    "lora": {"model.finetuning": "lora"},
    "dora": {"model.finetuning": "lora", "model.lora.dora": True},
    "a whole module": {"model.finetuning": "lora", "model.lora.extra_modules": ["norm"]},
    "oft": {"model.finetuning": "oft", "model.oft.block_size": 16},
    "new tokens": {"model.finetuning": "lora", "model.new_tokens.special": ["<|new|>"]},
    "bfloat16": {"model.finetuning": "lora", "model.dtype": "bfloat16"},
    "autocast": {"model.dtype": "bfloat16", "train.optimizer": "muon"},
    "4bit": {"model.finetuning": "lora", "model.quantization": "4bit"},
    "8bit": {"model.finetuning": "lora", "model.quantization": "8bit"},
}
ALIKE = ("full", "lora", "a whole module", "bfloat16", "autocast", "4bit", "8bit")
"""Ways to train in which the untrained model computes what its base computes."""
NOTHING = {"model.finetuning": "full", "train.optimizer": "adamw"}
"""An evaluation knows nothing of how a model was trained."""


@dataclass(frozen=True)
class Evaluated:
    """What one evaluation came to."""

    loss: float
    accuracy: float
    tokens: int
    elements: int
    """Elements of weights that the first worker keeps."""
    trained: int
    """Weights with gradients."""


def worker(rank: int, world: int, port: int, jobs: Sequence[EvaluationJob], out: Any) -> None:
    """Evaluate one job after another in one process; rank 0 puts what they come to into ``out``."""
    from raysft.train.evaluated_model import evaluated_model
    from raysft.train.evaluation import evaluate

    os.environ.update(
        MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), RANK=str(rank), WORLD_SIZE=str(world), LOCAL_RANK=str(rank)
    )
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", rank=rank, world_size=world, timeout=timedelta(seconds=60))
    device = torch.device("cpu")
    for job in jobs:
        model = evaluated_model(job, world, device)
        with torch.autocast("cpu", torch.bfloat16, enabled=job.config.autocast):
            rows = job.eval_rows["d"]
            found = evaluate(model, "d", 0, rows.steps(0, rank, world), job.config.micro_batch_size, device)
        weights = list(model.parameters())
        kept = sum(getattr(weight, "ds_tensor", weight).numel() for weight in weights)
        trained = sum(weight.requires_grad for weight in weights)
        if rank == 0:
            out.put(Evaluated(found.loss, found.accuracy, found.tokens, kept, trained))
        torch.distributed.barrier()
    torch.distributed.destroy_process_group()


def evaluate_all(jobs: Sequence[EvaluationJob], world: int = 1) -> list[Evaluated]:
    """Evaluate with ``world`` workers."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    out = forks().Queue()
    processes = [forks().Process(target=worker, args=(rank, world, port, jobs, out)) for rank in range(world)]
    for process in processes:
        process.start()
    found: list[Evaluated] = []
    limit = time.monotonic() + WITHIN_SECONDS
    try:
        while len(found) < len(jobs):
            assert time.monotonic() < limit, "the evaluations did not finish"
            assert not any(process.exitcode for process in processes), "a worker failed; its error is above"
            try:
                found.append(out.get(timeout=0.5))
            except queue.Empty:
                continue
    finally:
        for process in processes:
            process.kill()
    return found


def job_of(config: Config, model: Path | str, rows: PackedDataset, **settings: Any) -> EvaluationJob:
    changed = with_overrides(config, {"evaluate.model": str(model), **settings})
    return EvaluationJob(changed, RunDirectory(config.run_directory), str(model), {"d": rows})


@pytest.fixture(scope="module")
def cases(tmp_path_factory) -> dict[str, Case]:
    folder, path, manifest = prepare(tmp_path_factory.mktemp("evaluation"))
    rows = rows_of(manifest)
    made = {name: Case(make_config(folder, path, {**settings, "data.cache": str(folder / "cache")}), rows)
            for name, settings in CASES.items()}  # fmt: skip
    config = made["new tokens"].config
    extended = with_new_tokens(config, str(path), AutoModelForCausalLM.from_pretrained(path).config, print)
    longer = rows_of(written(the_set(config, extended), extended))
    made["new tokens"] = Case(with_overrides(config, {"model.path": extended}), longer)
    return made


@pytest.fixture(scope="module")
def trained(cases) -> dict[str, Result]:
    return dict(zip(cases, train_all(list(cases.values())), strict=True))


def settings_of(name: str) -> dict[str, Any]:
    """What the evaluation of a case's model has in common with its training."""
    finetuning = {"model.finetuning": "full"} if name != "autocast" else {}
    return finetuning | {"model.new_tokens.special": []}


@pytest.fixture(scope="module")
def bases(cases) -> dict[str, Evaluated]:
    """The models before training, evaluated by themselves."""
    jobs = [
        job_of(cases[name].config, cases[name].config.model.path, cases[name].rows, **settings_of(name))
        for name in ALIKE
    ]
    return dict(zip(ALIKE, evaluate_all(jobs), strict=True))


@pytest.fixture(scope="module")
def results(cases, trained) -> dict[str, Evaluated]:
    """The trained models, evaluated by themselves."""
    jobs = [job_of(case.config, trained[name].model, case.rows, **settings_of(name)) for name, case in cases.items()]
    return dict(zip(cases, evaluate_all(jobs), strict=True))


@pytest.mark.parametrize("name", ALIKE)
def test_an_untrained_model_has_the_numbers_of_the_evaluation_before_the_first_step(trained, bases, name):
    first = next(event.record for event in trained[name].events if isinstance(event, EvaluationDone))
    assert first["current_steps"] == 0
    found = bases[name]
    assert (found.loss, found.accuracy) == (first["eval_loss"], first["eval_accuracy"])
    assert found.trained == 0


@pytest.mark.parametrize("name", list(CASES))
def test_a_trained_model_has_the_numbers_with_which_its_training_ended(trained, results, name):
    found, ended = results[name], trained[name].evaluation
    first = next(event.record for event in trained[name].events if isinstance(event, EvaluationDone))
    assert found.loss != first["eval_loss"]
    if "bit" in name:  # the base was dequantized in other layouts
        assert found.loss == pytest.approx(ended["eval_loss"], rel=1e-5)
    else:
        assert (found.loss, found.accuracy) == (ended["eval_loss"], ended["eval_accuracy"])


def quantized(name: str) -> dict[str, Any]:
    if name not in ("4bit", "8bit"):
        return {}
    four = {"bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True, "bnb_4bit_compute_dtype": torch.float32}
    settings = (
        BitsAndBytesConfig(load_in_8bit=True) if name == "8bit" else BitsAndBytesConfig(load_in_4bit=True, **four)
    )
    return {"quantization_config": settings, "device_map": {"": "cpu"}}


def loss_of(model: Any, rows: PackedDataset) -> float:
    """The mean loss over all tokens, by transformers' own loss, one example after the other."""
    total, tokens = 0.0, 0
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False  # that layout computes in bfloat16
    with torch.no_grad():
        for batch in rows.steps(0, 0, 1):
            for row in range(len(batch["row"])):
                for ids, labels in examples_of(batch, row):
                    count = int((labels[1:] != -100).sum())
                    total += count * model(input_ids=ids[None], labels=labels[None]).loss.double().item()
                    tokens += count
    return total / tokens


@pytest.mark.parametrize("name", ["full", "lora", "dora", "a whole module", "oft", "new tokens", "4bit", "8bit"])
def test_the_loss_is_that_of_transformers_and_peft_example_by_example(cases, trained, results, name):
    case, folder = cases[name], trained[name].model
    if name == "full":
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    else:
        base = AutoModelForCausalLM.from_pretrained(case.config.model.path, dtype=torch.float32, **quantized(name))
        model = PeftModel.from_pretrained(base, folder)
    # LLM.int8 rounds a token depending on those beside it.
    tolerance = 2e-3 if name == "8bit" else 1e-5
    assert results[name].loss == pytest.approx(loss_of(model.eval(), case.rows), rel=tolerance)


@pytest.mark.parametrize("name", ["4bit", "8bit"])
def test_a_quantized_model_has_the_loss_of_transformers_and_not_that_of_its_base(cases, bases, name):
    case = cases[name]
    model = AutoModelForCausalLM.from_pretrained(case.config.model.path, dtype=torch.float32, **quantized(name)).eval()
    expected, plain = loss_of(model, case.rows), bases["full"].loss
    assert bases[name].loss == pytest.approx(expected, rel=1e-4 if name == "8bit" else 1e-5)
    assert abs(plain - expected) > (1e-5 if name == "8bit" else 1e-3) * plain


PARTITIONED = {
    "full": {"train.zero_stage": 3},
    "lora": {"train.zero_stage": 3, "train.offload.optimizer": "cpu", "train.offload.parameters": "cpu"},
    "a whole module": {"train.zero_stage": 3},
    "oft": {"train.zero_stage": 3},
    "new tokens": {"train.zero_stage": 3},
    "bfloat16": {"train.zero_stage": 3},
    "4bit": {"train.zero_stage": 3},
}


@pytest.fixture(scope="module")
def by_two(cases, trained) -> dict[tuple[str, bool], Evaluated]:
    """The trained models, evaluated by two workers that each have all weights or a part of them."""
    names = [(name, parts) for name in PARTITIONED for parts in (False, True)]
    jobs = [
        job_of(cases[name].config, trained[name].model, cases[name].rows,
               **{**settings_of(name), **(PARTITIONED[name] if parts else {})})
        for name, parts in names
    ]  # fmt: skip
    return dict(zip(names, evaluate_all(jobs, world=2), strict=True))


@pytest.mark.parametrize("name", list(PARTITIONED))
@pytest.mark.parametrize("parts", [False, True])
def test_two_workers_and_zero_change_no_number(results, by_two, name, parts):
    alone, found = results[name], by_two[name, parts]
    assert found.tokens == alone.tokens
    assert found.loss == pytest.approx(alone.loss, rel=1e-3 if name == "bfloat16" else 1e-6)
    assert found.trained == 0
    if name == "4bit" or not parts:
        assert found.elements == alone.elements, "quantized weights are whole on each worker"
    else:
        assert found.elements < 0.6 * alone.elements


def test_a_batch_size_of_a_training_that_no_worker_count_divides_is_no_matter(cases, trained):
    """DeepSpeed would refuse it."""
    case = cases["full"]
    settings = {**NOTHING, "train.zero_stage": 3, "train.global_batch_size": "auto", "train.micro_batch_size": 3}
    job = job_of(case.config, trained["full"].model, case.rows, **settings)
    (found,) = evaluate_all([job])
    assert found.loss == pytest.approx(trained["full"].evaluation["eval_loss"], rel=1e-6)
