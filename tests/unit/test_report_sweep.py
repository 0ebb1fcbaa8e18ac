"""``sweep.html``: what a sweep recorded, with none, few and hundreds of trials."""

from __future__ import annotations

import json
import math
import random
import re
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from raysft.cli import main
from raysft.config import parse
from raysft.report.axes import Axis
from raysft.report.importance import importances
from raysft.report.sweep import read_sweep
from raysft.report.sweep_page import write_sweep_page
from raysft.storage.json_files import write_jsonl
from raysft.storage.path import StoragePath
from raysft.storage.run_directory import RunDirectory
from raysft.tune.record import Record, TrialRecord
from raysft.tune.results import rank, write_results
from tests.messages import holds
from tests.objects import s3_server
from tests.unit.test_report_page import HOSTILE, Page, assert_nothing_from_elsewhere

SPACE = {
    "train.learning_rate": {"loguniform": [1e-5, 1e-2]},
    "model.lora.rank": [8, 16, 32],
    "train.lr_scheduler_type": {"choice": ["cosine", "linear"]},
}


class Sweep:
    """A sweep of which every line is written as a real one writes it."""

    def __init__(self, folder: Path, **tune: Any) -> None:
        self.directory = RunDirectory(folder / "sweep")
        (self.directory.path / "trials").mkdir(parents=True)
        given = {"search": "random", "num_samples": 400, "space": SPACE} | tune
        data = {"train": [{"name": "a", "path": "a.jsonl"}]}
        self.config = parse({"run": {"name": "rates"}, "model": {"path": "m"}, "data": data, "tune": given})
        self.directory.config.write_text(self.config.to_yaml(), encoding="utf-8")
        self.record = Record(self.directory.path / "trials.jsonl")
        self.chance = random.Random(0)
        self.count = 0

    def trial(
        self, loss: float, steps: int = 40, seed: int = 0, configuration: str = "", **changes: Any
    ) -> TrialRecord:
        """Record a trial that starts and ends, with an evaluation every 10 steps that comes down to its loss."""
        number = self.count
        self.count += 1
        values = {
            "train.learning_rate": 10 ** self.chance.uniform(-5, -2),
            "model.lora.rank": self.chance.choice([8, 16, 32]),
            "train.lr_scheduler_type": self.chance.choice(["cosine", "linear"]),
        }
        values = changes.pop("values", values)
        name = f"trial-{number}"
        begun = self.record.append(
            TrialRecord(name, number, configuration or name, values, seed, started=1000.0 + 60 * number)
        )
        run = RunDirectory(self.directory.path / "trials" / name)
        run.path.mkdir()
        losses = {step: loss + (3 - loss) * math.exp(-step / 10) * (step < steps) for step in range(0, steps + 1, 10)}
        write_jsonl(
            run.trainer_log, [{"current_steps": s, "total_steps": 40, "eval_loss": v} for s, v in losses.items()]
        )
        done = {"state": "done", "step": steps, "metrics": {"eval_loss": loss}, "ended": begun.started + 90}
        return self.record.update(begun, **(done | changes))

    def end(self) -> None:
        """What the sweep writes at its end."""
        records = self.record.read()
        write_results(self.directory.path, self.config, records, rank(self.config, records))

    def page(self) -> Page:
        path = write_sweep_page(self.directory)
        assert path == self.directory.path / "sweep.html"
        return Page(path)


def drawing(rendered: Page, title: str) -> str:
    """The SVG that has a title."""
    return rendered.html.split(f'aria-label="{title}"')[1].split("</svg>")[0]


def test_a_finished_sweep_shows_its_results_settings_and_trials(tmp_path: Path, capsys):
    sweep = Sweep(tmp_path)
    for loss in (1.5, 1.4, 1.45):
        sweep.trial(loss)
    best = sweep.record.read()["trial-1"]
    sweep.trial(2.0, 20, state="stopped")
    sweep.trial(3.0, 0, state="failed", reason="loss is not finite; lower it", metrics={}, step=None)
    (sweep.directory.path / "trials" / "trial-1" / "report.html").write_text("x")
    sweep.end()
    assert main(["report", str(sweep.directory.path)]) == 0
    text = capsys.readouterr().out
    assert "5 trials, 3 done, 1 stopped, 1 failed" in text
    assert "best: eval_loss 1.4 |" in text
    assert str(sweep.directory.path / "sweep.html") in text
    rendered = Page(sweep.directory.path / "sweep.html")
    assert_nothing_from_elsewhere(rendered)
    for part in (
        "rates Sweep of m · random search · 5 configurations · best: lowest eval_loss",
        "3 done, 1 stopped, 1 failed",
        "loguniform 1e-05 to 0.01",
        "8, 16, 32",
        "With one seed each, the best may be better than the second best (eval_loss 1.45) by chance alone",
        "loss is not finite; lower it",
        "Left out: it needs 12 finished configurations, but there are 4",
    ):
        assert part in rendered.text
    assert f'train.learning_rate</td><td class="n">{best.values["train.learning_rate"]:.4g}' in rendered.html
    links = [attrs["href"] for tag, attrs in rendered.tags if tag == "a" and not attrs["href"].startswith("#")]
    assert links == ["trials/trial-1/report.html"]
    assert drawing(rendered, "eval_loss by trial").count("<circle") == 4
    curves = drawing(rendered, "eval_loss by step")
    assert curves.count('<path class="line') == 5
    order = [int(n) for n in re.findall(r'<td class="n" title="trial-(\d)">', rendered.html)]
    assert order == [1, 2, 0, 3, 4], "the best first, those without a result last"


def test_a_stopped_trial_ends_where_it_stopped(tmp_path: Path):
    sweep = Sweep(tmp_path)
    sweep.trial(1.5, 40)
    sweep.trial(2.0, 20, state="stopped")
    curves = drawing(sweep.page(), "eval_loss by step")
    ends = [float(path.split("L")[-1].split()[0]) for path in re.findall(r'class="line [^"]*" d="M([^"]*)"', curves)]
    left, right = 52, 940 - 18
    assert sorted(ends) == pytest.approx([(left + right) / 2, right], abs=0.1)


@pytest.mark.parametrize(
    ("second", "sentence"),
    [([1.45, 1.55], "cannot be told apart"), ([1.9, 1.91], "can be told apart")],
)
def test_repeats_have_a_mean_a_spread_and_the_verdict_of_the_sweep(tmp_path: Path, second, sentence):
    sweep = Sweep(tmp_path, repeats=2)
    for configuration, losses in (("a", [1.4, 1.44]), ("b", second)):
        values = {"train.learning_rate": 1e-4 if configuration == "a" else 1e-3}
        for seed, loss in enumerate(losses):
            sweep.trial(loss, seed=seed, configuration=configuration, values=values)
    assert "told apart" not in sweep.page().text, "only the sweep's own verdict is shown"
    sweep.end()
    rendered = sweep.page()
    # By hand: the mean of 1.40 and 1.44 is 1.42, their standard deviation 0.04 / √2 = 0.02828.
    assert "best eval_loss1.42± 0.02828 over 2 seeds" in rendered.text
    assert f"The best {sentence} from the second best" in rendered.text
    chart = drawing(rendered, "eval_loss by train.learning_rate")
    assert chart.count("<circle") == 2
    top, bottom = map(float, re.findall(r'bar-line c1[^"]*" d="M[\d.]+ ([\d.]+)V([\d.]+)"', chart)[0])
    marks = [(float(y), float(v)) for y, v in re.findall(r'<text class="y"[^>]* y="([\d.]+)">([\d.]+)<', chart)]
    (y1, v1), (y2, v2) = marks[0], marks[-1]
    assert (bottom - top) * abs((v1 - v2) / (y1 - y2)) == pytest.approx(2 * 0.02828, rel=0.03)


def test_several_metrics_have_the_front_that_the_sweep_recorded(tmp_path: Path):
    sweep = Sweep(tmp_path, search="optuna", metric=["eval_loss", "speed"], mode=["min", "max"])
    for loss, speed in ((1.4, 10.0), (1.5, 30.0), (1.6, 20.0)):
        sweep.trial(loss, metrics={"eval_loss": loss, "speed": speed})
    assert "is marked when the sweep has ended" in sweep.page().text
    sweep.end()
    rendered = sweep.page()
    chart = drawing(rendered, "speed by eval_loss")
    assert chart.count('class="c1 top"') == 2, "1.6 at 20 is worse than 1.5 at 30 in both"
    assert chart.count('class="c0 faint"') == 1
    assert "lowest eval_loss, highest speed" in rendered.text
    assert "2 configurations are on the Pareto front; best.yaml has the one with the best eval_loss" in rendered.text


def test_the_value_that_made_a_trial_fail_does_not_stretch_the_axes(tmp_path: Path):
    sweep = Sweep(tmp_path)
    for rate, state in ((1e-3, "done"), (1e-2, "done"), (1e30, "failed")):
        metrics = {"eval_loss": 2 - rate} if state == "done" else {}
        sweep.trial(1.0, metrics=metrics, state=state, values={"train.learning_rate": rate})
    axis = read_sweep(sweep.directory).axis("train.learning_rate")
    assert axis.place(1e-2) - axis.place(1e-3) > 0.8


def test_a_trial_with_one_evaluation_is_a_point_among_many_curves(tmp_path: Path):
    sweep = Sweep(tmp_path)
    for number in range(12):
        sweep.trial(1.4 + number, 40 if number else 9)
    curves = drawing(sweep.page(), "eval_loss by step")
    assert curves.count("<circle") == 1


def test_the_lineage_of_a_population_is_drawn_and_told(tmp_path: Path):
    sweep = Sweep(tmp_path)
    first = sweep.trial(1.4)
    for loss in (1.5, 1.6):
        sweep.trial(loss)
    assert "Lineage" not in sweep.page().text
    other = sweep.record.read()["trial-2"]
    for step, parent in ((10, "trial-1"), (20, first.trial), (20, first.trial)):
        other = sweep.record.update(other, parent={"trial": parent, "step": step}, state="running")
    sweep.record.update(other, state="done")
    rendered = sweep.page()
    events = ["step 10: trial 2 continued from trial 1", "step 20: trial 2 continued from trial 0"]
    assert re.findall(r"<li>(.*?)</li>", rendered.html) == events
    assert drawing(rendered, "Lineage").count('class="line thin c2"') == 2


@pytest.mark.parametrize("trials", [12, 60])
def test_importance_finds_the_setting_that_matters(tmp_path: Path, monkeypatch, trials: int):
    sweep = Sweep(tmp_path)
    for _ in range(trials):
        begun = sweep.trial(2.0)
        rate = math.log10(begun.values["train.learning_rate"])
        loss = 1 + (rate + 3.5) ** 2 + sweep.chance.gauss(0, 0.01)
        sweep.record.update(begun, metrics={"eval_loss": loss})
    read = read_sweep(sweep.directory)
    monkeypatch.setitem(sys.modules, "optuna", None)
    assert importances(read) == ([], "needs Optuna; install it with pip install 'raysft[tune]'")
    monkeypatch.undo()
    pytest.importorskip("optuna")
    (first, *others), reason = importances(read)
    assert (first[0], reason) == ("train.learning_rate", "")
    assert first[1] > (5 if trials == 60 else 2) * max(share for _, share in others)
    assert first[1] + sum(share for _, share in others) == pytest.approx(1)


def test_nothing_finished_yet_still_makes_a_page(tmp_path: Path, capsys):
    sweep = Sweep(tmp_path)
    (sweep.directory.path / "trials.jsonl").write_text("")
    assert "No trial has started yet" in sweep.page().text
    sweep.trial(1.0, 10, state="running", metrics={}, step=None, ended=None)
    sweep.trial(1.0, 0, state="failed", reason="out of memory", metrics={})
    with (sweep.directory.path / "trials.jsonl").open("a") as file:
        file.write('{"trial": "half')
    rendered = sweep.page()
    assert "No trial has finished with a result yet" in rendered.text
    assert "1 running, 1 failed" in rendered.text
    assert "out of memory" in rendered.text
    assert [attrs["aria-label"] for tag, attrs in rendered.tags if tag == "svg"] == ["eval_loss by step"] * 2


def test_hundreds_of_trials_stay_small(tmp_path: Path):
    sweep = Sweep(tmp_path)
    for number in range(600):
        sweep.trial(
            1.4 + sweep.chance.random() ** 2, 40 if number % 3 else 10, state="done" if number % 3 else "stopped"
        )
    rendered = sweep.page()
    assert len(rendered.html) < 1_500_000
    assert sum("title" in attrs and tag == "td" for tag, attrs in rendered.tags) == 600
    assert "200 configurations that are not among the best; the table lists them all" in rendered.text
    assert drawing(rendered, "Parallel coordinates").count('<path class="line') == 400


def test_one_diverged_trial_does_not_flatten_the_others(tmp_path: Path):
    sweep = Sweep(tmp_path)
    for number in range(12):
        sweep.trial(1.4 + 0.01 * number)
    sweep.trial(900.0)
    axis = read_sweep(sweep.directory).result_axis
    assert axis.high < 2
    assert axis.low < 1.4
    rendered = sweep.page()
    assert "▲ worse than the axis shows: 1" in rendered.text
    assert "eval_loss 900" in drawing(rendered, "eval_loss by trial")
    flipped = Axis.of_results([-900.0, *(0.01 * number for number in range(12))], lowest_is_best=False)
    assert flipped.low > -1
    assert flipped.beyond(-900)


@pytest.mark.parametrize(
    ("values", "log", "categories"),
    [
        ([1e-5, 1e-3], True, ()),
        ([0.0, 0.1], False, ()),
        ([2, 4], False, ()),
        (["b", "a", "b"], False, ("a", "b")),
        ([None, 1.0], False, ("1.0", "null")),
        ([True, False], False, ("false", "true")),
        ([[1, 2], [3]], False, ("[1, 2]", "[3]")),
    ],
)
def test_an_axis_follows_its_values(values: list[Any], log: bool, categories: tuple[str, ...]):
    axis = Axis.of(values)
    assert (axis.log, axis.categories) == (log, categories)
    places = [axis.place(value) for value in values]
    assert all(0 < place < 1 for place in places)
    if log:
        assert axis.place(1e-4) == pytest.approx(0.5)
    assert axis.marks(5)


def test_what_a_record_holds_stays_text(tmp_path: Path):
    sweep = Sweep(tmp_path)
    for loss in (1.4, 1.5):
        sweep.trial(loss, values={HOSTILE: HOSTILE + str(loss)}, reason=HOSTILE)
    config = yaml.safe_load(sweep.directory.config.read_text())
    config["run"]["name"] = config["model"]["path"] = HOSTILE
    config["tune"]["space"] = {HOSTILE: [HOSTILE]}
    sweep.directory.config.write_text(yaml.safe_dump(config))
    rendered = sweep.page()
    assert not {tag for tag, _ in rendered.tags} & {"script", "img"}
    assert HOSTILE in "".join(rendered.texts)


def test_a_corrupt_log_of_a_trial_is_left_out_and_said_and_a_corrupt_record_is_an_error(tmp_path: Path, capsys):
    sweep = Sweep(tmp_path)
    for loss in (1.4, 1.5):
        sweep.trial(loss)
    log = sweep.directory.path / "trials" / "trial-0" / "trainer_log.jsonl"
    log.write_text("[]\n")
    rendered = sweep.page()
    assert f"{log}:1: not a JSON object" in rendered.text
    assert drawing(rendered, "eval_loss by step").count('<path class="line') == 1
    (sweep.directory.path / "trials.jsonl").write_text("{\n")
    assert main(["report", str(sweep.directory.path)]) == 2
    error = capsys.readouterr().err.rstrip("\n")
    assert holds(
        error, f"raysft: error: {sweep.directory.path}/trials.jsonl:1: invalid JSON … then run raysft report again"
    )


def test_a_record_does_not_lead_out_of_its_folder(tmp_path: Path):
    sweep = Sweep(tmp_path)
    (tmp_path / "report.html").write_text("x")
    line = {"trial": "../../../", "number": 0, "state": "done", "metrics": {"eval_loss": 1.0}, "values": {}}
    (sweep.directory.path / "trials.jsonl").write_text(json.dumps(line) + "\n")
    assert not [attrs for tag, attrs in sweep.page().tags if tag == "a" and not attrs["href"].startswith("#")]


def test_a_sweep_in_an_object_store_has_its_curves_and_gets_its_page(tmp_path: Path, capsys):
    sweep = Sweep(tmp_path)
    for loss in (1.4, 1.5):
        sweep.trial(loss)
    (sweep.directory.path / "trials" / "trial-1" / "report.html").write_text("x")
    with s3_server() as server:
        place = StoragePath.of(server.uri(f"{tmp_path.name}/sweep"))
        place.upload(sweep.directory.path)
        assert main(["report", str(place.location)]) == 0
        (tmp_path / "page.html").write_text((place / "sweep.html").read_text())
        assert "sweep.html" in capsys.readouterr().out
    rendered = Page(tmp_path / "page.html")
    assert drawing(rendered, "eval_loss by step").count('<path class="line') == 2
    assert 'href="trials/trial-1/report.html"' in rendered.html
