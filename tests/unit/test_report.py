"""The report: from what a run left in its directory to metrics, plots, a model card and a summary."""

from __future__ import annotations

import json
import math
import os
import random
import re
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from matplotlib.image import imread

from raysft.cli import main
from raysft.config import Config, with_overrides
from raysft.errors import RequestError
from raysft.generate.metrics import MetricRow, ModelRole, write_metrics
from raysft.report import plots, report
from raysft.report.plots import MAX_POINTS, smooth
from raysft.report.warnings import _rise
from raysft.run.plan import Resolved
from raysft.storage.json_files import flat, read_jsonl, write_json, write_jsonl
from raysft.storage.run_directory import RunDirectory
from raysft.telemetry.events import StepRecord
from raysft.telemetry.results import Evaluation, evaluation_results


@pytest.fixture
def drawn() -> None:
    """For tests that look at pictures."""


@pytest.fixture(autouse=True)
def few_pictures(request, monkeypatch) -> None:
    """Pictures that no test looks at are composed but not drawn, which takes two thirds of a report's time."""
    if "drawn" not in request.fixturenames:
        monkeypatch.setattr(plots, "_save", lambda figure, path: path.touch())


def step_record(step: int, total: int, noise: random.Random) -> dict[str, Any]:
    """A step as a real run logs it: a falling noisy loss, a slow first step."""
    return flat(
        StepRecord(
            current_steps=step,
            total_steps=total,
            loss=1.1 + 1.6 * math.exp(-8 * step / total) + noise.gauss(0, 0.12),
            lr=1e-4 * min(step / (0.03 * total + 1), 0.5 * (1 + math.cos(math.pi * step / total))),
            grad_norm=0.5 + 2 * math.exp(-10 * step / total) + abs(noise.gauss(0, 0.1)),
            epoch=2 * step / total,
            percentage=100 * step / total,
            elapsed_time="0:00:01",
            remaining_time="0:00:01",
            throughput=(9_000 if step == 1 else 41_000) + noise.gauss(0, 1500),
            total_tokens=step * 65_000,
            loss_tokens=30_000,
            packing_efficiency=min(1.0, 0.96 + noise.gauss(0, 0.01)),
            rows=32 * step,
            step_seconds=1.6,
            data_wait_seconds=0.01,
            memory_gib=61.0,
            memory_total_gib=80.0,
        )
    )


def evaluation_record(step: int, total: int, names: Sequence[str]) -> dict[str, Any]:
    """An evaluation as a run logs it: the sets start apart and fall."""
    sets = [
        Evaluation(name, step, 1.2 + 0.4 * place + 1.5 * math.exp(-6 * step / total), 0.65 - 0.3 * math.exp(-step), 900)
        for place, name in enumerate(names)
    ]
    return {"current_steps": step, "total_steps": total, "epoch": 2 * step / total} | evaluation_results(sets)


def make_run(
    folder: Path, steps: int = 10, names: Sequence[str] = ("chats",), every: int = 5, **overrides: Any
) -> RunDirectory:
    """A finished run; ``overrides`` are dotted config keys with ``__`` for the dot."""
    run = RunDirectory(folder / "toy")
    base = {
        "run": {"name": "toy"},
        "model": {"path": "Qwen/Qwen3-0.6B"},
        "data": {"train": [{"name": "chats", "path": "chats.jsonl"}]},
    }
    config = with_overrides(Config.model_validate(base), {k.replace("__", "."): v for k, v in overrides.items()})
    run.path.mkdir()
    run.config.write_text(config.to_yaml(), encoding="utf-8")
    noise = random.Random(0)
    log = [evaluation_record(0, steps, names)] if names else []
    for step in range(1, steps + 1):
        log.append(step_record(step, steps, noise))
        if names and (step % every == 0 or step == steps):
            log.append(evaluation_record(step, steps, names))
    write_jsonl(run.trainer_log, log)
    finetuning = config.model.finetuning
    resolved = Resolved(
        dtype="bfloat16",
        finetuning=finetuning,
        adapter=finetuning if finetuning in ("lora", "oft") else "none",
        lora_alpha=24.0 if finetuning == "lora" else None,
        learning_rate=3e-5,
        global_batch_size=32,
        micro_batch_size=1,
        workers=2,
        attention="flash_attention_2",
        zero_stage=3,
        optimizer="lion, betas [0.9, 0.95]",
    )
    sources = {"chats": {"examples": 4321, "tokens": 600_000}}
    plan = {
        "rows": 320,
        "steps": steps,
        "tokens": 650_000,
        "packing_efficiency": 0.961,
        "examples": 4321,
        "sources": sources,
        "resolved": asdict(resolved),
    }
    write_json(run.plan, plan)
    run.write_results("train", {"train_loss": 1.31, "train_runtime": 200.4, "train_tokens_per_second": 41234.5})
    if names:
        run.write_results("eval", {k: v for k, v in log[-1].items() if k.startswith("eval_")})
    return run


ROLES: tuple[ModelRole, ...] = ("base", "trained")


def both_models(
    scores: dict[str, float], unit: str | None = None, source: str | None = None, interval: bool = False
) -> list[MetricRow]:
    """Rows of both models; those of the base model have half the value."""
    return [
        MetricRow(
            metric,
            source,
            role,
            value * factor,
            value * factor * 0.9 if interval else None,
            value * factor * 1.1 if interval else None,
            unit,
            True if unit else None,
        )
        for role, factor in zip(ROLES, (0.5, 1.0), strict=True)
        for metric, value in scores.items()
    ]


def add_predictions(run: RunDirectory) -> None:
    """Scores and predictions of both models, each in another order."""
    scores = {"rouge-1": 41.5, "rouge-2": 20.25, "rouge-l": 35.0, "bleu-4": 12.0}
    rows = [*both_models(scores, "points"), *both_models({"exact_match": 0.25}, "fraction")]
    rows += [MetricRow("examples", None, "trained", 5, unit="examples")]
    rows += [MetricRow("runtime", None, role, 9.0, unit="seconds", higher_is_better=False) for role in ROLES]
    write_metrics(run, rows)
    turns = (("system", "Be brief."), ("user", "Question {} [bold]?"))
    prompt = "".join(f"<|im_start|>{role}\n{text}<|im_end|>\n" for role, text in turns) + "<|im_start|>assistant\n"
    rows = [{"id": i, "prompt": prompt.format(i), "label": f"right {i}", "source": "chats"} for i in range(5)]
    write_jsonl(run.predictions, [row | {"predict": f"trained {row['id']}"} for row in rows])
    write_jsonl(run.base_predictions, [row | {"predict": f"untrained {row['id']}"} for row in reversed(rows)])


def front_matter(run: RunDirectory) -> dict[str, Any]:
    _, front, _ = run.model_card.read_text(encoding="utf-8").split("---\n", 2)
    return yaml.safe_load(front)


def cells(text: str, label: str) -> list[str]:
    """The row of the summary's table that starts with a label, without the label."""
    line = next(line for line in text.splitlines() if line.startswith(f"{label} "))
    return line.removeprefix(label).split()


def pictures(run: RunDirectory) -> set[str]:
    return {path.name for path in run.path.glob("*.png")}


@pytest.mark.usefixtures("drawn")
def test_a_finished_run_gets_metrics_plots_card_and_summary(tmp_path: Path):
    run = make_run(tmp_path)
    add_predictions(run)
    text = report(run)
    assert pictures(run) == {
        "training_loss.png",
        "training_eval_loss.png",
        "training_eval_accuracy.png",
        "training_throughput.png",
        "training_grad_norm.png",
    }
    assert cells(text, "evaluation loss") == ["2.7000", "1.2037", "-1.4963", "(-55.4%)"]
    assert cells(text, "token accuracy") == ["35.0%", "65.0%", "+30.0", "points", "(+85.7%)"]
    assert cells(text, "ROUGE-L") == ["17.50", "35.00", "+17.50", "(+100.0%)"]
    assert cells(text, "exact match")[:2] == ["12.5%", "25.0%"]
    assert text.index("ROUGE-1") < text.index("ROUGE-2") < text.index("BLEU-4") < text.index("exact match")
    assert "runtime " not in text.split("Sample 1")[0], "a duration is no measure of quality"
    assert str(run.path) in text
    assert "\x1b" not in text, "plain text where stdout is no terminal"
    assert max(len(line) for line in text.splitlines() if str(run.path) not in line) <= 100


def test_samples_show_the_same_prompt_before_and_after(tmp_path: Path):
    run = make_run(tmp_path)
    add_predictions(run)
    text = report(run)
    sample = text[text.index("Sample 2") : text.index("Sample 3")]
    for part in ("Question 1 [bold]?", "right 1", "untrained 1", "trained 1"):
        assert part in sample
    assert "im_start" not in sample
    assert "Be brief" not in sample


def test_scores_of_several_sources_follow_those_over_all(tmp_path: Path):
    run = make_run(tmp_path)
    rows = [MetricRow("examples", source, "trained", 3, unit="examples") for source in (None, "long_poems", "time")]
    rows += [MetricRow("rouge-1", "long_poems", "trained", 30.0, unit="points", higher_is_better=True)]
    rows += [MetricRow("f1", "time", "trained", 0.5)]
    rows += [MetricRow("rouge-1", None, "trained", 40.0, unit="points", higher_is_better=True)]
    write_metrics(run, rows)
    text = report(run)
    assert cells(text, "ROUGE-1, long_poems") == ["–", "30.00"]
    assert cells(text, "f1, time") == ["–", "0.5000"]
    assert text.index("ROUGE-1 ") < text.index("ROUGE-1, long_poems")
    assert "examples" not in text


def test_intervals_stand_in_brackets(tmp_path: Path):
    run = make_run(tmp_path)
    rows = [
        *both_models({"bleu": 41.2}, "points", interval=True),
        *both_models({"rougeLsum": 100.0}, "points", "short_stories", interval=True),
        *both_models({"exact_match": 0.25}, "fraction", interval=True),
        *both_models({"chrf": 7.5}, "points"),
        *both_models({"top_low": 3.0}),
    ]
    signature = "tok:13a|version:2"
    write_metrics(run, [replace(row, signature=signature) if row.metric == "bleu" else row for row in rows])
    text = report(run)
    assert cells(text, "BLEU")[:4] == ["20.60", "(18.54–22.66)", "41.20", "(37.08–45.32)"]
    assert cells(text, "exact match")[:4] == ["12.5%", "(11.2%–13.8%)", "25.0%", "(22.5%–27.5%)"]
    assert cells(text, "chrF") == ["3.75", "7.50", "+3.75", "(+100.0%)"]
    assert cells(text, "rougeLsum, short_stories")[2:4] == ["100.00", "(90.00–110.00)"]
    assert cells(text, "top low")[:2] == ["1.5000", "3.0000"], "the name of a metric is not taken apart"
    assert "bleu low" not in text
    assert text.count("95% confidence intervals") == 1
    assert max(len(line) for line in text.splitlines() if str(run.path) not in line) <= 100
    card = run.model_card.read_text(encoding="utf-8")
    assert "| BLEU | 20.60 (18.54–22.66) | 41.20 (37.08–45.32) | +20.60 (+100.0%) |" in card
    assert "95% confidence intervals" in card
    assert "bleu `tok:13a|version:2`" in card


def test_trainer_state_is_what_hugging_face_writes(tmp_path: Path):
    run = make_run(tmp_path, steps=10)
    report(run)
    state = json.loads(run.trainer_state.read_text())
    assert (state["global_step"], state["max_steps"], state["epoch"]) == (10, 10, 2.0)
    history = state["log_history"]
    assert [entry["step"] for entry in history[:3]] == [0, 1, 2]
    assert {"loss", "grad_norm", "learning_rate", "epoch", "step"} <= history[1].keys()
    assert [e["step"] for e in history if "eval_loss" in e] == [0, 5, 10]
    assert history[-1]["train_loss"] == 1.31


@pytest.mark.parametrize(("metric", "value", "keeps"), [("eval_loss", 1.21, True), ("eval_accuracy", 0.5, False)])
def test_the_best_evaluation_stands_where_transformers_has_it(tmp_path: Path, metric: str, value: float, keeps: bool):
    run = make_run(tmp_path, train__best_metric=metric, train__keep_best=keeps, train__early_stopping__patience=3,
                   train__eval_every_steps=5, data__holdout=0.1)  # fmt: skip
    report(run)
    state = json.loads(run.trainer_state.read_text())
    assert state["best_global_step"] is state["best_metric"] is state["best_model_checkpoint"] is None
    run.write_results("train", {"train_loss": 1.31, "best_step": 5, f"best_{metric}": value})
    report(run)
    state = json.loads(run.trainer_state.read_text())
    assert (state["best_global_step"], state["best_metric"]) == (5, value)
    assert state["best_model_checkpoint"] == (str(run.path / "model") if keeps else None)
    told = f"the model after step 5, which has the best `{metric}` ({value:.4g})"
    assert (told in run.model_card.read_text(encoding="utf-8")) is keeps
    assert f"| best {metric.replace('_', ' ')} | {value:.4g} |" in run.model_card.read_text(encoding="utf-8")


def test_of_a_step_logged_twice_the_last_counts(tmp_path: Path):
    run = make_run(tmp_path, steps=10)
    again = step_record(7, 10, random.Random(0)) | {"loss": 0.125}
    with run.trainer_log.open("a") as file:
        file.write(json.dumps(again) + "\n")
    report(run)
    history = json.loads(run.trainer_state.read_text())["log_history"]
    assert [entry["loss"] for entry in history if entry["step"] == 7] == [0.125]
    assert [entry["step"] for entry in history if "loss" in entry] == list(range(1, 11))


@pytest.mark.usefixtures("drawn")
def test_several_evaluation_sets_have_rows_and_plots_of_their_own(tmp_path: Path):
    run = make_run(tmp_path, names=("chats", "poems_old"))
    text = report(run)
    assert {"training_eval_chats_loss.png", "training_eval_poems_old_loss.png"} <= pictures(run)
    assert cells(text, "evaluation loss, poems_old")[0] == "3.1000"
    assert cells(text, "evaluation loss")[0] == "2.9000"


@pytest.mark.usefixtures("drawn")
def test_numbers_that_are_not_finite_break_neither_json_nor_plots(tmp_path: Path):
    run = make_run(tmp_path)
    lines = [json.loads(line) for line in run.trainer_log.read_text().splitlines()]
    lines[0] |= {"eval_loss": 800.0, "eval_perplexity": math.inf}
    lines[3] |= {"loss": math.nan, "grad_norm": math.inf}
    write_jsonl(run.trainer_log, lines)
    text = report(run)
    assert cells(text, "perplexity") == ["inf", "3.33"]

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is no JSON")

    state = json.loads(run.trainer_state.read_text(), parse_constant=refuse)
    assert state["log_history"][0]["eval_perplexity"] is None
    assert "training_grad_norm.png" in pictures(run)


@pytest.mark.usefixtures("drawn")
def test_what_a_run_has_not_written_is_left_out(tmp_path: Path):
    run = make_run(tmp_path, names=(), stage="pt")
    text = report(run)
    assert "No results yet" in text
    assert "Sample" not in text
    assert pictures(run) == {"training_loss.png", "training_throughput.png", "training_grad_norm.png"}
    assert "## Results" not in run.model_card.read_text(encoding="utf-8")


def test_a_config_alone_is_a_run_that_has_not_begun(tmp_path: Path):
    run = make_run(tmp_path)
    for path in run.path.iterdir():
        if path != run.config:
            path.unlink()
    assert "No results yet" in report(run)
    assert "No training step has been logged yet" in run.model_card.read_text(encoding="utf-8")
    assert not run.trainer_state.exists()


def test_the_start_of_a_training_is_said_in_words(tmp_path: Path):
    run = make_run(tmp_path)
    run.write_results(
        "train", {"seconds_to_first_step": 50.0, "seconds_to_load_model": 8.0, "seconds_of_first_step": 2.0}
    )
    lines = {" ".join(line.split()) for line in report(run).splitlines()}
    assert {"time to the first step 50.0 s", "… loading the model 8.0 s", "… computing the step 2.0 s"} <= lines


def test_before_the_end_the_last_evaluation_stands_in_and_is_named(tmp_path: Path):
    run = make_run(tmp_path, steps=10)
    run.results("eval").unlink()
    lines = run.trainer_log.read_text().splitlines(keepends=True)
    run.trainer_log.write_text("".join(lines[:8]) + lines[8][:40])  # killed while it wrote step 7
    text = report(run)
    assert "the evaluation at step 5" in text
    assert "Training has reached step 6 of 10" in run.model_card.read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("finetuning", "library", "model", "settings"),
    [
        ("lora", "peft", "a LoRA adapter for", {"LoRA rank": "8", "LoRA alpha": "24.0"}),
        ("oft", "peft", "an OFT adapter for", {"OFT block size": "32"}),
        ("freeze", "transformers", "of some of its layers", {"trained layers": "the last 2", "trained modules": "all"}),
        ("full", "transformers", "of all its weights", {}),
    ],
)
def test_the_card_says_how_to_load_this_model(
    tmp_path: Path, finetuning: str, library: str, model: str, settings: dict[str, str]
):
    run = make_run(tmp_path, model__finetuning=finetuning)
    (run.path / "model").mkdir()
    text = report(run)
    card = run.model_card.read_text(encoding="utf-8")
    front = front_matter(run)
    assert (front["library_name"], front["base_model"]) == (library, "Qwen/Qwen3-0.6B")
    assert front["base_model_relation"] == ("adapter" if library == "peft" else "finetune")
    assert front["pipeline_tag"] == "text-generation"
    assert front["tags"] == ["raysft", "sft", finetuning]
    assert model in card
    assert f"load it with {library}" in text
    assert ("AutoPeftModelForCausalLM.from_pretrained" in card) == (library == "peft")
    assert ("AutoModelForCausalLM.from_pretrained" in card.replace("AutoPeft", "")) == (library == "transformers")
    shown = dict(re.findall(r"^\| ([^|]+) \| ([^|]+) \|$", card, re.MULTILINE))
    of_other_methods = {
        "LoRA rank",
        "LoRA alpha",
        "OFT block size",
        "trained layers",
        "trained modules",
    } - settings.keys()
    assert settings.items() <= shown.items()
    assert not of_other_methods & shown.keys()
    resolved = {"fine-tuning": finetuning, "dtype of the weights": "bfloat16", "attention": "flash_attention_2"}
    resolved |= {"learning rate": "3e-05", "rows per step": "32", "workers": "2", "ZeRO stage": "3"}
    resolved["optimizer"] = "lion, betas [0.9, 0.95]"
    assert resolved.items() <= shown.items(), "settings come from the plan, not from the config"
    assert "![Training loss](training_loss.png)" in card
    assert "| evaluation loss | 2.7000 | 1.2037 |" in card
    assert "| chats | training | `chats.jsonl` | 4,321 |" in card
    assert "| padding | 3.9% |" in card
    for block in card.split("```python\n")[1:]:
        compile(block.split("```")[0], "card", "exec")
    (run.path / "model" / "processor_config.json").write_text("{}")
    report(run)
    card = run.model_card.read_text(encoding="utf-8")
    assert front_matter(run)["pipeline_tag"] == "image-text-to-text"
    assert "AutoModelForImageTextToText.from_pretrained" in card
    assert "AutoProcessor" in card


def test_a_base_model_that_is_no_hub_id_stays_out_of_the_front_matter(tmp_path: Path):
    run = make_run(tmp_path, model__path="/models/llama")
    report(run)
    assert "base_model" not in front_matter(run)
    assert "`/models/llama`" in run.model_card.read_text(encoding="utf-8")


def test_credentials_appear_nowhere(tmp_path: Path):
    secret = [{"name": "a", "path": ["s3://KEY:SE/CR@ET@bucket/a.jsonl?token=HIDDEN", "hdfs://USER@host/b"]}]
    run = make_run(tmp_path)
    # Such a config is refused now, but older versions accepted it.
    config = yaml.safe_load(run.config.read_text())
    config["data"]["train"], config["model"]["path"] = secret, "s3://KEY:SECRET@models/m?sig=HIDDEN"
    run.config.write_text(yaml.safe_dump(config))
    text = report(run) + run.model_card.read_text(encoding="utf-8") + run.trainer_state.read_text()
    text += run.page.read_text(encoding="utf-8")
    for word in ("KEY", "SE/CR", "SECRET", "ET@", "HIDDEN", "USER"):
        assert word not in text
    assert "s3://***@bucket/a.jsonl?***" in text


@pytest.mark.parametrize("missing", ["folder", "config"])
def test_a_path_that_is_no_run_directory_is_refused(tmp_path: Path, missing: str):
    path = tmp_path / "nowhere" if missing == "folder" else tmp_path
    with pytest.raises(RequestError, match="pass the folder") as caught:
        report(RunDirectory(path))
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not path.exists() or not list(path.iterdir())


@pytest.mark.parametrize(
    ("name", "content", "line"),
    [
        ("trainer_log.jsonl", b'{"current_steps": 1, "loss": 2.0}\n{"current_steps": 2, "lo\n', 2),
        ("trainer_log.jsonl", b'{"current_steps": 1, "loss": 2.0}\n[1]\n', 2),
        ("trainer_log.jsonl", b'{"loss": 2.0}\n', 1),
        ("trainer_log.jsonl", b'{"current_steps": 1, "loss": 2.0}\n"\xff"\n', 2),
        ("generated_predictions.jsonl", b'{"prompt": "a"}\nnonsense\n', 2),
        ("metrics.jsonl", b'{"metric": "bleu"}\n[]\n', 2),
        ("eval_results.json", b'{\n  "eval_loss": \n', 3),
        ("plan.json", b"[]", 1),
        ("config.yaml", b"run:\n  name: [\n", 3),
        ("config.yaml", b"", 1),
    ],
)
def test_a_corrupt_file_is_named_with_its_line(tmp_path: Path, name: str, content: bytes, line: int):
    run = make_run(tmp_path)
    (run.path / name).write_bytes(content)
    with pytest.raises(RequestError) as caught:
        report(run)
    assert str(caught.value).startswith(f"{run.path / name}:{line}: ")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "content", "fact"),
    [
        ("trainer_log.jsonl", b'{"current_steps": 1, "loss": "low"}', ":1: loss must be a number, but is 'low'"),
        (
            "trainer_log.jsonl",
            b'{"current_steps": true, "loss": 2}',
            ":1: current_steps must be an integer, but is True",
        ),
        (
            "trainer_log.jsonl",
            b'{"current_steps": 1, "source_losses": [1]}',
            ":1: source_losses must be a mapping, but is [1]",
        ),
        (
            "trainer_log.jsonl",
            b'{"current_steps": 1, "eval_a_loss": {}}',
            ":1: eval_a_loss must be a number, but is {}",
        ),
        (
            "trainer_log.jsonl",
            b'{"current_steps": 1, "x": [1' + 400 * b"0" + b"]}",
            ":1: x.0 must be below 2^63, but is 1000",
        ),
        (
            "trainer_log.jsonl",
            b'{"current_steps": 1, "x": 1' + 5000 * b"0" + b"}",
            ":1: invalid JSON (Exceeds the limit",
        ),
        ("eval_results.json", b'{"eval_loss": "3"}', ": eval_loss must be a number, but is '3'"),
        ("plan.json", b'{"sources": ' + 100_000 * b"[", ":1: invalid JSON (maximum recursion depth"),
        ("metrics.jsonl", b'{"metric": "bleu", "value": [2]}', ":1: value must be a number, but is [2]"),
        ("generated_predictions.jsonl", b'{"id": [1]}', ":1: id must be text or a number, but is [1]"),
        ("config.yaml", b"train: {warmup_ratio: a}", ": train.warmup_ratio must be a number, but is 'a'"),
        ("config.yaml", b"data: {train: [{name: [a]}]}", ": data.train.0.name must be text or a number, but is ['a']"),
    ],
)
def test_a_value_of_another_type_is_one_line(tmp_path: Path, capsys, name: str, content: bytes, fact: str):
    run = make_run(tmp_path)
    (run.path / name).write_bytes(content + b"\n")
    assert main(["report", str(run.path)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"raysft: error: {run.path / name}{fact}")
    assert "; restore " in line


def test_a_backend_that_matplotlib_does_not_know_draws_files_all_the_same(tmp_path: Path):
    run = make_run(tmp_path)
    command = "import os, sys; from raysft.cli import main; code = main(['report', sys.argv[1]]); print(os.environ['MPLBACKEND'])"
    environment = {**os.environ, "MPLBACKEND": "nowhere"}
    done = subprocess.run(
        [sys.executable, "-c", command, str(run.path)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert (done.stdout.splitlines()[-1:], done.stderr) == (["nowhere"], "")
    assert (run.path / "training_loss.png").exists()


@pytest.mark.usefixtures("drawn")
def test_a_long_run_is_drawn_from_a_bounded_number_of_points(tmp_path: Path):
    run = make_run(tmp_path, steps=3 * MAX_POINTS, names=())
    report(run)
    assert imread(run.path / "training_loss.png").shape[:2] == (750, 1350)


def test_the_smoothed_course_has_no_lag():
    line = [float(i) for i in range(600)]
    course = smooth(np.array(line))
    assert course[100:500].tolist() == pytest.approx(line[100:500])


@pytest.mark.usefixtures("drawn")
def test_a_report_may_be_repeated(tmp_path: Path):
    run = make_run(tmp_path)
    first = report(run)
    kept = run.model_card.read_text(encoding="utf-8")
    assert report(run) == first
    assert run.model_card.read_text(encoding="utf-8") == kept


def test_what_the_plan_warned_of_stands_in_the_summary_and_on_the_page(tmp_path: Path):
    run = make_run(tmp_path)
    assert "Warnings" not in report(run)
    plan = json.loads(run.plan.read_text())
    write_json(run.plan, plan | {"warnings": ["1 step is <few>; take more"]})
    assert "Warnings\n- 1 step is <few>; take more\n" in report(run)
    assert "<li>1 step is &lt;few&gt;; take more</li>" in run.page.read_text()


def warned(run: RunDirectory) -> list[str]:
    """The warnings of the summary."""
    text = report(run)
    block = text.partition("\nWarnings\n")[2].partition("\n\n")[0]
    return [" ".join(line.split()) for line in block.removeprefix("- ").split("\n- ") if line]


LOWER_RATE = ("; lower train.learning_rate=0.0001", "3e-05")


def assert_warned(run: RunDirectory, expected: Sequence[Sequence[str]]) -> None:
    """One warning for each of the expected ones, which holds all of its parts in their order."""
    lines = warned(run)
    assert len(lines) == len(expected)
    for line, parts in zip(lines, expected, strict=True):
        assert re.search(".*".join(map(re.escape, parts)), line), line


def with_losses(run: RunDirectory, losses: Sequence[float | None]) -> RunDirectory:
    """The run with these training losses."""
    records = list(read_jsonl(run.trainer_log))
    steps = iter(losses)
    write_jsonl(run.trainer_log, [record | {"loss": next(steps)} if "loss" in record else record for record in records])
    return run


def with_evaluations(run: RunDirectory, losses: dict[int, dict[str, float]], ended: bool = True) -> RunDirectory:
    """The run with evaluations of some sets after some steps; the last one is its end."""
    records = [record for record in read_jsonl(run.trainer_log) if "loss" in record]
    for step, of_sets in losses.items():
        sets = [Evaluation(name, step, loss, 0.5, 900) for name, loss in of_sets.items()]
        records.append({"current_steps": step, "total_steps": 10, **evaluation_results(sets)})
    write_jsonl(run.trainer_log, records)
    run.results("eval").unlink()
    if ended:
        run.write_results("eval", {key: value for key, value in records[-1].items() if key.startswith("eval_")})
    return run


def test_a_training_loss_that_rose_is_told_with_what_to_try(tmp_path: Path):
    run = with_losses(make_run(tmp_path, steps=50), [2.0 + 0.02 * step + 0.1 * (step % 2) for step in range(50)])
    # The first ten steps: 2 + 0.02 × 4.5 + 0.1 / 2; the last ten are 40 steps later.
    assert_warned(run, [("training loss rose", "2.1400", "2.9400", "10 steps", *LOWER_RATE)])


@pytest.mark.parametrize("slope", [-0.01, 0.0, 0.002])
def test_noise_is_no_rise(tmp_path: Path, slope: float):
    noise = random.Random(1)
    losses = [2.0 + slope * step + noise.gauss(0, 0.3) for step in range(50)]
    assert warned(with_losses(make_run(tmp_path, steps=50), losses)) == []


@pytest.mark.parametrize("steps", [10, 12, 24, 50, 100, 400])
def test_a_loss_that_only_scatters_hardly_ever_passes_for_one_that_rose(steps: int):
    draw = random.Random(steps)

    def share(rise: float) -> float:
        runs = ([2.0 + rise * step / steps + draw.gauss(0, 0.3) for step in range(steps)] for _ in range(1000))
        return sum(_rise(losses) is not None for losses in runs) / 1000

    assert share(0.0) < 0.03
    assert share(2.0) > 0.7


def test_a_few_steps_say_nothing_of_the_loss_and_steps_without_a_number_are_counted(tmp_path: Path):
    run = with_losses(make_run(tmp_path, steps=4), [1.0, 2.0, 3.0, None])
    assert_warned(run, [("loss", "1 of 4 steps", "; lower train.learning_rate", "records")])


@pytest.mark.parametrize(
    ("evaluations", "expected"),
    [
        ({0: {"a": 2.0}, 10: {"a": 1.5}}, []),
        ({0: {"a": 2.0}, 10: {"a": 2.5}}, [("evaluation loss rose", "2.0000", "2.5000", *LOWER_RATE, "fewer epochs")]),
        (
            {0: {"a": 2.0}, 4: {"a": 1.25}, 10: {"a": 1.5}},
            [("evaluation loss", "lowest", "step 4", "1.2500", "1.5000", "; set train.keep_best=true")],
        ),
        (
            {0: {"a": 2.0}, 10: {"a": 1.99}},
            [
                (
                    "evaluation loss",
                    "hardly",
                    "2.0000",
                    "1.9900",
                    "; train",
                    "epochs",
                    "raise train.learning_rate=0.0001",
                )
            ],
        ),
        (
            {0: {"a": 2.0, "b": 2.0}, 10: {"a": 1.0, "b": 2.5}},
            [("evaluation loss of 'b' rose", "2.0000", "2.5000", *LOWER_RATE, "fewer epochs")],
        ),
    ],
)
def test_an_evaluation_that_got_worse_or_hardly_better_is_told(tmp_path: Path, evaluations, expected):
    assert_warned(with_evaluations(make_run(tmp_path), evaluations), expected)


def test_a_model_that_was_kept_for_another_metric_is_not_to_be_kept_for_its_loss(tmp_path: Path):
    by = {"train__keep_best": True, "train__best_metric": "eval_accuracy", "train__eval_every_steps": 1}
    run = make_run(tmp_path, data__holdout=0.1, **by)
    assert warned(with_evaluations(run, {0: {"a": 2.0}, 4: {"a": 1.25}, 10: {"a": 1.5}})) == []


def test_a_run_that_goes_on_has_not_hardly_changed(tmp_path: Path):
    assert warned(with_evaluations(make_run(tmp_path), {0: {"a": 2.0}, 1: {"a": 1.995}}, ended=False)) == []


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ([{"stop": "eos"}] * 5, []),
        (
            [{"stop": "length"}] * 3 + [{"stop": "eos"}] * 2,
            [("3 of 5 predictions", "cut off", "generate.max_new_tokens=1024; raise it")],
        ),
        ([{"predict": " ", "stop": "eos"}] * 5, [("5 of 5 predictions", "empty; check", "chat template")]),
        ([{"predict": "I", "stop": "eos"}] * 5, [("all 5 predictions", "the same text", *LOWER_RATE, "data")]),
        ([{"stop": "error"}] * 2 + [{"stop": "eos"}] * 3, [("2 of 5 prompts", "failed", "; run the same command")]),
    ],
)
def test_predictions_that_are_cut_off_empty_or_all_the_same_are_told(tmp_path: Path, changes, expected):
    run = make_run(tmp_path)
    add_predictions(run)
    rows = [row | change for row, change in zip(read_jsonl(run.predictions), changes, strict=True)]
    write_jsonl(run.predictions, rows)
    assert_warned(run, expected)
