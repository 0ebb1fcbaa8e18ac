"""Models, adapters and datasets of ModelScope, from a hub on this machine, with ModelScope's own library."""

from __future__ import annotations

import json
import multiprocessing
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from raysft.config import Config, Source, parse
from raysft.data.sources.files import find_files
from raysft.data.sources.readers import JsonLine, read_raw
from raysft.data.sources.registry import resolve_source
from raysft.errors import NotNow
from raysft.models.adapters import find_adapter, load_with_base
from raysft.models.fingerprint import model_fingerprint
from raysft.models.resolve import find_model
from raysft.models.tokenizer import load_tokenizer
from raysft.storage import modelscope
from raysft.storage.local_cache import local_copy, model_copy
from raysft.storage.path import StoragePath
from raysft.train.finetuning import load_model
from tests.hub_server import files_of
from tests.messages import refusal
from tests.modelscope_server import ModelScopeServer, modelscope_server
from tests.tiny import tiny_model, with_code

SHORT = {
    "MODELSCOPE_REPO_TREE_PAGE_MAX_ATTEMPTS": "1",
    "MODELSCOPE_API_MAX_RETRIES": "1",
    "MODELSCOPE_REPO_TREE_PAGE_TIMEOUT_SECONDS": "5",
    "MODELSCOPE_DOWNLOAD_RETRY_MAX_DELAY_SECONDS": "1",
}


@pytest.fixture(scope="module")
def serving():
    with pytest.MonkeyPatch.context() as patch:
        for name, value in SHORT.items():  # the library reads them once, when it is imported
            patch.setenv(name, value)
        for name in modelscope.BOUNDS.keys() - SHORT.keys():
            patch.setenv(name, modelscope.BOUNDS[name])
        pytest.importorskip("modelscope_hub")
        with modelscope_server() as server:
            yield server


@pytest.fixture
def there(serving, monkeypatch, tmp_path) -> ModelScopeServer:
    """The hub, without faults, and an empty cache."""
    monkeypatch.setenv("MODELSCOPE_ENDPOINT", serving.url)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    for name in ("MODELSCOPE_API_TOKEN", "MODELSCOPE_HOME", "MODELSCOPE_CACHE", "USE_MODELSCOPE_HUB"):
        monkeypatch.delenv(name, raising=False)
    modelscope._listing.cache_clear()
    serving.repositories.clear()
    serving.private.clear()
    serving.sent.clear()
    serving.status, serving.cut_after, serving.listed = 0, None, 0
    return serving


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> dict[str, bytes]:
    return files_of(tiny_model(tmp_path_factory.mktemp("model")))


def find(path: str = "ms://some/model") -> str:
    return find_model(path, StoragePath("/nowhere"), lambda line: None)


def config(**model) -> Config:
    return parse(
        {
            "model": {"path": "ms://some/model", "dtype": "float32", **model},
            "data": {"train": [{"name": "a", "path": "a.jsonl"}], "sequence_length": 64},
        }
    )


def read(path: str | list[str]) -> list[object]:
    records = [record for file in find_files(Source(name="d", path=path)) for _, _, record in read_raw(file)]
    return [json.loads(record.line) if isinstance(record, JsonLine) else record for record in records]


def test_a_model_loads_and_each_file_is_fetched_once(there, model, capfd):
    there.add("models/some/model", {**model, "pytorch_model.bin": b"pickle", "README.md": b"hello"})
    found = find()
    assert found == "ms://some/model"
    assert capfd.readouterr() == ("", ""), "no bars, and no log"
    weights = load_model(config(), found)
    assert sum(parameter.numel() for parameter in weights.parameters()) > 1000
    assert load_tokenizer(found).decode([5]) is not None
    modelscope._listing.cache_clear()  # as another process
    assert {path.name for path in model_copy(found).iterdir()} == model.keys(), "no second format, and no README"
    assert dict(there.sent) == {name: len(data) for name, data in model.items()}


def test_a_revision_is_another_copy(there, model):
    there.add("models/some/model", model)
    there.add("models/some/model", {**model, "config.json": b'{"model_type": "qwen2", "vocab_size": 7}'}, "v1")
    assert json.loads((Path(local_copy(find("ms://some/model@v1"))) / "config.json").read_text())["vocab_size"] == 7
    assert (Path(local_copy(find())) / "config.json").read_bytes() == model["config.json"]
    assert "model.path=ms://some/model@v9: ModelScope does not have it (404)" in refusal(find, "ms://some/model@v9")


def test_content_that_changes_on_the_hub_is_another_model(there, model):
    there.add("models/some/model", model)
    before = model_fingerprint(find())
    changed = {**model, "model.safetensors": model["model.safetensors"][:-1] + b"\1"}
    there.add("models/some/model", changed)
    assert model_fingerprint(find()) == before, "a process keeps to what it found"
    modelscope._listing.cache_clear()
    assert model_fingerprint(find()) != before


def test_an_adapter_is_continued_with_its_base(there, model, tmp_path):
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    there.add("models/some/model", model)
    base = AutoModelForCausalLM.from_pretrained(model_copy(find()), dtype=torch.float32)
    adapted = get_peft_model(base, LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM"))
    adapted.peft_config["default"].base_model_name_or_path = "ms://some/model"
    adapted.save_pretrained(tmp_path / "adapter")
    there.add("models/some/adapter", files_of(tmp_path / "adapter"))
    asked = config(finetuning="lora", adapters=["ms://some/adapter"], lora={"rank": 2})
    found, adapter = find_adapter(asked, find(), lambda line: None)
    assert (found, adapter) == ("ms://some/model", "ms://some/adapter")
    assert find_model("ms://some/adapter", StoragePath("/nowhere"), print, accept_adapter=True) == "ms://some/adapter"
    assert load_with_base(model_copy("ms://some/adapter"), dtype=torch.float32) is not None


def test_pickles_and_a_models_own_code_are_guarded_as_elsewhere(there, model, tmp_path):
    from raysft.models.remote_code import check_code
    from raysft.models.weight_files import check_weights

    pickled = {name: data for name, data in model.items() if name != "model.safetensors"}
    there.add("models/some/pickle", {**pickled, "pytorch_model.bin": b"cos\nsystem\n(S'true'\ntR."})
    folder = model_copy("ms://some/pickle")
    assert (folder / "pytorch_model.bin").exists()
    assert "pytorch_model.bin" in refusal(check_weights, folder, "model.path=ms://some/pickle")
    with_code(tiny_model(tmp_path / "own"), tmp_path / "ran")
    there.add("models/some/own", files_of(tmp_path / "own"))
    told = refusal(check_code, config(path="ms://some/own"), local_copy(find("ms://some/own")), print)
    assert "set model.trust_remote_code=[ms://some/own]" in told
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    ("location", "told"),
    [
        ("ms://some/none", "ModelScope does not have it (404); check the name, and whether MODELSCOPE_API_TOKEN"),
        ("ms://some/secret", "ModelScope denies access (403); check the name, and whether MODELSCOPE_API_TOKEN"),
        ("ms://some", "does not name a ModelScope repository"),
        ("ms://some/../etc", "does not name a ModelScope repository"),
        ("ms://some/data", "contains no config.json"),
        ("ms://some/data/none", "not found; check the path"),
    ],
)
def test_what_is_wrong_takes_a_line(there, location, told):
    there.add("models/some/secret", {"config.json": b"{}"})
    there.add("models/some/data", {"data.json": b"{}"})
    there.private.add("models/some/secret")
    said = refusal(find, location)
    assert said.startswith(f"model.path={location}: ")
    assert told in said


def test_a_token_is_sent(there, monkeypatch, model):
    there.add("models/some/model", model)
    there.private.add("models/some/model")
    monkeypatch.setenv("MODELSCOPE_API_TOKEN", "secret")
    assert (model_copy(find()) / "model.safetensors").stat().st_size == len(model["model.safetensors"])


def test_a_hub_that_fails_is_given_up_and_what_is_here_needs_none(there, model):
    there.add("models/some/model", model)
    find()
    modelscope._listing.cache_clear()
    there.status = 503
    assert model_copy(find()).is_dir()
    with pytest.raises(
        NotNow, match=r"model.path=ms://some/other: ModelScope does not respond \(503\); check the network"
    ):
        find("ms://some/other")


def test_a_download_that_breaks_off_goes_on_where_it_was(there, model):
    there.add("models/some/model", {**model, "model.safetensors": bytes(range(256)) * 4096})
    there.cut_after = 1000
    folder = model_copy(find())
    assert (folder / "model.safetensors").read_bytes() == bytes(range(256)) * 4096
    assert sum(there.sent.values()) == (1 << 20) + sum(map(len, model.values())) - len(model["model.safetensors"])


def _fetch(location: str, results: multiprocessing.SimpleQueue) -> None:
    results.put(local_copy(location))


def test_many_processes_fetch_each_file_once(there, model):
    there.add("models/some/model", model)
    context = multiprocessing.get_context("fork")
    results = context.SimpleQueue()
    processes = [context.Process(target=_fetch, args=("ms://some/model", results)) for _ in range(3)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(timeout=60)
        assert process.exitcode == 0
    assert len({results.get() for _ in processes}) == 1
    assert dict(there.sent) == {name: len(data) for name, data in model.items()}


def test_without_the_library_a_line_says_what_to_install(there, monkeypatch):
    monkeypatch.setitem(sys.modules, "modelscope_hub", None)
    assert refusal(find) == "model.path=ms://some/model needs pip install 'raysft[modelscope]' on every node"


def lines(*texts: str) -> bytes:
    return b"".join(json.dumps({"text": text}).encode() + b"\n" for text in texts)


def test_a_dataset_is_read_by_file_folder_glob_and_revision(there):
    files = {"README.md": b"about", ".gitattributes": b"x", "a b.jsonl": lines("top"), "de/x.jsonl": lines("x", "y")}
    there.add("datasets/some/set", files)
    there.add("datasets/some/set", {"old.jsonl": lines("old")}, "v1")
    assert read("ms://datasets/some/set/de") == [{"text": "x"}, {"text": "y"}]
    assert dict(there.sent) == {"de/x.jsonl": len(files["de/x.jsonl"])}, "only what is named is fetched"
    assert read("ms://datasets/some/set") == [{"text": "top"}, {"text": "x"}, {"text": "y"}]
    assert read("ms://datasets/some/set/a b.jsonl") == read("ms://datasets/some/set/*.jsonl") == [{"text": "top"}]
    assert len(read("ms://datasets/some/set/**/*.jsonl")) == 3
    assert read("ms://datasets/some/set@v1") == [{"text": "old"}]
    (file,) = find_files(Source(name="d", path="ms://datasets/some/set/a b.jsonl"))
    assert (file.path, file.uri) == ("ms://datasets/some/set/a b.jsonl", "ms://datasets/some/set/a%20b.jsonl")
    assert not file.has_changed()
    assert "matches no file" in refusal(read, "ms://datasets/some/set/fr")
    assert "ModelScope does not have it (404)" in refusal(read, "ms://datasets/some/none")


def test_data_that_changes_on_the_hub_is_noticed(there):
    there.add("datasets/some/set", {"a.jsonl": lines("one")})
    (file,) = find_files(Source(name="d", path="ms://datasets/some/set"))
    there.add("datasets/some/set", {"a.jsonl": lines("two")})
    modelscope._listing.cache_clear()  # as on another node
    assert file.has_changed()
    (after,) = find_files(Source(name="d", path="ms://datasets/some/set"))
    assert after.size == file.size
    assert after.identity != file.identity


def resolved(tmp_path: Path, **entry: str) -> Source:
    (tmp_path / "dataset_info.json").write_text(json.dumps({"d": entry}))
    asked = {"train": [{"name": "d"}], "registry": str(tmp_path), "sequence_length": 64}
    whole = parse({"model": {"path": "some/model"}, "data": asked})
    return resolve_source(whole, whole.data.train[0])


def test_a_registry_names_subsets_splits_and_folders(there, tmp_path, monkeypatch):
    files = [f"{subset}/{split}-00000.jsonl" for subset in ("en", "fr") for split in ("train", "test")]
    there.add("datasets/some/set", {**{file: lines(file) for file in files}, "README.md": b"train"})
    there.add("datasets/some/plain", {"data.jsonl": lines("plain"), "dataset_infos.json": b"{}"})
    root = "ms://datasets/some/set"
    assert resolved(tmp_path, ms_hub_url="some/set").path == [f"{root}/{files[0]}", f"{root}/{files[2]}"]
    part = resolved(tmp_path, ms_hub_url="some/set", subset="fr", split="test[:1]")
    assert (part.path, part.slice) == ([f"{root}/{files[3]}"], ":1")
    assert read(part.path or "") == [{"text": files[3]}]
    assert resolved(tmp_path, ms_hub_url="some/set", folder="en").path == f"{root}/en"
    assert resolved(tmp_path, ms_hub_url="some/plain").path == ["ms://datasets/some/plain/data.jsonl"]
    told = refusal(resolved, tmp_path, ms_hub_url="some/set", subset="de")
    assert "no data file in ms://datasets/some/set has a name that matches subset 'de'; set folder" in told
    assert "has a name that matches split 'dev'" in refusal(resolved, tmp_path, ms_hub_url="some/plain", split="dev")
    both = {"hf_hub_url": "some/set", "ms_hub_url": "some/set", "folder": "en"}
    assert resolved(tmp_path, **both).path == "hf://datasets/some/set/en"
    monkeypatch.setenv("USE_MODELSCOPE_HUB", "1")
    assert resolved(tmp_path, **both).path == "ms://datasets/some/set/en"
    beside = {"file_name": "here.json", "ms_hub_url": "some/set"}
    assert "has file_name and ms_hub_url; remove one of them" in refusal(resolved, tmp_path, **beside)


def test_a_file_of_llamafactory_takes_models_from_modelscope_as_there(monkeypatch, tmp_path):
    from raysft.config.llamafactory import convert

    given = {"stage": "sft", "do_train": True, "model_name_or_path": "some/model", "dataset": "d", "template": "qwen"}

    def converted(**more: str) -> dict[str, object]:
        return convert({**given, **more}).config["model"]

    assert converted(model_revision="v1")["path"] == "some/model"
    monkeypatch.setenv("USE_MODELSCOPE_HUB", "1")
    assert converted()["path"] == "ms://some/model"
    found = converted(model_revision="v1")
    assert found["path"] == "ms://some/model@v1"
    assert "revision" not in found
    assert converted(model_name_or_path=str(tmp_path))["path"] == str(tmp_path)
    (refused,) = convert({**given, "dataset_dir": "ONLINE", "dataset": "some/set"}).refusals
    assert "dataset_dir=ONLINE is not supported with USE_MODELSCOPE_HUB=1" in str(refused)


def test_the_library_is_imported_with_our_bounds_and_without_a_log(there):
    there.add("datasets/some/set", {"a.jsonl": lines("one")})
    program = (
        "from raysft.storage.modelscope import copy_of; copy_of('ms://datasets/some/set/a.jsonl')\n"
        "from modelscope_hub import constants; print(constants.REPO_TREE_PAGE_TIMEOUT_SECONDS, constants.DOWNLOAD_TIMEOUT)"
    )
    environment = {name: value for name, value in os.environ.items() if name not in modelscope.BOUNDS}
    options = {"env": environment, "capture_output": True, "text": True, "timeout": 60}
    ran = subprocess.run([sys.executable, "-c", program], check=False, **options)
    assert (ran.stdout, ran.stderr) == ("10 20\n", "")
