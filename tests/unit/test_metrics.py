"""Metrics of predictions, against the libraries that define them."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
from pathlib import Path

import jieba
import numpy as np
import pytest
from nltk.translate.bleu_score import SmoothingFunction, sentence_bleu
from rouge_chinese import Rouge

from raysft.config import Config, RequestError
from raysft.generate import metrics

jieba.setLogLevel(logging.WARNING)

PAIRS = [
    ("The capital of France is Paris.", "Paris is the capital of France."),
    ("北京是中国的首都，也是一座历史悠久的城市。", "北京是中华人民共和国的首都。它有三千年的历史！"),
    ("今天天气很好。我们去公园吧？好的！", "今天天气不错。我们一起去公园散步吧。"),
    ("", "a reference and no prediction"),
    ("a prediction and no reference", ""),
    ("", ""),
    (" \n\t ", "only blanks"),
    ("the same words", "the same words"),
    ("一", "一"),
    ("line one\n\nline three ... ? ! \n", "line one\nline two?\n\nline three"),
    ("def f(x):\n    return x  # 返回", "def f(y):\n\treturn y"),
    ("long " * 300 + "end", "short " * 200 + "long " * 100),
]


def config(**generate) -> Config:
    return Config.model_validate(
        {"model": {"path": "m"}, "data": {"train": [{"name": "a", "path": "a"}]}, "generate": generate}
    )


def rows(pairs, sources=("one",)):
    return [
        {"predict": predict, "label": label, "source": sources[i % len(sources)]}
        for i, (predict, label) in enumerate(pairs)
    ]


def by_definition(predict: str, label: str) -> dict[str, float]:
    """LLaMA-Factory's definitions, straight from the libraries."""
    hypothesis, reference = " ".join(jieba.cut(predict)), " ".join(jieba.cut(label))
    if not hypothesis.split() or not reference.split():
        values = dict.fromkeys(("rouge-1", "rouge-2", "rouge-l"), 0.0)
    else:
        values = {key: value["f"] for key, value in Rouge().get_scores(hypothesis, reference)[0].items()}
    values["bleu-4"] = sentence_bleu([list(label)], list(predict), smoothing_function=SmoothingFunction().method3)
    return {key: round(value * 100, 4) for key, value in values.items()}


@pytest.mark.parametrize("pair", PAIRS, ids=range(len(PAIRS)))
def test_one_example_has_the_values_of_the_libraries(pair):
    scored = metrics.score(config(), rows([pair]))
    assert scored == {"predict_examples": 1, **{f"predict_{k}": v for k, v in by_definition(*pair).items()}}


def test_all_examples_and_each_source_have_the_means_of_theirs():
    scored = metrics.score(config(), rows(PAIRS, sources=("x", "y", "y")))
    expected = [by_definition(*pair) for pair in PAIRS]
    groups = {"": slice(None), "x_": slice(0, None, 3)}
    for prefix, members in groups.items():
        for key in ("rouge-1", "rouge-2", "rouge-l", "bleu-4"):
            mean = round(float(np.mean([e[key] for e in expected][members])), 4)
            assert scored[f"predict_{prefix}{key}"] == mean
    assert (scored["predict_examples"], scored["predict_x_examples"], scored["predict_y_examples"]) == (12, 4, 8)


def test_the_module_gives_rounded_means_through_evaluate(tmp_path):
    import evaluate

    module = evaluate.load(str(metrics.BROUGHT["similarity"]), cache_dir=str(tmp_path))
    predictions, references = zip(*PAIRS, strict=True)
    expected = [by_definition(*pair) for pair in PAIRS]
    computed = module.compute(predictions=list(predictions), references=list(references))
    assert computed == {key: round(float(np.mean([e[key] for e in expected])), 4) for key in expected[0]}


def test_no_predictions_have_no_values():
    assert metrics.score(config(), []) == {"predict_examples": 0}


@pytest.mark.parametrize(("name", "remedy"), [("similarty", "did you mean similarity"), ("./no/metric", "or a path")])
def test_an_unknown_metric_is_refused_in_one_line(name, remedy):
    with pytest.raises(RequestError, match=remedy) as refused:
        metrics.check(config(metrics=["similarity", name]))
    assert repr(name) in str(refused.value)
    assert "\n" not in str(refused.value)


WORDS = '''
"""Words of the whole corpus: a ratio of sums, which is no mean of the examples' ratios."""
import datasets
import evaluate


class Words(evaluate.Metric):
    def _info(self):
        text = datasets.Value("string")
        return evaluate.MetricInfo(
            description="", citation="", inputs_description="",
            features=datasets.Features({"predictions": text, "references": text}),
        )

    def _compute(self, predictions, references):
        count = [sum(len(text.split()) for text in texts) for texts in (predictions, references)]
        return {"ratio": count[0] / count[1], "examples": len(predictions), "texts": predictions}
'''


def test_a_metric_named_by_path_sees_whole_groups(tmp_path):
    path = tmp_path / "words.py"
    path.write_text(WORDS)
    named = config(metrics=[str(path)])
    metrics.check(named)
    scored = metrics.score(named, rows([("a", "a b c d"), ("a b", "a b"), ("a", "a")], sources=("x", "y")))
    assert scored["predict_ratio"] == 4 / 7
    assert scored["predict_x_ratio"] == 2 / 5
    assert scored["predict_words_examples"] == 3  # its own key, beside ours of that name
    assert "predict_texts" not in scored


def test_two_processes_at_once_score_alike_and_leave_nothing_behind(tmp_path):
    script = (
        "from raysft.generate import metrics\nfrom tests.unit.test_metrics import PAIRS, config, rows\n"
        "print(sorted(metrics.score(config(), rows(PAIRS)).items()))"
    )
    root = Path(__file__).parents[2]
    environment = {**os.environ, "PYTHONPATH": str(root), "TMPDIR": str(tmp_path)}
    (tmp_path / "cwd").mkdir()
    started = [
        subprocess.Popen(
            [sys.executable, "-W", "ignore", "-c", script],
            cwd=tmp_path / "cwd", env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )
        for _ in range(2)
    ]  # fmt: skip
    outputs = [process.communicate(timeout=120) for process in started]
    assert outputs[0][0] == outputs[1][0] == f"{sorted(metrics.score(config(), rows(PAIRS)).items())}\n"
    assert "Building prefix dict" not in outputs[0][1]
    assert not list((tmp_path / "cwd").iterdir())
    assert not list(tmp_path.glob("raysft-metric-*"))
