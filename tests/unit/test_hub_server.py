"""Models, adapters, tokenizers and datasets by their ids, from a hub on this machine that also fails."""

from __future__ import annotations

import io
import json
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from huggingface_hub import constants, file_download
from PIL import Image

from raysft.config import Config, Source, parse
from raysft.data.sources.files import find_files
from raysft.data.sources.media import MediaOpener, MediaOptions
from raysft.data.sources.readers import JsonLine, read_raw
from raysft.data.types import MEDIUM, Example, Medium, Message
from raysft.models.adapters import find_adapter, load_with_base
from raysft.models.fingerprint import model_fingerprint, tokenizer_fingerprint
from raysft.models.resolve import find_model
from raysft.models.tokenizer import load_tokenizer
from raysft.run import ownership
from raysft.run.inputs import check_model_files
from raysft.storage import filesystems, hub
from raysft.storage.local_cache import local_copy, model_copy
from raysft.storage.path import StoragePath
from raysft.storage.run_directory import RunDirectory
from raysft.train.finetuning import load_model
from tests.hub_server import PARQUET, Fault, Repository, files_of, hub_server
from tests.messages import refusal
from tests.processes import forked
from tests.tiny import tiny_model, with_code
from tests.unit.test_hub import use

WEIGHTS = "model.safetensors"


@pytest.fixture(scope="module")
def serving():
    with hub_server() as server:
        yield server


@pytest.fixture
def there(serving, monkeypatch, tmp_path):
    """The hub, without faults, and an empty cache."""
    for name, value in (("RETRY_SECONDS", 1.0), ("ATTEMPT_SECONDS", 0.5), ("AWAY_SECONDS", 0.0)):
        monkeypatch.setattr(hub, name, value)
    # The library waits a second before each of its attempts to go on with a download.
    monkeypatch.setattr(file_download, "time", SimpleNamespace(**{**vars(time), "sleep": lambda seconds: None}))
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no token"))
    use(serving.url, monkeypatch, tmp_path / "cache")
    filesystems._filesystem.cache_clear()
    huggingface_hub.HfFileSystem.clear_instance_cache()
    serving.repositories.clear()
    serving.forget()
    return serving


@pytest.fixture
def repository(there, model) -> Repository:
    return there.add("some/model", model)


def find(path: str = "some/model", revision: str | None = None) -> str:
    return find_model(path, StoragePath("/nowhere"), lambda line: None, revision=revision)


def config(**model) -> Config:
    return parse(
        {
            "model": {"path": "some/model", "dtype": "float32", **model},
            "data": {"train": [{"name": "a", "path": "a.jsonl"}], "sequence_length": 64},
        }
    )


def test_a_model_is_fetched_when_it_is_needed_and_once(there, repository, model):
    found = find()
    assert found == f"some/model@{repository.refs['main']}"
    assert not there.downloads(".safetensors"), "a check needs no weights"
    assert tokenizer_fingerprint(found) == tokenizer_fingerprint(str(model))
    folder = model_copy(found)
    assert (folder / WEIGHTS).read_bytes() == (model / WEIGHTS).read_bytes()
    there.asked.clear()
    assert (model_copy(found), local_copy(found)) == (folder, str(folder))
    assert load_tokenizer(found)("The cat").input_ids == load_tokenizer(str(model))("The cat").input_ids
    assert not there.asked, "all is there"


def test_a_revision_is_a_branch_a_tag_or_a_commit_and_stays_the_one_that_was_found(there, repository, model):
    first = repository.refs["main"]
    older = {**files_of(model), "tokenizer_config.json": b'{"tokenizer_class": "PreTrainedTokenizerFast"}'}
    tagged = repository.commit(older, "v1", "pr/1")
    assert find(revision="v1") == find(revision=tagged) == find("some/model@v1") == f"some/model@{tagged}"
    assert find() == f"some/model@{first}"
    assert tokenizer_fingerprint(f"some/model@{first}") != tokenizer_fingerprint(f"some/model@{tagged}")
    assert model_fingerprint(f"some/model@{first}") != model_fingerprint(f"some/model@{tagged}")
    repository.refs["main"] = tagged
    assert Path(local_copy(f"some/model@{first}")).name == first
    told = refusal(find, revision="v9")
    assert told.startswith("model.path=some/model at v9: ")
    assert "the Hub has no such revision of it (404 Not Found); check the branch, tag or commit" in told


def test_a_revision_is_of_the_hub_alone(model):
    told = refusal(find, str(model), revision="v1")
    assert f"model.revision=v1 names a Hub revision, but model.path={model} is not a Hub id" in told


def test_a_run_goes_on_with_the_commit_that_it_began_with(there, repository, model, tmp_path):
    began, directory = repository.refs["main"], RunDirectory.of(StoragePath(str(tmp_path / "run")))
    wanted = config()
    assert ownership.recorded_commit(directory, wanted) is None
    files = check_model_files(wanted, lambda line: None)
    assert files.commit == began
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    directory.config.write_text(wanted.to_yaml())
    directory.plan.write_text(json.dumps({"resolved": {"model_commit": files.commit}}))
    repository.commit({**files_of(model), "README.md": b"new"})
    recorded = ownership.recorded_commit(directory, wanted)
    assert check_model_files(wanted, lambda line: None, recorded).model == files.model
    assert check_model_files(wanted, lambda line: None).commit != began
    assert ownership.recorded_commit(directory, config(revision="main")) is None


def test_a_gated_model_says_what_to_do(there, model, monkeypatch):
    there.add("some/model", model, gated=True)
    for status in ("401 Unauthorized", "403 Forbidden"):
        told = refusal(find)
        assert f"model.path=some/model: is not a local folder, and it is gated ({status}); accept its terms at " in told
        assert f"{there.url}/some/model, and set HF_TOKEN" in told
        monkeypatch.setenv("HF_TOKEN", "hf_bad")
    monkeypatch.setenv("HF_TOKEN", there.token)
    assert model_copy(find()).is_dir()


def test_a_busy_hub_is_waited_for_and_the_wait_is_named(there, repository, monkeypatch, capsys):
    monkeypatch.setattr(hub, "NAMED_SECONDS", 1.0)
    there.faults.append(Fault("GET /api/models", times=1, status=429, headers={"Retry-After": "1"}))
    begun = time.monotonic()
    assert find().startswith("some/model@")
    assert time.monotonic() - begun >= 1
    named = f"waiting for the Hub: {there.url} (429 Too Many Requests, retry after 1 s)"
    assert capsys.readouterr().err.splitlines().count(named) == 1


def test_a_hub_that_stays_busy_is_given_up_in_a_line(there, repository, monkeypatch):
    monkeypatch.setattr(hub, "RETRY_AFTER_SECONDS", 2.0)
    there.faults.append(Fault("GET /api/models", status=429, headers={"Retry-After": "1"}))
    assert "does not respond (429 Too Many Requests, retry after 1 s); check the network" in refusal(find)


@pytest.mark.parametrize("status", [500, 503])
def test_a_hub_that_fails_for_a_moment_is_asked_again(there, repository, status):
    there.faults.append(Fault("(GET|HEAD) ", times=1, status=status))
    assert model_copy(find()).is_dir()


def test_a_download_that_breaks_off_goes_on_where_it_was(there, repository, model, monkeypatch):
    hub.bound_requests()
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 1000)
    size, part = (model / WEIGHTS).stat().st_size, 50_500  # the last chunk of a part is lost
    there.faults.append(Fault("GET /lfs/.*safetensors", times=2, cut_after=part))
    assert (model_copy(find()) / WEIGHTS).read_bytes() == (model / WEIGHTS).read_bytes()
    asked = [wanted for name, wanted in there.ranges if name == WEIGHTS]
    assert asked == ["", "bytes=50000-", "bytes=100000-"]
    assert there.sent[WEIGHTS] == size + 2 * 500


def test_a_store_that_knows_no_ranges_gives_a_whole_file(there, repository, model):
    size = (model / WEIGHTS).stat().st_size
    there.faults += [Fault("GET /lfs/", times=1, cut_after=size // 3), Fault("GET /lfs/", ignores_ranges=True)]
    assert (model_copy(find()) / WEIGHTS).read_bytes() == (model / WEIGHTS).read_bytes()


def test_half_a_file_is_noticed_and_the_next_call_mends_it(there, repository, model):
    size = (model / WEIGHTS).stat().st_size
    there.faults.append(Fault("GET /lfs/", length=size // 2))
    told = refusal(model_copy, find())
    assert f"should be of size {size} but has size {size // 2}" in told
    assert told.endswith("; run the same command again")
    there.faults.clear()
    assert (model_copy(find()) / WEIGHTS).read_bytes() == (model / WEIGHTS).read_bytes()


def test_damaged_weights_and_pickles_are_refused_where_they_are_loaded(there, model):
    files = files_of(model)
    there.add("some/model", {**files, WEIGHTS: files[WEIGHTS][: len(files[WEIGHTS]) // 2]})
    told = refusal(load_model, config(), find())
    assert told.startswith("some/model: model.safetensors is damaged")
    del files[WEIGHTS]
    code = io.BytesIO()
    torch.save({"weight": Path("/tmp")}, code)
    there.add("other/model", {**files, "pytorch_model.bin": code.getvalue()})
    told = refusal(load_model, config(path="other/model"), find("other/model"))
    assert told.startswith(
        "other/model: pytorch_model.bin is damaged, or holds more than tensors, which could run code"
    )


def test_what_a_repository_lacks_is_said_before_anything_is_fetched(there, model):
    files = files_of(model)
    there.add("no/weights", {name: content for name, content in files.items() if name != WEIGHTS})
    assert "model.path=no/weights: the Hub has no weights of it" in refusal(find, "no/weights")
    there.add("no/config", {WEIGHTS: files[WEIGHTS]})
    assert "model.path=no/config: the Hub has no config.json of it" in refusal(find, "no/config")
    assert not there.downloads(".safetensors")


def test_code_of_a_hub_model_runs_only_if_it_is_named(there, tmp_path):
    ran = tmp_path / "ran"
    there.add("some/model", with_code(tiny_model(tmp_path / "m"), ran))
    told = refusal(check_model_files, config(), lambda line: None)
    assert "model.path=some/model needs its own code (modeling_own.py)" in told
    assert not ran.exists()
    check_model_files(config(trust_remote_code=["some/model"]), lambda line: None)
    assert ran.exists()


def test_many_at_once_download_each_file_once(there, repository):
    found = find()
    threads = [threading.Thread(target=model_copy, args=(found,)) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
    counts = there.downloads()
    assert counts[WEIGHTS] == 1
    assert set(counts.values()) == {1}


def test_each_node_downloads_a_file_once_for_all_its_workers(there, repository, tmp_path):
    found, nodes = find(), ("one", "another")
    there.forget()  # what this process has fetched to find it
    workers = [forked(_copy_on_node, there.url, str(tmp_path / node), found) for node in nodes for _ in range(3)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(timeout=120)
    assert [worker.exitcode for worker in workers] == [0] * len(workers)
    counts = there.downloads()
    assert counts[WEIGHTS] == len(nodes)
    assert set(counts.values()) == {len(nodes)}


def _copy_on_node(url: str, cache: str, model: str) -> None:
    """Fetch a model in a process of its own, on a node with a cache of its own."""
    use(url, pytest.MonkeyPatch(), cache)
    assert (model_copy(model) / WEIGHTS).stat().st_size


def test_what_is_in_the_cache_needs_no_hub(there, repository, monkeypatch):
    folder = model_copy(find())
    there.faults.append(Fault("", status=503))
    assert model_copy(find()) == folder
    there.asked.clear()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert model_copy(find()) == folder
    assert load_model(config(), find()).name_or_path == "some/model"
    assert not there.asked


def test_an_adapter_of_the_hub_is_continued_or_merged(there, repository, model, tmp_path):
    wanted = config()
    trained = load_model(wanted, find())
    for name, weight in trained.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight)
    trained.save_pretrained(tmp_path / "adapter")
    described = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert (described["base_model_name_or_path"], described["revision"]) == ("some/model", repository.refs["main"])
    adapters = there.add("some/adapter", tmp_path / "adapter")
    commit = adapters.refs["main"]
    continued = config(adapters=["some/adapter"])
    base, adapter = find_adapter(continued, find(), lambda line: None)
    assert (base, adapter) == (find(), f"some/adapter@{commit}")
    assert adapter is not None
    there.asked.clear()
    again = load_model(continued, base, adapter=adapter)
    expected = dict(trained.named_parameters())
    assert all(torch.equal(weight, expected[name]) for name, weight in again.named_parameters())
    # Elsewhere it is loaded with the commit of its base, whatever main is by then.
    repository.commit({"config.json": b"{}"})
    assert load_with_base(model_copy(adapter)).get_base_model().config.hidden_size == 64
    lost = refusal(find_adapter, config(adapters=["some/none"]), base, lambda line: None)
    assert lost.startswith("model.adapters=some/none: not a local folder, and the Hub ")
    assert "no adapter_config.json" in refusal(
        find_adapter, config(adapters=["some/model@main"]), base, lambda line: None
    )


def parquet(text: str) -> bytes:
    buffer = io.BytesIO()
    pq.write_table(pa.table({"instruction": [text], "output": ["yes"]}), buffer)
    return buffer.getvalue()


def read(path: str) -> list[object]:
    return [record for file in find_files(Source(name="d", path=path)) for _, _, record in read_raw(file)]


def test_a_dataset_has_subsets_splits_and_revisions(there):
    dataset = there.add("some/set", {"data/a.jsonl": b'{"instruction": "plain", "output": "x"}\n'}, "datasets")
    parts = [(subset, split) for subset in ("en", "fr") for split in ("train", "test")]
    dataset.commit({f"{subset}/{split}/0000.parquet": parquet(f"{subset} {split}") for subset, split in parts}, PARQUET)
    for subset, split in parts:
        rows = read(f"hf://datasets/some/set@~parquet/{subset}/{split}")
        assert rows == [{"instruction": f"{subset} {split}", "output": "yes"}]
    assert len(read("hf://datasets/some/set/data")) == 1
    assert "matches no file" in refusal(read, "hf://datasets/some/set@~parquet/de/train")
    assert "no such revision" in refusal(read, "hf://datasets/some/set@v9/data")
    assert "cannot be read: the Hub " in refusal(read, "hf://datasets/some/none/data")


def test_images_beside_the_records_of_a_dataset_are_kept_in_the_cache(there, tmp_path):
    stream = io.BytesIO()
    Image.new("RGB", (3, 2)).save(stream, "PNG")
    there.add("some/set", {"a.jsonl": b"{}\n", "images/1.png": stream.getvalue()}, "datasets")
    (file,) = find_files(Source(name="d", path="hf://datasets/some/set"))
    message = Message("user", MEDIUM, media=(Medium("image", "images/1.png"),))
    example = Example("d", f"{file.path}:1", messages=(message,))
    options = MediaOptions("", str(tmp_path), (), None, None)
    for _ in range(2):  # the second time it is there
        (found,) = MediaOpener(options, {file.path: file.uri})([example])
        assert isinstance(found, Example), found
        (medium,) = found.messages[0].media
        assert (medium.width, medium.height) == (3, 2)
        assert Path(medium.location).parent.parent == tmp_path
        assert Path(medium.location).read_bytes() == stream.getvalue()


def test_another_commit_is_other_data_though_sizes_stay(there):
    dataset = there.add("some/set", {"a.jsonl": b'{"text": "one"}\n'}, "datasets")
    (before,) = find_files(Source(name="d", path="hf://datasets/some/set"))
    dataset.commit({"a.jsonl": b'{"text": "two"}\n'})
    (after,) = find_files(Source(name="d", path="hf://datasets/some/set"))
    assert before.size == after.size
    assert before.identity != after.identity
    ((_, _, line),) = read_raw(before)
    assert isinstance(line, JsonLine)
    assert b"one" in line.line, "what was found is what is read"


def test_a_gated_dataset_says_what_to_do(there):
    there.add("some/set", {"a.jsonl": b"{}\n"}, "datasets", gated=True)
    told = refusal(read, "hf://datasets/some/set")
    assert "source 'd': hf://datasets/some/set cannot be read: it is gated (401 Unauthorized); accept its terms" in told
