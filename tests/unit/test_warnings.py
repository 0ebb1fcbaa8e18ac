"""Warnings: what a person would otherwise find out only by looking at the result."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest
import yaml

from raysft.cluster.placement import Node
from raysft.config import Config, parse, with_overrides
from raysft.data.prepare import _plan_rows, _shared_files
from raysft.data.shards.shard_set import resolve_shard_set
from raysft.data.tokenization.turn_ends import TurnStatistics
from raysft.run.plan import Plan, Resolved, make_plan
from raysft.run.source_plan import SourcePlan
from raysft.run.warnings import warnings
from tests.messages import holds
from tests.shards import data_config, the_set, write_records, written
from tests.tiny import tiny_tokenizer


def config(**overrides) -> Config:
    base = parse({"model": {"path": "m"}, "data": {"train": [{"name": "a", "path": "a.jsonl"}]}})
    return with_overrides(base, {key.replace("__", "."): value for key, value in overrides.items()})


def source(**changes) -> SourcePlan:
    usual = SourcePlan(
        records=20_000,
        examples=20_000,
        tokens=8_000_000,
        loss_tokens=4_000_000,
        longest=1900,
        rejected=0,
        dropped=0,
        counts={},
        formats=("openai",),
        reused=False,
    )
    return replace(usual, **changes)


def plan(**changes) -> Plan:
    """A run about which nothing is to be said."""
    usual = Plan(
        stage="sft",
        examples=20_000,
        rows=4000,
        rows_of_epochs=(4000,),
        steps=125,
        epochs=1,
        global_batch_size=32,
        global_batch_size_chosen=True,
        sequence_length=2048,
        tokens=8_000_000,
        loss_tokens=4_000_000,
        packing_efficiency=0.98,
        empty_rows=0,
        filler_rows=0,
        workers=1,
        fewest_workers=1,
        most_workers=1,
        rows_per_worker=32,
        accumulation=32,
        cpus=1.5,
        gpus=0.0,
        cluster_cpus=2.0,
        cluster_gpus=0.0,
        sources={"a": source()},
        evaluation={"a": source(records=1000, examples=1000)},
        resolved=Resolved("float32", "lora", "lora", 16.0, 1e-4, 32, 1, 1, "auto", 2, "adamw"),
    )
    return replace(usual, **changes)


def test_nothing_is_said_of_a_usual_run():
    assert list(warnings(config(), plan())) == []


def test_a_run_that_evaluates_nothing_says_how_to_hold_examples_out():
    (line,) = warnings(config(), plan(evaluation={}))
    assert line.startswith("nothing is evaluated")
    assert "use data.holdout=0.1, or give files in data.eval" in line


@pytest.mark.parametrize(
    ("examples", "share"), [((400, 60), 0.1), ((400, 17), 0.3), ((30,), 0.3), ((400, 9), None), ((1,), None)]
)
def test_who_would_hold_nothing_out_of_a_source_is_not_told_to(examples, share):
    sources = {str(index): source(examples=count) for index, count in enumerate(examples)}
    (line,) = warnings(config(), plan(evaluation={}, sources=sources, examples=sum(examples)))
    assert re.findall(r"data.holdout=([\d.]+)", line) == ([str(share)] if share else [])
    assert line.endswith("give files in data.eval")


SMALL = {"examples": 40, "rows": 1, "rows_of_epochs": (1,), "steps": 1, "global_batch_size": 1}
SINGLE = {"data__packing": False}


@pytest.mark.parametrize(
    ("settings", "changes", "expected"),
    [
        (
            {},
            SMALL,
            "1 step is too few to learn anything; use data.packing=false (40 rows an epoch instead of 1) and train.epochs=3, or "
            "add data",
        ),
        (
            SINGLE,
            {"examples": 7, "rows": 14, "rows_of_epochs": (7, 7), "steps": 14, "global_batch_size": 1, "epochs": 2},
            "14 steps are too few to learn anything; use train.epochs=15, or add data",
        ),
        (
            {"train__global_batch_size": 32},
            {"rows": 608, "rows_of_epochs": (608,), "steps": 19, "global_batch_size_chosen": False},
            "19 steps are too few to learn anything; use train.global_batch_size=auto instead of 32",
        ),
        (
            {"train__max_steps": 2},
            {"rows": 64, "rows_of_epochs": (64,), "steps": 2},
            "2 steps are too few to learn anything; raise train.max_steps=2",
        ),
        (
            {"train__max_steps": 4},  # in the middle of epochs that do not fill their last step
            {
                "rows": 36,
                "rows_of_epochs": (18, 18),
                "steps": 4,
                "global_batch_size": 16,
                "epochs": 100,
                "empty_rows": 28,
            },
            "4 steps are too few to learn anything; raise train.max_steps=4",
        ),
        (
            {"train__max_steps": 3},
            {
                "rows": 34,
                "rows_of_epochs": (18, 16),
                "steps": 3,
                "global_batch_size": 16,
                "epochs": 2,
                "empty_rows": 14,
            },
            "3 steps are too few to learn anything; raise train.max_steps=3",
        ),
        (
            {},
            {"workers": 12, "sequence_parallel": 4, "groups_cross_nodes": True},
            "groups of scaling.sequence_parallel=4 workers span nodes, so every layer waits for the network; use a number "
            "that divides the number of workers on each node",
        ),
        (
            {"train__epochs": 2, "train__global_batch_size": 16},
            {
                "examples": 18,
                "rows": 36,
                "rows_of_epochs": (18, 18),
                "steps": 4,
                "global_batch_size": 16,
                "epochs": 2,
                "empty_rows": 28,
                "global_batch_size_chosen": False,
            },
            "4 steps are too few to learn anything; use train.global_batch_size=auto instead of 16",
        ),
        (
            {"train__epochs": 0.5, **SINGLE},
            {"examples": 10, "rows": 5, "rows_of_epochs": (5,), "steps": 5, "global_batch_size": 1, "epochs": 0.5},
            "5 steps are too few to learn anything; use train.epochs=10, or add data",
        ),
        (
            {},  # more than one row, as the labels of one are not enough for a step
            {"examples": 30, "rows": 30, "rows_of_epochs": (30,), "steps": 15, "global_batch_size": 2},
            "15 steps are too few to learn anything; use train.epochs=4, or add data",
        ),
        (
            {"train__global_batch_size": 32},
            {"rows": 120, "rows_of_epochs": (5,) * 24, "steps": 24, "empty_rows": 648},
            "84% of the rows of all steps are empty; use train.global_batch_size=auto",
        ),
        (
            {},
            {"workers": 8, "global_batch_size": 2},
            "6 of 8 workers are idle; use scaling.num_workers=2",
        ),
        (
            SINGLE,
            {"packing_efficiency": 0.03, "sources": {"a": source(longest=70)}},
            "97% of the positions in rows are padding; use data.sequence_length=72 instead of 2048, which fits the longest example",
        ),
        (
            SINGLE,
            {"packing_efficiency": 0.2},
            "80% of the positions in rows are padding; use data.packing=true, which packs several examples into a row",
        ),
        (
            {"data__holdout": 0.1},
            {"evaluation": {"a": source(examples=1, loss_tokens=40)}},
            "evaluation set 'a' has 1 example, so its results are mostly chance; raise data.holdout",
        ),
        (
            {"data__eval": [{"name": "a", "path": "few.jsonl"}]},
            {"evaluation": {"a": source(examples=2, loss_tokens=80)}},
            "evaluation set 'a' has 2 examples, so its results are mostly chance; add examples to it",
        ),
        (
            {},
            {"shared_files": {"b": ("a", "a.jsonl")}},
            "evaluation set 'b' and training source 'a' both read a.jsonl; give other files, or use data.holdout",
        ),
        (
            {},
            {"sources": {"a": source(rejected=1500, dropped=500)}},
            "source 'a': 2,000 of 20,000 records are rejected or dropped; see rejected.jsonl of the run for the reasons",
        ),
        (
            {},
            {"sources": {"a": source(counts={"truncated": 9000})}},
            "source 'a': 9,000 of 20,000 examples are truncated at data.sequence_length=2048; raise it, or use "
            "data.on_overflow=split",
        ),
        (
            {"train__warmup_ratio": 1.0},
            {},
            "warm-up takes 125 of 125 steps; lower train.warmup_ratio=1",
        ),
        (
            {"train__warmup_steps": 100},
            {},
            "warm-up takes 100 of 125 steps; lower train.warmup_steps=100",
        ),
        (
            {"model__chat_template": "gemma"},
            {"missing_tokens": ("<start_of_turn>", "<end_of_turn>")},
            "model.chat_template=gemma writes <start_of_turn>, <end_of_turn>, but the tokenizer of m has no such special tokens "
            "and splits them; use the template of the model's family, or add them in model.new_tokens.special",
        ),
    ],
)
def test_what_would_surprise_is_said_in_one_line(settings, changes, expected):
    fact, remedy = expected.split("; ")
    (line,) = warnings(config(**settings), plan(**changes))
    assert line.startswith(fact)
    assert line.endswith(f"; {remedy}")
    assert "\n" not in line


@pytest.mark.parametrize(
    ("settings", "changes"),
    [
        # A pass over short examples that fill few rows when packed: padding costs nothing there, steps would be lacking.
        (SINGLE, {"packing_efficiency": 0.2, "rows": 120, "rows_of_epochs": (120,)}),
        ({}, {"evaluation": {"long": source(examples=3, loss_tokens=90_000)}}),
        ({}, {"sources": {"a": source(rejected=100)}}),
    ],
)
def test_what_is_harmless_is_not_warned_of(settings, changes):
    assert list(warnings(config(**settings), plan(**changes))) == []


@pytest.mark.parametrize("packing", [True, False])
@pytest.mark.parametrize("global_batch_size", ["auto", 32])
@pytest.mark.parametrize("count", [1, 9, 40, 300])
def test_whoever_follows_a_warning_has_steps_enough(count, global_batch_size, packing, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    write_records(tmp_path / "a.jsonl", [["How are you?", f"Fine, {index}."] for index in range(count)])
    given = {"train.global_batch_size": global_batch_size, "data.packing": packing}
    asked = with_overrides(data_config(tmp_path, sequence_length=512), given)
    for _ in range(4):
        each = the_set(asked, str(tmp_path / "model"))
        manifest = written(each, str(tmp_path / "model"))
        planned = make_plan(asked, _plan_rows(asked, [each], [], [manifest]), [Node(2.0)])
        lines = [line for line in planned.warnings if "nothing is evaluated" not in line]
        if not lines:
            break
        remedies = re.findall(r"(data\.\w+|train\.\w+)=(\w+)", lines[0].partition(";")[2])
        asked = with_overrides(asked, {key: yaml.safe_load(value) for key, value in remedies})
    assert not lines, "a remedy leads to another warning, again and again"
    assert planned.steps >= 20


def test_an_evaluation_set_that_reads_training_data_is_known_whatever_names_it(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model = str(tmp_path / "model")
    tiny_tokenizer().save_pretrained(model)
    for name, word in (("a", "Fine"), ("other", "Well")):
        write_records(tmp_path / f"{name}.jsonl", [["How are you?", f"{word}, {index}."] for index in range(40)])
    for name in ("copy.jsonl", "more.jsonl"):
        (tmp_path / name).write_bytes((tmp_path / "a.jsonl").read_bytes())
    (tmp_path / "dataset_info.json").write_text('{"listed": {"file_name": "a.jsonl", "formatting": "sharegpt"}}')
    paths = {"same": "a.jsonl", "glob": "[a]*.jsonl", "copy": "copy.jsonl", "several": ["other.jsonl", "more.jsonl"]}
    sources = [{"name": name, "path": path} for name, path in paths.items()] + [{"name": "listed"}]
    sources += [{"name": "other", "path": "other.jsonl"}]
    asked = data_config(tmp_path, holdout=0.1, registry=str(tmp_path), eval=sources)
    trained, held_out = the_set(asked, model, split="train"), the_set(asked, model, split="holdout")
    evaluation = [held_out, *(resolve_shard_set(asked, each, "all", model, False) for each in asked.data.eval)]
    found = _shared_files([trained], evaluation)
    assert {name: where for name, (where, _) in found.items()} == dict.fromkeys([*paths, "listed"], "a")
    assert found["several"] == ("a", "more.jsonl")


def test_warnings_stand_below_the_plan_and_in_its_file():
    warned = plan(warnings=("this is so; do that",))
    assert warned.lines()[-1] == "warning: this is so; do that"
    assert warned.as_dict()["warnings"] == ("this is so; do that",)


@pytest.mark.parametrize(
    ("turns", "told"),
    [
        (
            TurnStatistics(no_end=8),
            "no token ends the assistant's turns, so the model cannot learn to stop; set model.chat_template to ",
        ),
        (
            TurnStatistics(text_ends=7, end_text="End", no_end=1),
            "the assistant's turns end with ordinary text (its last token is 'End')",
        ),
        (
            TurnStatistics(end_tokens={"<|end|>": 6}, text_ends=1, no_end=1),
            "no special token ends 2 of 8 trained turns; set model.chat_template to ",
        ),
        (
            TurnStatistics(end_tokens={"<|end|>": 8}, inner_end_tokens=("<|end|>",)),
            "<|end|> ends the assistant's turns but also occurs inside them",
        ),
        (
            TurnStatistics(truncated=8),
            "every trained turn is truncated before its end, so the model cannot learn to stop; raise ",
        ),
        (
            TurnStatistics(end_tokens={"<|end|>": 8}, prompt_only="<think>\n"),
            "the generation prompt ends with '<think>\\n', but no trained turn ",
        ),
        (
            TurnStatistics(end_tokens={"<|end|>": 8}, turn_only="A:"),
            "the generation prompt opens no turn, but trained turns follow 'A:'",
        ),
    ],
)
def test_turns_that_do_not_end_and_prompts_that_were_not_trained_are_told(turns, told):
    (line,) = warnings(config(), plan(turns=turns))
    assert line.startswith(told)
    assert "; " in line


def test_arguments_of_calls_that_are_encoded_twice_are_told():
    (line,) = warnings(config(), plan(sources={"a": source(counts={"quoted_arguments": 1200})}))
    assert line.startswith("source 'a': 1,200 of 20,000 examples have tool-call arguments as JSON text")
    assert '"{\\"city\\": …}"' in line
    assert line.endswith("; give arguments as objects in the records")


def test_marks_without_images_are_told():
    (line,) = warnings(config(), plan(sources={"a": source(counts={"stray_marks": 1200})}))
    assert line.startswith(
        "source 'a': 1,200 of 20,000 examples have no images, but image placeholders in their text (<image>)"
    )
    assert line.endswith("; name the column of their images with columns: {images: COLUMN}")


def test_nothing_is_said_of_turns_that_end_or_are_none():
    for turns in (
        TurnStatistics(end_tokens={"<|end|>": 8}),
        TurnStatistics(end_tokens={"<|call|>": 1, "<|end|>": 8}, inner_end_tokens=("<|call|>",)),
        TurnStatistics(),
    ):
        assert not list(warnings(config(), plan(turns=turns)))
    assert not list(warnings(config(stage="pt"), plan(stage="pt", turns=TurnStatistics(no_end=8))))


def test_a_run_that_cannot_go_on_from_a_checkpoint_is_told_of():
    without = config(train__optimizer="badam", train__zero_stage=0, model__finetuning="full")
    assert without.train.save_every_minutes == 15, "the default is no error"
    [line] = warnings(without, plan())
    assert line.startswith("no checkpoints are written, because train.optimizer=badam cannot resume")
    assert not list(warnings(config(), plan()))


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"train__asft_alpha": 0.5}, "train.asft_alpha=0.5 has no effect with train.loss=cross_entropy … asft"),
        (
            {"train__loss": "asft", "train__eaft_alpha": 2},
            "train.eaft_alpha=2 has no effect with train.loss=asft … eaft",
        ),
        (
            {"train__schedule": "constant", "train__warmup_steps": 100},
            "train.warmup_steps=100 has no effect with train.schedule=constant … constant_with_warmup",
        ),
        ({"train__schedule": "constant", "train__warmup_ratio": 0.1}, "train.warmup_ratio=0.1 has no effect"),
        ({"train__schedule": "constant"}, None),
        ({"train__schedule": "constant", "train__warmup_steps": 0}, None),
        ({"train__loss": "asft", "train__asft_alpha": 0.5, "train__warmup_steps": 5}, None),
    ],
)
def test_a_setting_that_does_nothing_beside_others_is_told(settings, told):
    lines = list(warnings(config(**settings), plan()))
    assert [holds(line, told) for line in lines] == [True] * (told is not None)
