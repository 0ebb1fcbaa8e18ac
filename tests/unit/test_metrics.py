"""Metrics of predictions, against the libraries that define them."""

from __future__ import annotations

import itertools
import logging
import os
import random
import re
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import jieba
import numpy as np
import pytest
import sacrebleu
from nltk.translate.bleu_score import SmoothingFunction, sentence_bleu
from rouge_chinese import Rouge
from rouge_score.rouge_scorer import RougeScorer

from raysft.config import Config, with_overrides
from raysft.errors import RequestError, RunFailed
from raysft.generate import metrics
from raysft.generate.metrics.bootstrap import intervals, resampled_sums, totals
from raysft.generate.metrics.loading import loaded
from raysft.metric_names import METRIC_KEYS, higher_is_better
from raysft.storage.json_files import read_jsonl
from raysft.storage.run_directory import RunDirectory

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


def score(config: Config, predictions: list[dict]) -> dict[str, Any]:
    """The scores under their flat keys."""
    return metrics.flat_results(metrics.score(config, predictions))


def by_definition(predict: str, label: str) -> dict[str, float]:
    """LLaMA-Factory's definitions, straight from the libraries."""
    hypothesis, reference = " ".join(jieba.cut(predict)), " ".join(jieba.cut(label))
    if not hypothesis.split() or not reference.split():
        values = dict.fromkeys(("rouge-1", "rouge-2", "rouge-l"), 0.0)
    else:
        values = {key: value["f"] for key, value in Rouge().get_scores(hypothesis, reference)[0].items()}
    values["bleu-4"] = sentence_bleu([list(label)], list(predict), smoothing_function=SmoothingFunction().method3)
    return {key: round(value * 100, 4) for key, value in values.items()}


@pytest.mark.parametrize("name", metrics.BUILTIN_METRICS)
def test_the_names_of_the_values_are_known_without_the_metric(name):
    with loaded(name) as metric:
        assert tuple(metric.compute(predictions=["a b"], references=["a c"])) == METRIC_KEYS[name]
        for key in METRIC_KEYS[name]:
            assert (
                higher_is_better(f"predict_{key}")
                is higher_is_better(f"predict_a_{key}_low")
                is metric.higher_is_better
            )


@pytest.mark.parametrize("pair", PAIRS, ids=range(len(PAIRS)))
def test_one_example_has_the_values_of_the_libraries(pair):
    scored = score(config(), rows([pair]))
    assert scored == {"predict_examples": 1, **{f"predict_{k}": v for k, v in by_definition(*pair).items()}}


def test_random_texts_have_the_values_of_the_libraries():
    """Words of several scripts, numbers and every kind of white space, also within words and at the ends."""
    chance = random.Random(0)
    parts = [
        *"北京是中国的首都，。！？… \t\n\r\x0b\x1c\x85\u00a0\u3000aZ9%._-+#&é模",
        "\r\n",
        " the ",
        "hello",
        "3.5%",
        "любви",
        "x" * 40,
    ]
    texts = ["".join(chance.choices(parts, k=chance.randrange(60))) for _ in range(400)]
    pairs = list(itertools.pairwise(texts))
    with loaded("similarity") as module:
        found = module.statistics(*zip(*pairs, strict=True))
        assert [dict(zip(module.keys, row, strict=True)) for row in found] == [by_definition(*pair) for pair in pairs]


def test_all_examples_and_each_source_have_the_means_of_theirs():
    scored = score(config(), rows(PAIRS, sources=("x", "y", "y")))
    expected = [by_definition(*pair) for pair in PAIRS]
    groups = {"": slice(None), "x_": slice(0, None, 3)}
    for prefix, members in groups.items():
        for key in ("rouge-1", "rouge-2", "rouge-l", "bleu-4"):
            mean = round(float(np.mean([e[key] for e in expected][members])), 4)
            assert scored[f"predict_{prefix}{key}"] == mean
    assert (scored["predict_examples"], scored["predict_x_examples"], scored["predict_y_examples"]) == (12, 4, 8)


def corpus(pairs=PAIRS) -> tuple[list[str], list[str]]:
    return [prediction for prediction, _ in pairs], [reference for _, reference in pairs]


def scored(metric: str, pairs=PAIRS, **run) -> dict:
    """Figures of one metric over all examples."""
    named = with_overrides(config(metrics=[metric]), {f"run.{key}": value for key, value in run.items()})
    return {key.removeprefix("predict_"): value for key, value in score(named, rows(pairs)).items()}


ENGLISH = [pair for pair in PAIRS if all(text.isascii() for text in pair)]
ENGLISH += [("The café’s “naïve” — running, ran!", "A cafe’s naïve runner… was\nrunning"), ("Ｆull e\u0301", "full é")]
CHINESE = [pair for pair in PAIRS if any("一" <= letter <= "鿿" for letter in pair[0])]
CORPORA = {"english": ENGLISH, "chinese": CHINESE, "all": PAIRS, "empty": [("", ""), ("", "x"), ("x", " ")]}


@pytest.mark.parametrize("pairs", CORPORA.values(), ids=CORPORA)
def test_bleu_and_chrf_are_those_of_sacrebleu_on_the_whole_corpus(pairs):
    predictions, references = corpus(pairs)
    for metric, tokenizer in (("bleu", "13a"), ("bleu_zh", "zh")):
        expected = sacrebleu.corpus_bleu(predictions, [references], tokenize=tokenizer).score
        assert scored(metric, pairs)[metric] == pytest.approx(expected, abs=1e-9)
    assert scored("chrf", pairs)["chrf"] == pytest.approx(
        sacrebleu.corpus_chrf(predictions, [references]).score, abs=1e-9
    )


@pytest.mark.parametrize("pair", PAIRS, ids=range(len(PAIRS)))
def test_bleu_and_chrf_of_one_example_are_those_of_a_corpus_of_one(pair):
    expected = sacrebleu.corpus_bleu([pair[0]], [[pair[1]]]).score
    assert scored("bleu", [pair])["bleu"] == pytest.approx(expected, abs=1e-9)
    assert scored("chrf", [pair])["chrf"] == pytest.approx(sacrebleu.sentence_chrf(pair[0], [pair[1]]).score, abs=1e-9)


def test_chinese_has_another_bleu_by_characters():
    assert scored("bleu", CHINESE[:2])["bleu"] < 5 < 20 < scored("bleu_zh", CHINESE[:2])["bleu_zh"]


def test_bleu_and_chrf_say_how_they_are_computed():
    version = f"version:{sacrebleu.__version__}"
    assert scored("bleu")["bleu_signature"] == f"nrefs:1|case:mixed|eff:no|tok:13a|smooth:exp|{version}"
    assert scored("bleu_zh")["bleu_zh_signature"] == f"nrefs:1|case:mixed|eff:no|tok:zh|smooth:exp|{version}"
    assert scored("chrf")["chrf_signature"] == f"nrefs:1|case:mixed|eff:yes|nc:6|nw:0|space:no|{version}"


def test_bleu_keeps_no_texts_in_memory():
    from sacrebleu.tokenizers.tokenizer_13a import Tokenizer13a
    from sacrebleu.tokenizers.tokenizer_re import TokenizerRegexp

    scored("bleu")
    assert Tokenizer13a.__call__.cache_info().currsize == TokenizerRegexp.__call__.cache_info().currsize == 0


ROUGES = ("rouge1", "rouge2", "rougeL", "rougeLsum")


def mean_rouge(scorer: RougeScorer, pairs) -> dict[str, float]:
    scores = [scorer.score(reference, prediction) for prediction, reference in pairs]
    return {key: 100 * float(np.mean([score[key].fmeasure for score in scores])) for key in ROUGES}


def test_rouge_of_latin_text_is_that_of_rouge_score():
    found = scored("rouge", ENGLISH)
    expected = mean_rouge(RougeScorer(ROUGES, use_stemmer=True), ENGLISH)
    assert {key: found[key] for key in ROUGES} == pytest.approx(expected, abs=1e-9)
    assert found["rouge1"] > 30


def test_rouge_of_random_lines_is_that_of_rouge_score():
    """Few words, many ties: of several longest common subsequences the same one has to be counted."""
    generator = random.Random(1)
    scorer = RougeScorer(ROUGES, use_stemmer=True)
    for _ in range(150):
        text, other = ("".join(generator.choices("aaabcd  \n", k=generator.randrange(90))) for _ in range(2))
        text, other = (re.sub("(?<=[a-d])(?=[a-d])", " ", each) for each in (text, other))
        found = scored("rouge", [(text, other)])
        assert {key: found[key] for key in ROUGES} == pytest.approx(mean_rouge(scorer, [(text, other)]), abs=1e-9)


class Characters:
    """What is neither a blank nor ASCII nor punctuation, one by one; words of the rest."""

    def tokenize(self, text):
        return re.findall(r"[a-z0-9]+|[\u4e00-\u9fff]", text)


def test_rouge_of_chinese_text_counts_characters():
    found = scored("rouge", CHINESE)
    expected = mean_rouge(RougeScorer(ROUGES, tokenizer=Characters()), CHINESE)
    assert {key: found[key] for key in ROUGES} == pytest.approx(expected, abs=1e-9)
    assert mean_rouge(RougeScorer(ROUGES), CHINESE[:2])["rouge1"] == 0, "which rouge_score alone does not see"


def test_rouge_of_other_scripts_counts_words():
    assert scored("rouge", [("Любви все возрасты покорны", "все возрасты знают")])["rouge1"] == pytest.approx(400 / 7)
    assert scored("rouge", [("नमस्ते दुनिया", "नमस्ते भारत")])["rouge1"] == pytest.approx(50)


def test_exact_match_is_a_share_and_does_not_see_blanks_at_the_ends():
    pairs = [
        ("42", "42"),
        (" 42\n", "42"),
        ("42.", "42"),
        ("Yes", "yes"),
        ("北京", "北京"),
        ("", ""),
        ("", "x"),
        ("a  b", "a b"),
    ]
    found = scored("exact_match", pairs)
    assert found["exact_match"] == 0.5
    assert 0 <= found["exact_match_low"] < 0.5 < found["exact_match_high"] <= 1


@pytest.mark.parametrize("metric", metrics.BUILTIN_METRICS)
def test_in_seven_uneven_parts_the_statistics_and_figures_are_those_of_the_whole(metric):
    predictions, references = corpus(PAIRS * 3)
    with loaded(metric) as module:
        whole = module.statistics(predictions, references)
        cuts = [0, 1, 1, 4, 11, 12, 30, len(predictions)]
        parts = [module.statistics(predictions[a:b], references[a:b]) for a, b in itertools.pairwise(cuts)]
        assert np.array_equal(np.concatenate(parts), whole)
        figures = module.scores(totals(whole), len(whole))
        of_parts = module.scores(np.sum([totals(part) for part in parts], axis=0), len(whole))
    assert of_parts == pytest.approx(figures, abs=1e-9)
    assert all(np.isfinite(value) and 0 <= value <= 100.0001 for value in figures.values())


@pytest.mark.parametrize("metric", metrics.BUILTIN_METRICS)
def test_every_metric_is_a_module_for_evaluate(metric, tmp_path):
    import evaluate

    module = evaluate.load(str(metrics.BUILTIN_METRICS[metric]), cache_dir=str(tmp_path))
    predictions, references = corpus()
    computed = module.compute(predictions=predictions, references=references)
    assert computed == {key: value for key, value in scored(metric).items() if key in computed}
    assert computed
    assert set(module.compute(predictions=[], references=[]).values()) == {0.0}


def test_a_source_among_others_is_scored_as_if_it_were_alone():
    everything = config(metrics=list(metrics.BUILTIN_METRICS))
    together = score(everything, rows(PAIRS, sources=("x", "y", "y")))
    alone = score(everything, [row for row in rows(PAIRS, sources=("x", "y", "y")) if row["source"] == "y"])
    figures = {key.removeprefix("predict_"): value for key, value in alone.items() if not key.endswith("_signature")}
    assert len(figures) == 1 + 3 * (4 + 4 + 1 + 1 + 1 + 1)
    assert {key: together[f"predict_y_{key}"] for key in figures} == figures
    assert "predict_y_bleu_signature" not in together


def test_intervals_follow_from_the_seed_and_hold_the_figure():
    first, again, other = scored("chrf"), scored("chrf"), scored("chrf", seed=7)
    assert first == again != other
    assert first["chrf_low"] < first["chrf"] < first["chrf_high"]


def test_one_example_has_no_interval():
    assert set(scored("chrf", PAIRS[:1])) == {"examples", "chrf", "chrf_signature"}


def test_a_resample_has_the_figure_of_its_texts():
    """The examples that a resample drew, as texts: sacreBLEU gives them the same BLEU."""
    predictions, references = corpus(PAIRS)
    draws = np.random.default_rng(3).integers(len(PAIRS), size=(5, len(PAIRS)))
    with loaded("bleu") as module:
        for sums, drawn in zip(resampled_sums(module.statistics(predictions, references), 3, 5), draws, strict=True):
            texts = [predictions[i] for i in drawn], [[references[i] for i in drawn]]
            assert module.scores(sums, len(drawn))["bleu"] == pytest.approx(
                sacrebleu.corpus_bleu(*texts).score, abs=1e-9
            )


def test_an_interval_is_as_wide_as_that_of_a_plain_loop():
    generator = random.Random(0)
    values = [generator.random() ** 2 for _ in range(300)]
    means = sorted(sum(generator.choices(values, k=300)) / 300 for _ in range(1000))
    sums = resampled_sums(np.array(values).reshape(-1, 1), seed=0)
    found = intervals([{"mean": float(total) / 300} for [total] in sums])
    low, high = found["mean"]
    assert low == pytest.approx(means[24], abs=0.005)
    assert high == pytest.approx(means[975], abs=0.005)
    width = 2 * 1.96 * np.std(values) / np.sqrt(300)
    assert high - low == pytest.approx(width, rel=0.1)


def test_resamples_do_not_depend_on_how_many_are_in_memory(monkeypatch):
    statistics = np.random.default_rng(0).integers(9, size=(50, 3)).astype(float)
    whole = resampled_sums(statistics, seed=5, resamples=20)
    monkeypatch.setattr("raysft.generate.metrics.bootstrap._WEIGHTS", 170)  # three at a time
    assert np.array_equal(resampled_sums(statistics, seed=5, resamples=20), whole)


def test_no_predictions_have_no_values():
    assert score(config(), []) == {"predict_examples": 0}


def test_scores_of_steps_stay_beside_those_of_the_trained_model_and_go_with_the_steps_that_are_repeated(tmp_path):
    run = RunDirectory(tmp_path)
    for step, value in ((2, 1.0), (4, 2.0), (6, 3.0), (4, 2.5)):
        found = metrics.write_step_metrics(
            run, step, [metrics.MetricRow("chrf", None, "trained", value, signature="v1")]
        )
        assert found == {"predict_chrf": value}
        assert run.generation(step).read_results("predict") == {"predict_chrf": value, "predict_chrf_signature": "v1"}
    metrics.write_metrics(run, [metrics.MetricRow("chrf", None, "trained", 9.0)])
    rows = [(row.get("step"), row["value"]) for row in read_jsonl(run.metrics)]
    assert rows == [(2, 1.0), (4, 2.5), (None, 9.0)]
    assert run.read_results("predict") == {"predict_chrf": 9.0}


def test_the_result_files_hold_the_rows_and_the_flat_keys_of_llamafactory(tmp_path):
    run = RunDirectory(tmp_path)
    predictions = rows([("a b", "a b"), ("c", "d"), ("e", "e")], sources=("x", "y_z", "x"))
    named = config(metrics=["exact_match", "bleu"])
    scores = [row for role in ("base", "trained") for row in metrics.score(named, predictions, role)]
    signature = next(row.signature for row in scores if row.metric == "bleu")
    scores.append(metrics.MetricRow("runtime", None, "trained", 1.5, unit="seconds", higher_is_better=False))
    metrics.write_metrics(run, scores)

    flat = run.read_results("predict")
    assert run.read_results("all") == flat
    figures = ("exact_match", "exact_match_low", "exact_match_high", "bleu", "bleu_low", "bleu_high")
    keys = {"examples", "x_examples", "y_z_examples", *figures, *(f"x_{key}" for key in figures), "bleu_signature"}
    keys |= {"y_z_exact_match", "y_z_bleu"}  # one example, and so no interval
    assert set(flat) == {f"{base}predict_{key}" for key in keys for base in ("", "base_")} | {"predict_runtime"}
    values = {"examples": 3, "exact_match": 2 / 3, "x_examples": 2, "x_exact_match": 1.0, "x_exact_match_low": 1.0}
    values |= {"y_z_exact_match": 0.0, "runtime": 1.5, "bleu_signature": signature}
    assert {key: flat[f"predict_{key}"] for key in values} == values

    lines = list(read_jsonl(run.metrics))
    # Only predictions during a training have a step.
    assert lines == [{key: value for key, value in asdict(row).items() if key != "step"} for row in scores]
    [row] = [row for row in lines if (row["metric"], row["source"], row["model"]) == ("exact_match", "x", "trained")]
    assert row == {
        "metric": "exact_match",
        "source": "x",
        "model": "trained",
        "value": 1.0,
        "low": 1.0,
        "high": 1.0,
        "unit": "fraction",
        "higher_is_better": True,
        "signature": None,
    }


@pytest.mark.parametrize(
    ("name", "fault", "remedy"),
    [
        ("similarty", "HF_HUB_OFFLINE is set", "did you mean similarity"),
        ("bluezh", "HF_HUB_OFFLINE is set", "did you mean bleu_zh"),
        ("exact-match", "HF_HUB_OFFLINE is set", "did you mean exact_match"),
        ("./no/metric", "cannot be loaded", "built-in metrics: bleu, bleu_zh"),
    ],
)
def test_an_unknown_metric_is_refused_in_one_line(name, fault, remedy, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("evaluate.config.HF_EVALUATE_OFFLINE", False)
    monkeypatch.setattr("socket.getaddrinfo", lambda *_: pytest.fail("the hub was asked"))
    with pytest.raises(RequestError, match=remedy) as refused:
        metrics.check(config(metrics=["similarity", name]))
    assert repr(name) in str(refused.value)
    assert "\n" not in str(refused.value)
    assert fault in str(refused.value)


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
    scored = score(named, rows([("a", "a b c d"), ("a b", "a b"), ("a", "a")], sources=("x", "y")))
    assert scored["predict_ratio"] == 4 / 7
    assert scored["predict_x_ratio"] == 2 / 5
    assert scored["predict_words_examples"] == 3  # its own key, beside ours of that name
    assert "predict_texts" not in scored


SHOUTING = '''
"""Share of the words in capitals that are in the reference too."""
import numpy as np

from raysft.generate.metrics.additive import AdditiveMetric


class Shouting(AdditiveMetric):
    def statistics(self, predictions, references):
        loud = [{word for word in text.split() if word.isupper()} for text in predictions]
        counts = [[len(words & set(r.split())), len(words)] for words, r in zip(loud, references)]
        return np.array(counts, dtype=float)

    def scores(self, sums, examples):
        if sums[1] > 100:
            raise ValueError("too loud\\nfor us")
        return {"shouting": sums[0] / max(sums[1], 1)}
'''


def test_an_additive_metric_named_by_path_has_intervals(tmp_path):
    path = tmp_path / "shouting.py"
    path.write_text(SHOUTING)
    found = scored(str(path), [("A B", "A"), ("B", "B"), ("c", "c")] * 5)
    assert found["shouting"] == 2 / 3
    assert found["shouting_low"] < 2 / 3 < found["shouting_high"]
    with pytest.raises(RunFailed, match=r"shouting.py' failed: too loud; .*fix"):
        scored(str(path), [("A B", "A")] * 60)


def test_two_processes_at_once_score_alike_and_leave_nothing_behind(tmp_path):
    script = (
        "from raysft.generate import metrics\nfrom tests.unit.test_metrics import PAIRS, config, rows, score\n"
        "print(score(config(), rows(PAIRS)))\n"
        "import sys\nassert not {'torch', 'transformers.pipelines'} & sys.modules.keys(), 'seconds for nothing'"
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
    assert [process.returncode for process in started] == [0, 0], outputs
    assert outputs[0][0] == outputs[1][0] == f"{score(config(), rows(PAIRS))}\n"
    assert "Building prefix dict" not in outputs[0][1]
    assert not list((tmp_path / "cwd").iterdir())
    assert not list(tmp_path.glob("raysft-metric-*"))
