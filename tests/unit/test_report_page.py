"""``report.html``: everything is in it, nothing gets out of it, and it stays small."""

from __future__ import annotations

import base64
import io
import json
import math
import random
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from PIL import Image

from raysft.errors import RequestError, StorageFailed
from raysft.report import pictures, report
from raysft.report.charts import small_charts
from raysft.report.curves import Chart, Drawing, Line, thin
from raysft.report.predictions import SHOWN
from raysft.report.read_run import read_run
from raysft.report.text import shortened
from raysft.report.word_diff import marked, word_f1
from raysft.storage.json_files import append_json, read_jsonl, write_json, write_jsonl
from raysft.storage.run_directory import RunDirectory
from tests.unit.test_report import add_predictions, few_pictures, make_run

__all__ = ["few_pictures"]  # a fixture of all tests
VOID = {"meta", "br", "img"}
HOSTILE = "</script><script>alert(1)</script><img src=x onerror=alert(2)>\"'&{{ 7*7 }}"


class Page(HTMLParser):
    """The elements and texts of a page; every one that is opened is closed, in order."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.html = path.read_text(encoding="utf-8")
        self.tags: list[tuple[str, dict[str, Any]]] = []
        self.texts: list[str] = []
        self._open: list[str] = []
        self.feed(self.html)
        self.close()
        assert not self._open
        self.text = " ".join("".join(self.texts).split())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self._open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        if not self._open or self._open[-1] != "style":
            self.texts.append(data)


def page(run: RunDirectory) -> Page:
    report(run)
    return Page(run.page)


def assert_nothing_from_elsewhere(rendered: Page) -> None:
    assert not {tag for tag, _ in rendered.tags} & {"script", "link", "img", "iframe", "object", "base", "form"}
    for _, attrs in rendered.tags:
        for name, value in attrs.items():
            assert not name.startswith("on")
            assert not re.search(r"//|javascript:|data:", value or "") or name == "content"
    style = rendered.html[rendered.html.index("<style>") : rendered.html.index("</style>")]
    assert "url(" not in style
    assert "@import" not in style
    assert "default-src 'none'" in rendered.html


def many_predictions(run: RunDirectory, count: int, length: int = 30) -> None:
    """Predictions of both models that get some of their words right."""
    chance = random.Random(0)
    vocabulary = [f"word{number}" for number in range(500)]
    with run.predictions.open("w") as after, run.base_predictions.open("w") as before:
        for number in range(count):
            words = chance.choices(vocabulary, k=chance.randrange(1, length))
            row = {"id": f"chats/{number}", "prompt": "Go on", "label": " ".join(words), "source": "chats"}
            right = chance.random()
            said = [word if chance.random() < right else "wrong" for word in words]
            row |= {"stop": chance.choice(("eos", "length")), "tokens": len(words)}
            after.write(json.dumps(row | {"predict": " ".join(said)}) + "\n")
            before.write(json.dumps(row | {"predict": "no"}) + "\n")


def test_the_page_holds_what_a_run_came_to(tmp_path: Path):
    run = make_run(tmp_path, steps=30, names=("chats", "poems"))
    add_predictions(run)
    rows = [
        row | {"low": 33.0, "high": 37.0} if (row["metric"], row["model"]) == ("rouge-l", "trained") else row
        for row in read_jsonl(run.metrics)
    ]
    write_jsonl(run.metrics, rows)
    plan = json.loads(run.plan.read_text())
    plan["sources"]["chats"] |= {"records": 4400, "rejected": 79, "counts": {"truncated": 12}}
    write_json(run.plan, plan | {"workers": 2, "cluster_gpus": 2.0})
    reasons = ["9 tokens do not fit", "12 tokens do not fit", "the text has no token"]
    write_jsonl(
        run.rejected, [{"source": "chats", "record": f"a.jsonl:{n}", "reason": r} for n, r in enumerate(reasons)]
    )
    append_json(run.changes, {"changed": {"train.learning_rate": [1e-4, 5e-5]}})
    rendered = page(run)
    for part in (
        "toy Qwen/Qwen3-0.6B · supervised fine-tuning · LoRA adapter, rank 8",
        "2.9000 → 1.4037",
        "17.50 → 35.00",
        "33.00 to 37.00",
        "41,234",
        "Evaluation loss, nats per token",
        "Learning rate",
        "Gradient norm",
        "all sources",
        "5 predictions of the trained model and 5 of the model before training",
        "2chats9 tokens do not fita.jsonl:0a.jsonl:1",
        "Rejected or dropped records: 3",
        "train.learning_rate",
        "learning_rate: 0.0001",
        "torch",
    ):
        assert part in rendered.text
    for label, text in (("records", "4,400"), ("examples", "4,321"), ("rejected", "79"), ("truncated", "12")):
        assert f"<dt>{label}</dt><dd>{text}</dd>" in rendered.html
    titles = [attrs["aria-label"] for tag, attrs in rendered.tags if tag == "svg"]
    assert titles[0] == "Loss, nats per token"
    assert len(titles) >= 8


def test_scores_of_predictions_during_the_training_are_curves(tmp_path: Path):
    run = make_run(tmp_path)
    before = run.metrics.read_text() if run.metrics.exists() else ""
    for step, score in ((5, 12.5), (10, 25.0)):
        scores = {"predict_chrf": score, "predict_chrf_low": score - 1, "predict_chrf_high": score + 1}
        facts = {"predict_examples": 3, "predict_runtime": 1.5, "predict_exact_match": score / 100}
        append_json(run.trainer_log, {"current_steps": step, "total_steps": 20, **scores, **facts})
        append_json(run.metrics, {"metric": "chrf", "source": None, "model": "trained", "value": score, "step": step})
    log = read_run(run)
    assert [record["predict_chrf"] for record in log.generations] == [12.5, 25.0]
    assert len(log.metrics) == len(before.splitlines())
    charts = {
        line.label: list(line.values)
        for drawing in small_charts(log)
        if drawing.chart.title == "Scores of predictions"
        for line in drawing.chart.lines
    }
    assert charts == {"chrF": [12.5, 25.0], "exact match": [0.125, 0.25]}


def test_nothing_of_the_page_comes_from_elsewhere(tmp_path: Path):
    run = make_run(tmp_path)
    add_predictions(run)
    assert_nothing_from_elsewhere(page(run))


def test_whatever_a_file_of_the_run_holds_stays_text(tmp_path: Path):
    run = make_run(tmp_path)
    write_jsonl(run.rejected, [{"source": HOSTILE, "record": HOSTILE, "reason": HOSTILE}])
    append_json(run.changes, {"changed": {HOSTILE: [HOSTILE, {"a": HOSTILE}]}})
    texts = [HOSTILE, "\ud83d half", "a\x00b\x1b[31m\x9b", "שלום \u202eabc", ""]
    rows = [
        {"id": HOSTILE, "prompt": text, "label": other, "predict": text, "source": HOSTILE, "stop": HOSTILE}
        for text in texts
        for other in texts
    ]
    with run.predictions.open("w") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)
    config = yaml.safe_load(run.config.read_text())
    config["run"]["name"] = config["model"]["path"] = HOSTILE
    run.config.write_text(yaml.safe_dump(config))
    log = [json.loads(line) for line in run.trainer_log.read_text().splitlines()]
    write_jsonl(run.trainer_log, [record | {"source_losses": {HOSTILE: 1.0}} for record in log])
    rendered = page(run)
    assert not {tag for tag, _ in rendered.tags} & {"script", "img"}
    assert HOSTILE in "".join(rendered.texts)
    assert "\\ud83d half" in rendered.text
    assert "a␀b␛[31m" in rendered.text
    assert not re.search(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]", rendered.html)


def test_with_many_predictions_the_page_stays_small(tmp_path: Path):
    run = make_run(tmp_path)
    many_predictions(run, 20_000)
    rendered = page(run)
    assert len(rendered.html) < 1_000_000
    assert sum(tag == "article" for tag, _ in rendered.tags) == 3 * SHOWN
    assert "20,000 predictions of the trained model" in rendered.text
    assert "Stop reason" in rendered.text
    scores = [float(score) for score in re.findall(r"word F1 (\d\.\d\d)", rendered.text)]
    assert scores[:SHOWN] == [0.0] * SHOWN
    assert scores[SHOWN : 2 * SHOWN] == [1.0] * SHOWN
    assert len(set(scores[2 * SHOWN :])) > 5, "the random sample has scores of all kinds"


def test_long_texts_and_many_steps_do_not_make_the_page_long(tmp_path: Path):
    run = make_run(tmp_path, steps=30_000, names=())
    row = {"prompt": "'" * 100_000, "label": "' " * 50_000, "predict": "\" ' " * 50_000}
    write_jsonl(run.predictions, [row | {"id": number} for number in range(2 * SHOWN)])
    assert len(page(run).html) < 3_000_000


def test_a_repeated_report_draws_the_same_predictions(tmp_path: Path):
    run = make_run(tmp_path)
    many_predictions(run, 500)
    assert page(run).html == page(run).html


def test_what_is_missing_is_left_out(tmp_path: Path):
    run = make_run(tmp_path, steps=1, names=(), stage="pt")
    for name in (run.plan, run.results("train"), run.results("all")):
        name.unlink()
    with run.trainer_log.open("a") as file:
        file.write('{"current_steps": 2, "lo')
    rendered = page(run)
    assert "continued pre-training" in rendered.text
    assert "Predictions" not in rendered.text
    assert "Before and after" not in rendered.text
    run.trainer_log.unlink()
    rendered = page(run)
    assert "No training step has been logged yet" in rendered.text
    assert "svg" not in {tag for tag, _ in rendered.tags}


def test_an_interrupted_run_says_how_far_it_is(tmp_path: Path):
    run = make_run(tmp_path, steps=10)
    run.results("train").unlink()
    lines = run.trainer_log.read_text().splitlines(keepends=True)
    run.trainer_log.write_text("".join(lines[:8]) + lines[8][:40])
    add_predictions(run)
    run.base_predictions.unlink()
    with run.predictions.open("a") as file:
        file.write('{"id": 5, "pro')
    rendered = page(run)
    assert "Training has reached step 6 of 10" in rendered.text
    assert "5 predictions of the trained model." in rendered.text
    assert "before training" not in rendered.text


@pytest.mark.parametrize("value", [None, math.nan, math.inf])
def test_losses_that_are_not_finite_are_marked_and_counted(tmp_path: Path, value: float | None):
    run = make_run(tmp_path)
    log = [json.loads(line) for line in run.trainer_log.read_text().splitlines()]
    for record in log[3:5]:
        record["loss"] = value
    write_jsonl(run.trainer_log, log)
    assert "not finite: 2 steps, first step 3" in page(run).text
    write_jsonl(run.trainer_log, [record | {"loss": None} for record in log if "loss" in record])
    assert "Gradient norm" in page(run).text


def test_spikes_survive_thinning():
    steps, values = np.arange(100_000), np.ones(100_000)
    values[[17, 54_321, 99_998]] = 2.0, -3.0, 5.0
    x, y = thin(steps, values, columns=400)
    assert len(x) <= 800
    assert {2.0, -3.0, 5.0} <= set(y.tolist())
    assert (np.diff(x) > 0).all()


def test_a_spike_beyond_the_axis_is_said_and_does_not_flatten_the_rest():
    values = [1.0] * 1000
    values[500] = 900.0
    drawing = Drawing(Chart("norm", [Line("norm", range(1000), values, noisy=True)]))
    assert drawing.high < 5
    assert drawing.note() == "▲ above the axis: 1 step, up to 900"
    assert "step 500: 900, above the axis" in drawing.svg()


@pytest.mark.parametrize("values", [[2.0], [0.0, 0.0], [-1.0, -1.0, -1.0], [1e-30, 2e-30], [1e300, -1e300]])
def test_any_finite_values_can_be_drawn(values: list[float]):
    for noisy in (False, True):
        svg = Drawing(Chart("any", [Line("any", range(len(values)), values, noisy=noisy)], from_zero=noisy)).svg()
        assert "nan" not in svg
        assert "inf" not in svg


def test_the_score_is_symmetric_and_ignores_order_and_case():
    assert word_f1("B a", "a b") == 1.0
    assert word_f1("a b c", "a") == word_f1("a", "a b c") == 0.5
    assert word_f1("เรา 北京", "北京") == pytest.approx(4 / 7)


def test_marks_lose_no_character():
    one, other = "The  red\nhouse <is> here.", "A red\n house <was> here!"
    for text, shown in zip((one, other), marked(one, other), strict=True):
        assert re.sub(r"</?mark>", "", shown).replace("&lt;", "<").replace("&gt;", ">") == text


def with_pictures(run: RunDirectory, folder: Path) -> list[dict[str, Any]]:
    """Predictions about pictures: a photograph, a tiny one, a missing one, one that is none, and one too many."""
    folder.mkdir()
    numbers = np.random.default_rng(0)
    photograph = np.kron(numbers.integers(0, 256, (30, 40, 3), np.uint8), np.ones((20, 20, 1), np.uint8))
    Image.fromarray(photograph).save(folder / "photo.jpg")
    Image.fromarray(numbers.integers(0, 256, (8, 8), np.uint8)).save(folder / "digit.png")
    (folder / "none.png").write_text(HOSTILE)
    places = [str(folder / name) for name in ("photo.jpg", "digit.png", "missing.png", "none.png", HOSTILE)]
    places += ["none://k:pa55word@nowhere/a.png"]
    sizes = {"kind": "image", "width": 8, "height": 8}
    asked = [[places[0]], [places[1]], [places[2], places[3]], [places[4], places[5]], places[:2] * 4, []]
    rows = [
        {
            "id": f"a/{number}",
            "source": "a",
            "prompt": "<|im_start|>user\n<|vision_start|><|image_pad|><|vision_end|>What is it?<|im_end|>\n",
            "label": "a cat",
            "predict": "a dog",
            **({"media": [{**sizes, "location": place} for place in of_prompt]} if of_prompt else {}),
        }
        for number, of_prompt in enumerate(asked)
    ]
    write_jsonl(run.predictions, rows)
    return rows


def test_pictures_stand_small_beside_their_prompts_and_files_that_are_none_by_name(tmp_path: Path):
    run = make_run(tmp_path)
    with_pictures(run, tmp_path / "pictures")
    rendered = page(run)
    shown = [attrs for tag, attrs in rendered.tags if tag == "img"]
    assert [each["alt"] for each in shown] == ["photo.jpg", "digit.png", *["photo.jpg", "digit.png"] * 3]
    photo, digit = shown[:2]
    decoded = [Image.open(io.BytesIO(base64.b64decode(each["src"].partition(",")[2]))) for each in (photo, digit)]
    assert [image.size for image in decoded] == [(128, 96), (8, 8)]
    assert (photo["width"], digit["width"], digit["class"]) == ("128", "96", "enlarged")
    original = np.asarray(Image.open(tmp_path / "pictures" / "digit.png"))
    assert (np.asarray(decoded[1].convert("L")) == original).all()
    for name in ("missing.png", "none.png", "a.png"):
        assert f"{name} (cannot be read)" in rendered.text
    assert "2 more" in rendered.text
    assert "pa55word" not in rendered.html
    assert "<image>What is it?" in rendered.text
    for each in shown:
        assert re.fullmatch(r"data:image/(png|jpeg);base64,[A-Za-z0-9+/=]+", each["src"])
    assert len(rendered.html) < 200_000
    assert "img-src data:" in rendered.html


@pytest.mark.parametrize("length", [1, 90])
def test_the_terminal_names_the_files_of_pictures(tmp_path: Path, length: int):
    run = make_run(tmp_path)
    folder = tmp_path / ("x" * length)
    rows = with_pictures(run, folder)
    shown = "".join(report(run).split())  # a long path is folded
    assert f"images{shortened(rows[0]['media'][0]['location'])}prompt".replace(" ", "") in shown


def test_media_of_another_type_are_named(tmp_path: Path):
    run = make_run(tmp_path)
    [row, *_] = with_pictures(run, tmp_path / "pictures")
    write_jsonl(run.predictions, [row | {"media": [{"kind": "image"}]}])
    with pytest.raises(RequestError, match="media must be a list of images, each with its location, but is "):
        report(run)


def test_a_storage_that_does_not_answer_is_asked_once(monkeypatch):
    asked = []

    def silent(location: str) -> bytes:
        asked.append(location)
        raise StorageFailed("no answer")

    monkeypatch.setattr(pictures, "read", silent)
    monkeypatch.setattr(pictures, "READERS", 1)
    places = ["s3://a/1.png", "s3://a/2.png", "s3://b/1.png", "/local.png"]
    drawn = pictures.draw([{"media": [{"location": place}]} for place in places])
    assert asked == ["s3://a/1.png", "s3://b/1.png", "/local.png"]
    assert [drawn[place].small for place in places] == [None] * 4
