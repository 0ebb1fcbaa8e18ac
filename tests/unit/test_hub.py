"""A hub that is absent, silent, refusing, cut off or answering nonsense: one line with a remedy, within a bound."""

from __future__ import annotations

import json
import socket
import time
from contextlib import closing, contextmanager
from types import SimpleNamespace

import huggingface_hub
import pytest
from huggingface_hub import constants, file_download, hf_api

from raysft.config import Config, Source
from raysft.data.sources.files import find_files
from raysft.errors import RequestError
from raysft.generate import metrics
from raysft.generate.metrics import script
from raysft.models.fingerprint import exact_fingerprint, tokenizer_fingerprint
from raysft.models.loading import load_weights
from raysft.models.resolve import find_model
from raysft.models.tokenizer import load_tokenizer
from raysft.storage import hub
from raysft.storage.local_cache import model_copy
from raysft.storage.path import StoragePath
from tests.servers import http, pages, serving, silent, trickling
from tests.tiny import tiny_model

PORTAL = http("200 OK", b"<html>Please log in</html>", ETag='"a"', X_Repo_Commit="a" * 40, Content_Type="text/html")
KINDS = {
    "refuses connections": (
        None,
        "does not respond ([Errno 111] Connection refused); check the network and HF_ENDPOINT",
    ),
    "is silent": (silent, "does not respond (timed out); check the network and HF_ENDPOINT"),
    "trickles": (trickling, "(it sent "),
    "hangs up": (lambda connection: None, "does not respond ("),
    "fails": (http("500 Internal Server Error"), "does not respond (500 Internal Server Error); check the network"),
    "is busy for an hour": (
        http("429 Too Many Requests", Retry_After="3600"),
        "retry after 3600 s); check the",
    ),
    "wants a token": (
        http("401 Unauthorized", b"{}"),
        "the Hub denies access (401 Unauthorized); check the name, and whether HF_TOKEN",
    ),
    "forbids": (
        http("403 Forbidden", b"{}"),
        "the Hub denies access (403 Forbidden); check the name, and whether HF_TOKEN",
    ),
    "does not have it": (http("404 Not Found", b"{}"), "the Hub does not have it (404 Not Found); check the name"),
    "answers a page": (PORTAL, "the Hub's response is not usable; check the name and HF_ENDPOINT"),
    "answers a list": (http("200 OK", b"[1]", ETag='"a"', X_Repo_Commit="a" * 40), "the Hub's response is not usable"),
}


@contextmanager
def hub_that(kind: str):
    answer = KINDS[kind][0]
    if answer:
        with serving(answer) as port:
            yield f"http://127.0.0.1:{port}"
    else:
        with closing(socket.create_server(("", 0))) as taken:
            port = taken.getsockname()[1]
        yield f"http://127.0.0.1:{port}"


def use(endpoint: str, monkeypatch, cache) -> None:
    """Have the hub's library ask there, and keep what it gets in a cache of its own."""
    monkeypatch.setattr(constants, "ENDPOINT", endpoint)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", endpoint + "/{repo_id}/resolve/{revision}/{filename}")
    monkeypatch.setattr(hf_api.api, "endpoint", endpoint)
    for module in (constants, file_download):
        monkeypatch.setattr(module, "HF_HUB_CACHE", str(cache), raising=False)


@pytest.fixture
def ask(monkeypatch, tmp_path):
    """Asks a hub in a hurry, and gives what was said."""
    monkeypatch.setattr(hub, "RETRY_SECONDS", 1.0)
    monkeypatch.setattr(hub, "ATTEMPT_SECONDS", 0.5)
    monkeypatch.setattr(constants, "HF_HUB_ETAG_TIMEOUT", 0.5)

    def said(kind, function) -> str:
        with hub_that(kind) as endpoint:
            use(endpoint, monkeypatch, tmp_path)
            begun = time.monotonic()
            with pytest.raises(RequestError) as caught:
                function()
            assert time.monotonic() - begun < 40  # the library tries a download that breaks off six times
        assert "\n" not in str(caught.value)
        return str(caught.value)

    return said


@pytest.mark.parametrize("kind", KINDS)
def test_a_model_that_the_hub_does_not_give_is_one_line_in_time(ask, tmp_path, kind):
    line = ask(kind, lambda: find_model("some/model", StoragePath.of(tmp_path), print))
    assert line.startswith("model.path=some/model: not a local folder, and ")
    assert KINDS[kind][1] in line


@pytest.mark.parametrize("kind", KINDS)
def test_weights_that_the_hub_does_not_give_are_one_line_in_time(ask, kind):
    line = ask(kind, lambda: model_copy("some/model"))
    assert line.startswith("some/model: is not a local folder, and ")
    assert KINDS[kind][1] in line


@pytest.mark.parametrize("kind", KINDS)
def test_a_dataset_that_the_hub_does_not_give_is_one_line_in_time(ask, kind):
    from raysft.storage import filesystems

    filesystems._filesystem.cache_clear()
    huggingface_hub.HfFileSystem.clear_instance_cache()
    line = ask(kind, lambda: find_files(Source(name="d", path="hf://datasets/some/set/default/train")))
    assert line.startswith("source 'd': hf://datasets/some/set/default/train cannot be read: ")
    assert KINDS[kind][1] in line


COMMIT = "a" * 40


def on_hub(kind: str, id: str, files: dict[str, bytes]) -> dict[str, bytes]:
    """What the hub answers about a repository with some files, by path."""
    listed = [{"type": "file", "path": name, "size": len(content), "oid": name} for name, content in files.items()]
    info = {"id": id, "sha": COMMIT}
    asked = {"": info, "/revision/main": info, f"/tree/{COMMIT}": listed}
    contents = {f"/api/{kind}/{id}{what}": json.dumps(answer).encode() for what, answer in asked.items()}
    folder = f"/{id}" if kind == "models" else f"/{kind}/{id}"
    for revision in ("main", COMMIT):
        contents |= {f"{folder}/resolve/{revision}/{name}": content for name, content in files.items()}
    return contents


def test_weights_that_are_cut_off_are_one_line_in_time(monkeypatch, tmp_path):
    monkeypatch.setattr(hub, "RETRY_SECONDS", 1.0)
    # The library waits a second before each of its attempts to go on with a download.
    monkeypatch.setattr(file_download, "time", SimpleNamespace(**{**vars(time), "sleep": lambda seconds: None}))
    model = tiny_model(tmp_path / "model")
    files = {file.name: file.read_bytes() for file in model.iterdir()}
    answer = pages(on_hub("models", "some/model", files), cut=".safetensors", X_Repo_Commit=COMMIT)
    with serving(answer) as port:
        use(f"http://127.0.0.1:{port}", monkeypatch, tmp_path / "cache")
        begun = time.monotonic()
        fault = r"the download was interrupted \(.+\); run the same command again, which keeps complete files, or give a folder$"
        with pytest.raises(RequestError, match=f"^some/model: is not a local folder, and {fault}"):
            model_copy("some/model")
        with pytest.raises(RequestError, match=f"^some/model: its weights cannot be loaded: {fault}"):
            load_weights("some/model", cache_dir=tmp_path / "cache")
        assert time.monotonic() - begun < 60


def test_a_model_of_the_hub_is_known_by_its_commit(monkeypatch, tmp_path):
    model = tiny_model(tmp_path / "model")
    files = {file.name: file.read_bytes() for file in model.iterdir()}
    with serving(pages(on_hub("models", "some/model", files), X_Repo_Commit=COMMIT)) as port:
        use(f"http://127.0.0.1:{port}", monkeypatch, tmp_path / "cache")
        found = find_model("some/model", StoragePath.of(tmp_path), print)
        assert exact_fingerprint(found) == found == f"some/model@{COMMIT}"
        assert tokenizer_fingerprint(found) == tokenizer_fingerprint(str(model))


def scored(metric: str) -> Config:
    return Config.model_validate(
        {
            "stage": "sft",
            "run": {"name": "r"},
            "model": {"path": "m"},
            "data": {"train": [{"name": "d", "path": "d"}]},
            "generate": {"metrics": [metric]},
        }
    )


@pytest.mark.parametrize("name", ["someones", "some/metric"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_metric_that_the_hub_does_not_give_is_one_line_in_time(ask, kind, name):
    import evaluate  # noqa: F401 - which takes longer than a hub may

    line = ask(kind, lambda: metrics.check(scored(name)))
    assert line.startswith(f"generate.metrics: {name!r} is not a local file, and ")
    assert KINDS[kind][1] in line


ENDS = """
import datasets
import evaluate

from .ending import END


class Ends(evaluate.Comparison):
    def _info(self):
        text = datasets.Value("string")
        features = datasets.Features({"predictions": text, "references": text})
        return evaluate.ComparisonInfo(description="", citation="", inputs_description="", features=features)

    def _compute(self, predictions, references):
        return {"ends": sum(text.endswith(END) for text in predictions) / len(predictions)}
"""


def test_a_metric_of_the_hub_is_fetched_once_and_scores_when_the_hub_is_gone(monkeypatch, tmp_path):
    monkeypatch.setattr(hub, "RETRY_SECONDS", 1.0)
    files = {"ends.py": ENDS.encode(), "ending.py": b"END = '!'"}
    with serving(pages(on_hub("spaces", "evaluate-comparison/ends", files), X_Repo_Commit=COMMIT)) as port:
        use(f"http://127.0.0.1:{port}", monkeypatch, tmp_path)
        metrics.check(scored("ends"))
    rows = [{"predict": text, "label": "", "source": "s"} for text in ("Yes!", "No", "Well", "Oh")]
    begun = time.monotonic()
    assert metrics.flat_results(metrics.score(scored("ends"), rows)) == {"predict_examples": 4, "predict_ends": 0.25}
    assert time.monotonic() - begun < 10


def test_a_hub_that_did_not_answer_is_not_asked_again_for_each_file(ask, tmp_path):
    def twice():
        with pytest.raises(RequestError):
            find_model("some/model", StoragePath.of(tmp_path), print)
        begun = time.monotonic()
        try:
            find_model("another/model", StoragePath.of(tmp_path), print)
        finally:
            assert time.monotonic() - begun < 1.0

    assert "does not respond" in ask("fails", twice)


def test_a_metric_that_evaluate_has_fetched_is_used_without_the_hub(monkeypatch, tmp_path):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr("evaluate.loading.init_dynamic_modules", lambda: str(tmp_path))
    with pytest.raises(
        script.ScriptNotFound, match="HF_HUB_OFFLINE is set, but the cache does not have it; unset HF_HUB_OFFLINE"
    ):
        script.find_script("ends")
    kept = tmp_path / "metrics" / "evaluate-metric--ends" / "f00" / "ends.py"
    kept.parent.mkdir(parents=True)
    kept.touch()
    assert script.find_script("ends") == str(kept)


def test_without_network_by_ones_own_wish_the_hub_is_not_asked(monkeypatch, tmp_path):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(
        RequestError, match="HF_HUB_OFFLINE is set, but the cache does not have it; unset HF_HUB_OFFLINE"
    ):
        find_model("some/model", StoragePath.of(tmp_path), print)
    (tmp_path / "tokenizer.json").write_text('{"version": "1.0"')
    with pytest.raises(RequestError, match=r"its tokenizer cannot be loaded \(.*\); put its files"):
        load_tokenizer(str(tmp_path))
