"""``raysft report RUN RUN``: what differs between runs, and which differences are larger than chance."""

from __future__ import annotations

import json
import os
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from raysft.cli import main
from raysft.generate.metrics import BUILTIN_METRICS, MetricRow, paired, write_metrics
from raysft.generate.metrics.paired import paired_intervals
from raysft.report.run_differences import differences
from raysft.report.run_metrics import metric_tables
from raysft.report.runs import read_runs
from raysft.report.runs_page import compare_runs
from raysft.storage.json_files import read_jsonl, write_jsonl
from raysft.storage.path import StoragePath
from raysft.storage.run_directory import RunDirectory
from tests.messages import holds
from tests.objects import s3_server
from tests.unit.test_report import make_run
from tests.unit.test_report_page import HOSTILE, Page, assert_nothing_from_elsewhere


def named_run(folder: Path, name: str, **overrides: Any) -> RunDirectory:
    (folder / name).mkdir()
    return make_run(folder / name, run__name=name, generate__metrics=["exact_match"], **overrides)


def answer(run: RunDirectory, right: list[bool], interval: tuple[float, float], ids: str = "chats") -> None:
    """Predictions that are right or wrong, and their exact match with an interval."""
    rows = [
        {"id": f"{ids}/{n}", "prompt": f"Question {n}?", "label": f"yes {n}", "predict": f"{'yes' if r else 'no'} {n}"}
        for n, r in enumerate(right)
    ]
    write_jsonl(run.predictions, [row | {"source": "chats"} for row in rows])
    share = sum(right) / len(right)
    write_metrics(run, [MetricRow("exact_match", None, "trained", share, *interval, "fraction", True)])


def compared(capsys, tmp_path: Path, *runs: RunDirectory) -> tuple[Page, str]:
    output = tmp_path / "page.html"
    assert main(["report", *(str(run.path) for run in runs), "--output", str(output)]) == 0
    return Page(output), capsys.readouterr().out


def test_the_page_holds_settings_curves_metrics_and_predictions_of_all_runs(tmp_path: Path, capsys):
    runs = [
        named_run(tmp_path, f"rate{rate:g}", steps=40, names=("chats", "poems"), train__learning_rate=rate, run__seed=7)
        for rate in (1e-4, 2e-4, 4e-4)
    ]
    for place, run in enumerate(runs):
        answer(run, [n % (place + 2) == 0 for n in range(60)], (0.1, 0.6))
    rendered, text = compared(capsys, tmp_path, *runs)
    assert_nothing_from_elsewhere(rendered)
    titles = [attrs["aria-label"] for tag, attrs in rendered.tags if tag == "svg"]
    assert titles[:4:2] == ["Training loss, nats per token", "Evaluation loss, nats per token"]
    curves = rendered.html.split('aria-label="Evaluation loss, nats per token"')[1].split("</svg>")[0]
    assert [f'"line c{color}"' in curves for color in range(4)] == [True, True, True, False]
    assert "train.learning_raterate0.00010.0001rate0.00020.0002rate0.00040.0004" in rendered.text.replace(" ", "")
    assert "run.seed" not in rendered.text, "it is the same in all runs"
    assert "60 prompts are shared by all 3 runs" in rendered.text
    assert "yes 59" in rendered.text or "no 59" in rendered.text or rendered.text.count("Question") >= 20
    assert str(tmp_path / "page.html") in text
    assert "50.0%" in text
    assert "33.3%" in text


def test_only_settings_that_differ_are_shown_and_sources_keep_their_names(tmp_path: Path):
    two = [{"name": "new", "path": "n.jsonl"}, {"name": "chats", "path": "chats.jsonl"}]
    runs = [named_run(tmp_path, "one"), named_run(tmp_path, "two", data__train=two, train__epochs=9)]
    found = dict(differences(read_runs(runs)))
    assert found["train.epochs"][1] == "9"
    assert found["data.train.new.path"] == ["–", '"n.jsonl"']
    assert not any(key.startswith(("data.train.chats", "run.name", "run.storage")) for key in found)


def test_a_difference_on_the_same_prompts_is_found_although_the_intervals_overlap(tmp_path: Path, capsys):
    chance = random.Random(0)
    base = [chance.random() < 0.5 for _ in range(400)]
    better = [right or chance.random() < 0.1 for right in base]
    one, two = named_run(tmp_path, "one"), named_run(tmp_path, "two")
    shares = [sum(right) / 400 for right in (base, better)]
    ends = [(share - 0.049, share + 0.049) for share in shares]
    assert ends[0][1] > ends[1][0], "the intervals overlap"
    answer(one, base, ends[0])
    answer(two, better, ends[1])
    rendered, text = compared(capsys, tmp_path, one, two)
    assert "✱ if the 95% interval of the difference (paired bootstrap) does not contain 0" in rendered.text
    assert f"{100 * shares[1]:.1f}% *" in text
    answer(two, better, ends[1], ids="others")
    rendered, text = compared(capsys, tmp_path, one, two)
    assert "paired bootstrap" not in rendered.text
    assert "its predictions are for other prompts than those of one" in rendered.text
    assert f"{100 * shares[1]:.1f}%" in text
    assert f"{100 * shares[1]:.1f}% *" not in text


def test_differences_are_judged_on_the_prompts_that_have_a_reference(tmp_path: Path):
    """Metrics skip the others."""
    one, two = named_run(tmp_path, "one"), named_run(tmp_path, "two")
    for run in (one, two):
        answer(run, [True, False, True], (0.4, 0.6))
        rows = [
            *read_jsonl(run.predictions),
            {"id": "chats/9", "prompt": "Why?", "label": "", "predict": run.path.name},
        ]
        write_jsonl(run.predictions, rows)
    given = []

    def intervals(names, sources, first, others, seed):
        given.append((sources, first, list(others)))
        return iter([{}])

    compare_runs([one, two], tmp_path / "page.html", intervals, print)
    ((sources, first, others),) = given
    assert len(sources) == 3
    assert [references for _, references in (first, *others)] == [["yes 0", "yes 1", "yes 2"]] * 2
    assert "Why?" in Page(tmp_path / "page.html").text, "it is shown beside the others"


@pytest.mark.parametrize(("interval", "differs"), [((0.7, 0.9), True), ((0.55, 0.9), False)])
def test_without_the_same_prompts_intervals_decide(tmp_path: Path, interval, differs):
    one, two = named_run(tmp_path, "one"), named_run(tmp_path, "two")
    answer(one, [True, False], (0.4, 0.6))
    answer(two, [True, True], interval)
    table = metric_tables(read_runs([one, two]), {})[0]
    cell = dict(zip(table.metrics, table.rows[1][1], strict=True))["exact match"]
    assert cell is not None
    assert (cell.test, cell.differs, cell.better, cell.best) == ("intervals", differs, True, True)
    loss = dict(zip(table.metrics, table.rows[1][1], strict=True))["evaluation loss"]
    assert loss is not None
    assert (loss.test, loss.differs) == ("", None), "a loss has no interval"


def test_paired_intervals_agree_with_the_normal_approximation():
    chance = np.random.default_rng(0)
    base = chance.random(2000) < 0.5
    other = np.where(chance.random(2000) < 0.8, base, chance.random(2000) < 0.7)
    labels = ["yes"] * 2000
    texts = [["yes" if right else "no" for right in side] for side in (base, other)]
    sources = ["a"] * 1000 + ["b"] * 1000
    (found,) = paired_intervals(
        ["exact_match", "of/another/author"], sources, (texts[0], labels), [(texts[1], labels)], 0
    )
    for source, part in {"": slice(None), "a": slice(1000), "b": slice(1000, None)}.items():
        difference = other[part].astype(float) - base[part]
        margin = 1.96 * difference.std() / len(difference) ** 0.5
        expected = [difference.mean() - margin, difference.mean() + margin]
        assert found[source, "exact_match"] == pytest.approx(expected, abs=0.15 * margin)
    (same,) = paired_intervals(["exact_match"], sources, (texts[0], labels), [(texts[0], labels)], 0)
    assert set(same.values()) == {(0.0, 0.0)}


def test_all_cores_find_the_intervals_that_one_finds(monkeypatch):
    chance = random.Random(0)
    words = ["the", "sea", "was", "blue", "and", "北京", "is", "far", "away"]
    first, second, labels = ([" ".join(chance.choices(words, k=chance.randrange(9))) for _ in range(50)] for _ in "abc")
    arguments = (list(BUILTIN_METRICS), ["one", "two"] * 25, (first, labels), [(second, labels)], 0)
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: range(3))
    (alone,) = paired_intervals(*arguments)
    monkeypatch.setattr(paired, "PARALLEL_FROM", 10)
    (together,) = paired_intervals(*arguments)
    assert together == alone
    assert len(alone) == 3 * 12, "of all sources together, and of each of two"


def test_what_a_run_lacks_is_left_out_and_said(tmp_path: Path, capsys):
    whole, torn, young = (named_run(tmp_path, name, steps=20) for name in ("whole", "torn", "young"))
    answer(whole, [True, False], (0.1, 0.9))
    answer(torn, [True, False], (0.1, 0.9))
    torn.metrics.write_text('{"metric": \n', encoding="utf-8")
    with torn.predictions.open("a") as file:
        file.write("]\n")
    for path in (young.results("train"), young.results("eval")):
        path.unlink()
    lines = young.trainer_log.read_text().splitlines(keepends=True)
    young.trainer_log.write_text("".join(lines[:9]) + lines[9][:30])
    rendered, text = compared(capsys, tmp_path, whole, torn, young)
    for part in (
        f"torn: {torn.metrics}:1: invalid JSON",
        f"{torn.predictions}:3: invalid JSON",
        "young: Training has reached step 7 of 20; no final evaluation, so that of step 5 stands for it",
        "no metrics of generated text",
    ):
        assert part in rendered.text
        assert part in " ".join(text.split())
    assert "shared by the 2 runs that have predictions" in rendered.text
    young.trainer_log.unlink()
    rendered, _ = compared(capsys, tmp_path, young, whole)
    assert (
        "young: No training step has been logged yet; no training step, so no training loss; no evaluation"
        in rendered.text
    )


def test_runs_without_any_result_have_a_page(tmp_path: Path, capsys):
    runs = [named_run(tmp_path, name) for name in ("one", "two")]
    for run in runs:
        for path in run.path.iterdir():
            if path.name != "config.yaml":
                path.unlink()
    runs[1].config.write_text("[")
    rendered, text = compared(capsys, tmp_path, *runs)
    assert "svg" not in {tag for tag, _ in rendered.tags}
    assert "config.yaml:1: not a YAML mapping" in rendered.text
    assert "No results yet" in text


def test_what_runs_hold_stays_text(tmp_path: Path, capsys):
    runs = [named_run(tmp_path, name) for name in ("one", "two")]
    for run in runs:
        answer(run, [True, False], (0.1, 0.9))
        rows = [json.loads(line) for line in run.predictions.read_text().splitlines()]
        texts = dict.fromkeys(("id", "prompt", "label", "source"), HOSTILE)
        write_jsonl(run.predictions, [row | texts | {"predict": f"{HOSTILE} {run.path}"} for row in rows])
        run.config.write_text(json.dumps({"run": {"name": HOSTILE}, HOSTILE: {HOSTILE: f"{HOSTILE} {run.path}"}}))
    rendered, _ = compared(capsys, tmp_path, *runs)
    assert not {tag for tag, _ in rendered.tags} & {"script", "img"}
    assert HOSTILE in "".join(rendered.texts)


def test_many_runs_with_many_predictions_stay_small(tmp_path: Path, capsys):
    runs = [named_run(tmp_path, f"run{number}", steps=500) for number in range(12)]
    for run in runs:
        answer(run, [random.random() < 0.5 for _ in range(2000)], (0.4, 0.6))
    rendered, _ = compared(capsys, tmp_path, *runs)
    assert len(rendered.html) < 2_000_000
    assert sum(tag == "article" for tag, _ in rendered.tags) == 20
    assert {"key k0", "key k0 dash"} <= {
        str(attrs.get("class")).strip() for tag, attrs in rendered.tags if tag == "span"
    }


def test_runs_of_one_name_are_told_apart_by_their_paths(tmp_path: Path):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
    runs = read_runs([make_run(tmp_path / name) for name in ("a", "b")])
    assert [run.label for run in runs] == ["a/toy", "b/toy"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["{one}", "{one}/../one"], "named 2 times; name every run once"),
        (["{one}", "{none}"], "no such folder; pass the folder"),
        (["{one}", "{empty}"], "not a run directory (no config.yaml); pass"),
        (["{one}", "{sweep}"], "a sweep, not a run; report it alone, or name the runs in … trials"),
        (["{one}", "{two}", "--output", "{empty}"], "--output … a folder; name a file"),
        (["{one}", "--output", "x.html"], "--output x.html: the report of one run is written into … second run"),
    ],
)
def test_wrong_requests_are_one_line_and_exit_code_2(tmp_path: Path, capsys, arguments, message):
    (tmp_path / "empty").mkdir()
    paths = {name: make_run(_made(tmp_path / f"{name}_")).path for name in ("one", "two", "sweep")}
    (paths["sweep"] / "trials.jsonl").write_text("")
    paths |= {name: tmp_path / name for name in ("none", "empty")}
    for name, path in list(paths.items()):
        if name == "one":
            paths[name] = path.rename(path.with_name("one"))
    assert main(["report", *(argument.format(**paths) for argument in arguments)]) == 2
    assert holds(capsys.readouterr().err.rstrip("\n"), f"raysft: error: … {message}")


def _made(folder: Path) -> Path:
    folder.mkdir()
    return folder


def test_runs_in_an_object_store_are_compared_with_local_ones(tmp_path: Path, capsys):
    local, remote = named_run(tmp_path, "local", steps=20), named_run(tmp_path, "remote", steps=20)
    for run in (local, remote):
        answer(run, [True, False, True], (0.3, 0.9))
    with s3_server() as server:
        place = StoragePath.of(server.uri(f"{tmp_path.name}/remote"))
        place.upload(remote.path)
        output = tmp_path / "page.html"
        assert main(["report", str(local.path), place.location, "--output", str(output)]) == 0
        assert "comparison.html" not in place.entries()
    assert "secret" not in capsys.readouterr().out
    rendered = Page(output)
    assert "3 prompts are shared by all 2 runs" in rendered.text
    assert (
        rendered.html.split('aria-label="Evaluation loss, nats per token"')[1].split("</svg>")[0].count("line c1") == 1
    )
