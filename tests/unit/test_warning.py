"""Warnings: what a person would otherwise find out only by looking at the result."""

from __future__ import annotations

from dataclasses import replace

from raysft.config import Config, parse
from raysft.plan import Plan, SourcePlan
from raysft.warning import warnings


def config(**overrides) -> Config:
    base = parse({"model": {"path": "m"}, "data": {"train": [{"name": "a", "path": "a.jsonl"}]}})
    return base.with_overrides({key.replace("__", "."): value for key, value in overrides.items()})


def source(**changes) -> SourcePlan:
    usual = SourcePlan(
        records=20_000,
        examples=20_000,
        tokens=8_000_000,
        trained_tokens=4_000_000,
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
        rows_per_step=32,
        rows_per_step_chosen=True,
        sequence_length=2048,
        tokens=8_000_000,
        trained_tokens=4_000_000,
        useful=0.98,
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
    )
    return replace(usual, **changes)


def test_nothing_is_said_of_a_usual_run():
    assert list(warnings(config(), plan())) == []


def test_a_run_that_evaluates_nothing_says_how_to_hold_examples_out():
    (line,) = warnings(config(), plan(evaluation={}))
    assert line.startswith("nothing is evaluated")
    assert "data.holdout=0.1" in line


def test_warnings_stand_below_the_plan_and_in_its_file():
    warned = plan(warnings=("this is so; do that",))
    assert warned.lines()[-1] == "warning: this is so; do that"
    assert warned.as_dict()["warnings"] == ("this is so; do that",)
