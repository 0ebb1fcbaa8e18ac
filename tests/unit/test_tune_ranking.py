"""How configurations are ranked, what of their differences is noise, and what a sweep records."""

from __future__ import annotations

import csv
import json
import math
from dataclasses import replace

import pytest

from raysft.config import load, parse
from raysft.tune.metrics import check_directions
from raysft.tune.ranking import Objectives, Ranked, indistinguishable, ranked, welch_test
from raysft.tune.record import Record, TrialRecord
from raysft.tune.results import check_recorded, print_ranking, rank, write_best, write_results
from tests.messages import holds, refusal


def config(**tune):
    data = {"train": [{"name": "a", "path": "a.jsonl"}]}
    return parse({"run": {"name": "s"}, "model": {"path": "m"}, "data": data, "tune": tune})


def record(name: str, metrics: dict, seed: int = 0, configuration: str = "", **changes) -> TrialRecord:
    values = {"train.learning_rate": float(ord((configuration or name)[0]))}
    found = TrialRecord(name, ord(name[0]), configuration or name, values, seed, "done", 4, metrics, "", 10.0, 12.5)
    return replace(found, **changes)


def test_the_t_test_gives_the_tabulated_critical_values():
    """With equal sizes and variances Welch's test is Student's with 2n - 2 degrees of freedom: t = 2.776 for 4, 2.306 for 8."""
    for values, critical in (([-1.0, 0.0, 1.0], 2.776445), ([-2.0, -1.0, 0.0, 1.0, 2.0], 2.306004)):
        variance = sum(value**2 for value in values) / (len(values) - 1)
        shift = critical * math.sqrt(2 * variance / len(values))
        assert welch_test(values, [value + shift for value in values]) == pytest.approx(0.05, abs=1e-6)


def test_the_t_test_is_the_integral_of_its_density_for_unequal_sizes_and_variances():
    first, second = [1.0, 2.0, 4.0], [2.0, 9.0, 5.0, 6.0, 11.0, 3.0]
    # By hand: means 7/3 and 6, variances 7/3 and 12, so shares 7/9 and 2.
    t = (6 - 7 / 3) / math.sqrt(7 / 9 + 2)
    freedom = (7 / 9 + 2) ** 2 / ((7 / 9) ** 2 / 2 + 2**2 / 5)

    def density(x: float) -> float:
        scale = math.gamma((freedom + 1) / 2) / (math.sqrt(freedom * math.pi) * math.gamma(freedom / 2))
        return scale * (1 + x * x / freedom) ** (-(freedom + 1) / 2)

    steps = 2000
    inside = sum(density((index + 0.5) * t / steps) for index in range(steps)) * t / steps
    assert welch_test(first, second) == pytest.approx(1 - 2 * inside, abs=1e-6)
    assert welch_test(second, first) == pytest.approx(welch_test(first, second))


def test_samples_without_variance_differ_or_are_equal_and_one_value_tells_nothing():
    assert welch_test([1.0, 1.0], [1.0, 1.0]) == 1
    assert welch_test([1.0, 1.0], [2.0, 2.0]) == 0
    assert welch_test([1.0], [2.0, 2.0]) is None


def test_configurations_are_ranked_by_the_mean_of_their_seeds():
    found = rank(
        config(repeats=2),
        {
            r.trial: r
            for r in (
                record("a", {"eval_loss": 1.0}),
                record("a1", {"eval_loss": 3.0}, 1, "a"),
                record("b", {"eval_loss": 1.5}),
                record("b1", {"eval_loss": 1.7}, 1, "b"),
                record("c", {"eval_loss": math.nan}),
                record("d", {"eval_loss": 0.1}, state="failed"),
                record("e", {"eval_loss": 0.2}, state="running"),
            )
        },
    )
    assert [one.configuration for one in found] == ["b", "a"]
    assert found[0].means == pytest.approx((1.6,))
    assert found[0].deviations == pytest.approx((math.sqrt(0.02),))
    assert indistinguishable(*found)


def test_the_front_is_what_nothing_beats_in_all_metrics():
    objectives = Objectives.of(config(metric=["eval_loss", "predict_bleu"], mode=["min", "max"]).tune)
    points = {"a": (1.0, 5.0), "b": (2.0, 9.0), "c": (2.0, 4.0), "d": (1.0, 5.0), "e": (3.0, 9.0)}
    found = ranked([Ranked(name, {}, (name,), (point,)) for name, point in points.items()], objectives)
    assert {one.configuration for one in found if one.on_front} == {"a", "b", "d"}
    assert [one.configuration for one in found] == ["a", "d", "b", "c", "e"]
    assert ranked([Ranked("x", {}, ("x",), ((1.0,),)), Ranked("y", {}, ("y",), ((2.0,),))],
                  Objectives.of(config(mode="max").tune))[0].configuration == "y"  # fmt: skip


class Lines:
    """A terminal that keeps its lines."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def line(self, text: str) -> None:
        self.lines.append(text)


def test_the_front_is_recorded_and_its_best_in_the_first_metric_is_named(tmp_path):
    given = config(metric=["eval_loss", "predict_bleu"], mode=["min", "max"])
    points = {"a": (2.0, 9.0), "b": (1.0, 5.0), "c": (3.0, 4.0)}
    found = [record(name, {"eval_loss": loss, "predict_bleu": bleu}) for name, (loss, bleu) in points.items()]
    records, terminal = {one.trial: one for one in found}, Lines()
    ranking = rank(given, records)
    write_results(tmp_path, given, records, ranking)
    results = json.loads((tmp_path / "tune_results.json").read_text())
    assert results["front"] == ["b", "a"]
    assert results["trials"][0] == {"run": "b", "eval_loss": 1.0, "predict_bleu": 5.0, "config": records["b"].values}
    print_ranking(given, ranking, terminal)  # pyright: ignore
    assert [line.endswith("on the Pareto front") for line in terminal.lines] == [True, True, False, False]
    assert holds(terminal.lines[0], "eval_loss 1.0000, predict_bleu 5.0000 | train.learning_rate=98.0 | b")
    assert terminal.lines[-1].endswith("best.yaml (of 2 on the Pareto front, the one with the best eval_loss)")


def test_a_sweep_says_when_its_best_two_cannot_be_told_apart():
    def said(first: list[float], second: list[float]) -> list[str]:
        terminal = Lines()
        names = [f"{name}{index}" for name in "ab" for index in range(len(first))]
        found = [
            record(name, {"eval_loss": value}, configuration=name[0])
            for name, value in zip(names, first + second, strict=True)
        ]
        given = config(repeats=len(first))
        print_ranking(given, rank(given, {one.trial: one for one in found}), terminal)  # pyright: ignore
        return [line for line in terminal.lines if "told apart" in line]

    assert not said([1.0], [1.1])
    (line,) = said([1.0, 1.2], [1.1, 1.4])
    assert holds(
        line, "train.learning_rate=97.0 cannot be told apart from train.learning_rate=98.0 … raise tune.repeats"
    )
    assert not said([1.0, 1.01, 1.02], [2.0, 2.01, 2.02])


def test_the_files_of_a_sweep_have_every_trial_and_the_best_config(tmp_path):
    given = config(space={"train.learning_rate": [97.0, 98.0]}, repeats=2, metric="eval_loss")
    found = [
        record("a", {"eval_loss": 1.0, "epoch": 1}),
        record("a1", {"eval_loss": 2.0}, 1, "a"),
        record("b", {}, state="failed", reason="no memory, at all", ended=None, step=None),
    ]
    records = {one.trial: one for one in found}
    ranking = rank(given, records)
    write_results(tmp_path, given, records, ranking)
    results = json.loads((tmp_path / "tune_results.json").read_text())
    assert [row["run"] for row in results["trials"]] == ["a", "a1"]
    (summary,) = results["configurations"]
    assert (summary["eval_loss"], summary["n"], summary["runs"]) == (1.5, 2, ["a", "a1"])
    assert summary["eval_loss_std"] == pytest.approx(math.sqrt(0.5))
    rows = list(csv.DictReader((tmp_path / "trials.csv").open()))
    assert list(rows[0]) == ["name", "number", "configuration", "state", "train.learning_rate", "seed", "epoch",
                             "eval_loss", "step", "seconds", "reason"]  # fmt: skip
    shown = [(row["name"], row["eval_loss"], row["seconds"]) for row in rows]
    assert shown == [("a", "1.0", "2.5"), ("a1", "2.0", "2.5"), ("b", "", "")]
    assert rows[2]["reason"] == "no memory, at all"
    best = write_best(tmp_path, given, ranking[0])
    assert load(tmp_path / "best.yaml") == best
    assert best == parse({"run": {"name": "s-best"}, "model": {"path": "m"}, "train": {"learning_rate": 97.0},
                          "data": {"train": [{"name": "a", "path": "a.jsonl"}]}})  # fmt: skip


def test_a_metric_that_finished_trials_lack_is_refused():
    records = {"a": record("a", {"eval_loss": 1.0, "epoch": 1.0})}
    check_recorded(config(), records)
    message = refusal(check_recorded, config(metric=["eval_loss", "eval_los"]), records)
    assert holds(message, "tune.metric='eval_los' is not a result of these runs; use one of epoch, eval_loss")


@pytest.mark.parametrize(
    ("tune", "message"),
    [
        ({"metric": ["a", "b"], "mode": ["min"]}, "tune.mode=['min'] has 1 items, but tune.metric has 2"),
        ({"metric": ["a", "a"]}, "tune.metric=['a', 'a'] has a twice"),
    ],
)
def test_metrics_and_modes_that_do_not_match_are_refused(tune, message):
    assert holds(refusal(lambda: Objectives.of(config(**tune).tune)), message)


@pytest.mark.parametrize(
    ("tune", "modes"),
    [
        ({}, ["min"]),
        ({"metric": "predict_chrf"}, ["max"]),
        ({"metric": ["eval_a_accuracy", "train_loss", "best_eval_perplexity"]}, ["max", "min", "min"]),
        ({"metric": ["predict_rouge-l", "eval_loss"], "mode": "min"}, ["min", "min"]),
        ({"metric": "predict_f1", "mode": "max"}, ["max"]),
    ],
)
def test_a_metric_is_best_where_it_is_unless_the_mode_says_otherwise(tune, modes):
    assert Objectives.of(config(**tune).tune).modes == modes


def test_a_metric_without_a_known_direction_needs_a_mode():
    named = config(metric=["eval_loss", "predict_f1"]).tune
    said = refusal(check_directions, named)
    assert holds(
        said, "tune.metric=predict_f1 may be best at its lowest or at its highest, but tune.mode=null; set it to min"
    )
    check_directions(config(metric="predict_f1", mode="max").tune)
    check_directions(config(metric=["eval_accuracy", "predict_chrf"]).tune)


def test_of_a_trial_s_lines_the_last_one_counts_and_a_killed_writer_s_line_is_removed(tmp_path):
    file = Record(tmp_path / "trials.jsonl")
    assert file.read() == {}
    started = file.append(record("b", {}, state="running"))
    file.append(record("a", {}))
    file.update(started, state="failed", reason="é\ud800")
    whole = (tmp_path / "trials.jsonl").read_bytes()
    (tmp_path / "trials.jsonl").write_bytes(whole + b'{"trial": "c", "num')
    assert list(file.read()) == ["a", "b"], "in the order of their numbers"
    assert (file.read()["b"].state, file.read()["b"].started) == ("failed", 10.0)
    file.repair()
    assert (tmp_path / "trials.jsonl").read_bytes() == whole
    file.append(record("c", {}))
    assert list(file.read()) == ["a", "b", "c"]
