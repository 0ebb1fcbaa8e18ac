"""A trained model is pushed to a hub on this machine, which also fails, as one commit."""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from huggingface_hub import constants

from raysft.cli import main
from raysft.config import parse
from raysft.errors import RunFailed
from raysft.models.resolve import find_model
from raysft.storage import hub, hub_upload
from raysft.storage.json_files import write_jsonl
from raysft.storage.local_cache import model_copy
from raysft.storage.path import StoragePath
from raysft.storage.run_directory import RunDirectory
from tests.hub_server import Fault, files_of, hub_server
from tests.hub_uploads import Account
from tests.messages import holds
from tests.processes import forked
from tests.servers import serving as serving_one
from tests.servers import silent
from tests.unit.test_hub import hub_that, use

WEIGHTS = "model.safetensors"
PATHS = ["/home/somebody/a.jsonl", "file:///home/somebody/b.jsonl", "~/chats/c.jsonl", "s3://bucket/d.jsonl"]


@pytest.fixture(scope="module")
def serving():
    with hub_server() as server:
        server.accounts |= {"hf_mine": Account(), "hf_reads": Account(writes=())}
        yield server


@pytest.fixture
def there(serving, monkeypatch, tmp_path):
    """The hub, without faults and repositories, and a token that may write there."""
    for name, value in (
        ("RETRY_SECONDS", 1.0),
        ("ATTEMPT_SECONDS", 0.5),
        ("WRITE_SECONDS", 0.5),
        ("AWAY_SECONDS", 0.0),
    ):
        monkeypatch.setattr(hub, name, value)
    monkeypatch.setenv("HF_TOKEN", "hf_mine")
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no token"))
    (tmp_path / "tmp").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "tmp"))
    use(serving.url, monkeypatch, tmp_path / "cache")
    serving.repositories.clear()
    serving.uploads.files.clear()
    serving.uploads.part_bytes = 0
    serving.forget()
    return serving


@pytest.fixture(scope="module")
def trained(tmp_path_factory, model) -> RunDirectory:
    """A run directory with a trained adapter, as a run leaves it."""
    from transformers import AutoTokenizer

    from raysft.train.finetuning import load_model

    run = RunDirectory(tmp_path_factory.mktemp("push") / "sums")
    config = parse(
        {
            "run": {"name": "sums", "storage": str(run.path.parent)},
            "model": {"path": str(model), "dtype": "float32", "finetuning": "lora"},
            "data": {"train": [{"name": "a", "path": PATHS}], "sequence_length": 64},
        }
    )
    adapted = load_model(config, str(model))
    for name, weight in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight)
    adapted.save_pretrained(run.path / "model")
    (run.path / "model" / "README.md").unlink()
    AutoTokenizer.from_pretrained(model).save_pretrained(run.path / "model")
    run.config.write_text(config.to_yaml())
    run.plan.write_text(json.dumps({"resolved": {"adapter": "lora", "finetuning": "lora"}}))
    write_jsonl(run.trainer_log, [{"current_steps": step, "total_steps": 3, "loss": 2.0} for step in (1, 2, 3)])
    (run.path / "training_loss.png").write_bytes(b"a picture")
    return run


def push(run: RunDirectory, name: str = "org/sums", *options: str) -> int:
    return main(["export", str(run.path), "--push", name, *options])


def files_on(there, name: str = "org/sums") -> dict[str, bytes]:
    repository = there.repositories["models", name]
    return {
        path: data for path, data in repository.commits[repository.refs["main"]].items() if path != ".gitattributes"
    }


def sent(there, path: str = "/store/") -> int:
    return sum(line.startswith(f"PUT {path}") for line in there.asked)


def error_of(capsys) -> str:
    """The one line on standard error from raysft itself."""
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("raysft: ")]
    return line


def logits(folder: Path) -> torch.Tensor:
    from transformers import AutoModelForCausalLM

    with torch.no_grad():
        return AutoModelForCausalLM.from_pretrained(folder)(input_ids=torch.arange(40)[None]).logits


def test_the_hub_has_what_the_folder_holds_and_the_model_loads_from_there(there, trained, model, tmp_path, capsys):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    output = tmp_path / "out"
    assert push(trained, "org/sums", "--output", str(output)) == 0
    repository = there.repositories["models", "org/sums"]
    commit = repository.refs["main"]
    assert capsys.readouterr().out.splitlines()[-1] == f"pushed: {there.url}/org/sums/commit/{commit}"
    assert repository.titles == {commit: "raysft: the model of run sums after step 3"}
    assert not repository.private
    assert files_on(there) == files_of(output)
    assert files_of(output).keys() >= {"config.json", WEIGHTS, "tokenizer.json", "README.md", "training_loss.png"}
    assert not any("xet" in line for line in there.asked), "a hub need not speak its protocol"
    folder = model_copy(find_model("org/sums", StoragePath("/nowhere"), print))
    assert torch.equal(logits(folder), logits(output))
    adapted = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(model), trained.path / "model")
    with torch.no_grad():
        expected = adapted(input_ids=torch.arange(40)[None]).logits
    torch.testing.assert_close(logits(folder), expected, rtol=1e-4, atol=1e-4)


def test_the_card_on_the_hub_is_about_what_is_there(there, trained):
    assert push(trained) == 0
    card = files_on(there)["README.md"].decode()
    assert 'AutoModelForCausalLM.from_pretrained("org/sums", dtype="auto")' in card
    assert "with a LoRA adapter merged into it" in card
    assert "library_name: transformers\n" in card
    assert "![Training loss](training_loss.png)" in card
    assert "`a.jsonl, b.jsonl, c.jsonl, s3://bucket/d.jsonl`" in card
    for absent in ("next to this card", "report.html", "peft import", "somebody", "chats", str(trained.path)):
        assert absent not in card


def test_a_second_push_sends_no_large_file_again(there, trained, tmp_path, capsys):
    run = RunDirectory(shutil.copytree(trained.path, tmp_path / "run"))
    assert push(run) == 0
    repository = there.repositories["models", "org/sums"]
    first = repository.refs["main"]
    assert push(run) == 0
    assert repository.refs["main"] == first
    assert f"the Hub already has all of it\npushed: {there.url}/org/sums/commit/{first}\n" in capsys.readouterr().out
    write_jsonl(run.trainer_log, [{"current_steps": 4, "total_steps": 4, "loss": 1.0}])
    (run.path / "training_loss.png").write_bytes(b"another picture")
    assert push(run) == 0
    assert len(repository.commits) == 3, "the first one of a new repository, and two pushes"
    assert repository.titles[repository.refs["main"]].endswith("after step 4")
    assert files_on(there)["training_loss.png"] == b"another picture"
    assert sent(there) == 1


def test_a_push_needs_no_folder_and_may_be_private_under_ones_own_name(there, trained, tmp_path):
    assert push(trained, "sums", "--private") == 0
    assert there.repositories["models", "me/sums"].private
    assert WEIGHTS in files_on(there, "me/sums")
    assert not list((tmp_path / "tmp").iterdir()), "nothing is left behind"


def test_an_adapter_is_pushed_as_it_is(there, trained, model, tmp_path, capsys):
    assert push(trained, "org/sums", "--no-merge") == 0
    assert (
        f"the adapter names {model} as its base: to load it, the model must be available there"
        in capsys.readouterr().out
    )
    files = files_on(there)
    assert files.items() >= files_of(trained.path / "model").items()
    assert 'AutoPeftModelForCausalLM.from_pretrained("org/sums", dtype="auto")' in files["README.md"].decode()
    run = RunDirectory(shutil.copytree(trained.path, tmp_path / "run"))
    description = run.path / "model" / "adapter_config.json"
    for base, code in (("some/base", 0), (str(trained.path.parent / "cache" / "models" / "merged-0123"), 2)):
        described = {**json.loads(description.read_text()), "base_model_name_or_path": base}
        description.write_text(json.dumps(described))
        assert push(run, "org/sums", "--no-merge") == code
    assert holds(error_of(capsys), "raysft: error: --no-merge: … a copy in the cache … remove --no-merge")
    assert json.loads(files_on(there)["adapter_config.json"])["base_model_name_or_path"] == "some/base"


@pytest.mark.parametrize("options", [(), ("--no-merge",)])
def test_hidden_files_stay_here(there, trained, tmp_path, capsys, options):
    run = RunDirectory(shutil.copytree(trained.path, tmp_path / "run"))
    for hidden in (".cache/huggingface/a.metadata", ".DS_Store", "figures/.git/config"):
        (run.path / "model" / hidden).parent.mkdir(parents=True, exist_ok=True)
        (run.path / "model" / hidden).write_text("mine")
    assert push(run, "org/sums", *options) == 0
    assert not any("/." in f"/{path}" for path in files_on(there))


def test_files_of_another_model_are_removed_and_other_files_stay(there, trained, capsys):
    other = {
        "model-00001-of-00002.safetensors": b"a",
        "model.safetensors.index.json": b"{}",
        "adapter_config.json": b"{}",
    }
    there.add("org/sums", {**other, "LICENSE": b"mine", "figures/config.json": b"{}", "results.json": b"{}"})
    assert push(trained) == 0
    files = files_on(there)
    assert not files.keys() & other.keys()
    assert files.keys() >= {"LICENSE", "figures/config.json", "results.json", WEIGHTS}
    assert (
        "removed files of another model: adapter_config.json, model-00001-of-00002.safetensors, "
        in capsys.readouterr().out
    )


def test_a_large_file_goes_in_parts_if_the_hub_wants_them(there, trained, tmp_path):
    there.uploads.part_bytes = 100_000
    there.faults.append(Fault("PUT /store/.*/2$", times=1, cut_after=50_000))
    assert push(trained, "org/sums", "--output", str(tmp_path / "out")) == 0
    assert files_on(there) == files_of(tmp_path / "out")
    parts = -(-(tmp_path / "out" / WEIGHTS).stat().st_size // 100_000)
    assert sent(there) == parts + 1


@pytest.mark.parametrize(
    ("name", "token", "message"),
    [
        ("org/sums", "", "needs a Hub token, but none is set; set HF_TOKEN … or run hf auth login"),
        (
            "org/sums",
            "hf_mün",
            "the token contains characters that no Hub token has; set HF_TOKEN … or run hf auth login",
        ),
        ("org/sums", "hf mine", "the token contains characters that no Hub token has; set HF_TOKEN"),
        ("org/sums", "hf_bad", "the Hub rejects the token (401 Unauthorized … ); set HF_TOKEN … or run hf auth login"),
        (
            "org/sums",
            "hf_reads",
            "the token may not write there (403 Forbidden: You don't have the rights … ); use a token",
        ),
        (
            "other/sums",
            "hf_mine",
            'the token may not write there (403 Forbidden: … "other"); use a token … or another ORG/NAME',
        ),
        (
            "org/public",
            "hf_reads",
            "the token may not write there (403 Forbidden: Your token has no right … ); use a token",
        ),
        ("a/b/c", "hf_mine", "must be the ORG/NAME of a repository, but is not ( … ); correct it"),
        ("", "hf_mine", "must be the ORG/NAME of a repository, but is not ( … ); correct it"),
        ("org/--", "hf_mine", "must be the ORG/NAME of a repository, but is not ( … ); correct it"),
    ],
)
def test_what_cannot_be_pushed_is_said_before_the_model_is_written(
    there, trained, monkeypatch, tmp_path, capsys, name, token, message
):
    monkeypatch.setenv("HF_TOKEN", token)
    monkeypatch.setattr("raysft.models.merging.merge", None)
    there.add("org/public", {"config.json": b"{}"})
    assert push(trained, name, "--output", str(tmp_path / "out")) == 2
    assert holds(error_of(capsys), f"raysft: error: --push {name}: {message}")
    assert not (tmp_path / "out").exists()
    assert len(there.repositories) == 1


def test_a_wish_that_contradicts_is_refused(there, trained, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr("raysft.models.merging.merge", None)
    there.add("org/public", {"config.json": b"{}"})
    assert push(trained, "org/public", "--private") == 2
    assert holds(
        error_of(capsys), "raysft: error: --private: org/public already exists, but is public; … remove --private"
    )
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert push(trained) == 2
    assert holds(error_of(capsys), "raysft: error: --push org/sums: needs the Hub, but HF_HUB_OFFLINE is set; unset it")
    assert main(["export", str(trained.path)]) == 2
    assert holds(error_of(capsys), "raysft: error: export needs --output or --push … add --output DIR, --push ORG/NAME")
    assert main(["export", str(trained.path), "--output", str(tmp_path / "out"), "--private"]) == 2
    assert holds(error_of(capsys), "raysft: error: --private … add --push ORG/NAME")


@pytest.mark.parametrize("kind", ["refuses connections", "is silent", "fails", "is busy for an hour", "answers a page"])
def test_a_hub_that_is_down_is_one_line_in_time(there, trained, monkeypatch, tmp_path, capsys, kind):
    monkeypatch.setattr("raysft.models.merging.merge", None)
    with hub_that(kind) as endpoint:
        use(endpoint, monkeypatch, tmp_path / "cache")
        begun = time.monotonic()
        assert push(trained) == 2
    assert time.monotonic() - begun < 10
    fault = (
        "the Hub's response is not usable … check HF_ENDPOINT" if "page" in kind else "does not respond ( … HF_ENDPOINT"
    )
    assert holds(error_of(capsys), f"raysft: error: --push org/sums: … {fault}")


REQUESTS = ("whoami", "repos/create", "batch", "PUT /store", "commit")


def test_what_fails_for_a_moment_is_tried_again(there, trained, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(hub, "NAMED_SECONDS", 0.5)
    there.faults += [Fault(request, times=1, status=500 + 3 * (place % 2)) for place, request in enumerate(REQUESTS)]
    there.faults.append(Fault("PUT /store", times=1, status=429, headers={"Retry-After": "1"}))
    assert push(trained, "org/sums", "--output", str(tmp_path / "out")) == 0
    assert files_on(there) == files_of(tmp_path / "out")
    waits = capsys.readouterr().err.splitlines()
    assert waits.count(f"waiting for the Hub: {there.url} (500 Internal Server Error)") == 3
    assert f"waiting for the Hub: {there.store} (503 Service Unavailable)" in waits
    assert f"waiting for the Hub: {there.store} (429 Too Many Requests, retry after 1 s)" in waits


def test_a_connection_that_breaks_off_in_a_file_is_tried_again_and_the_file_is_whole(there, trained):
    there.faults.append(Fault("PUT /store", times=1, cut_after=100_000))
    assert push(trained) == 0
    assert sent(there) == 2


def test_a_store_that_takes_no_bytes_is_given_up_in_time(there, tmp_path, monkeypatch):
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / WEIGHTS).write_bytes(bytes(20_000_000))  # more than the buffers of a connection
    there.add("org/sums", {})
    with serving_one(silent) as port:
        monkeypatch.setattr(there, "store", f"http://127.0.0.1:{port}")
        begun = time.monotonic()
        with pytest.raises(
            RunFailed, match=r"^org/sums: .*does not respond \(.*timed out\); check the network, and run the same"
        ):
            hub_upload.push("org/sums", tmp_path / "model", "one", print)
    assert time.monotonic() - begun < 10


def test_a_run_directory_in_an_object_store_is_pushed_too(there, trained, server, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    place = StoragePath.of(server.uri(f"{tmp_path.name}/sums"))
    place.upload(trained.path)
    assert main(["export", place.location, "--push", "org/sums"]) == 0
    assert "![Training loss](training_loss.png)" in files_on(there)["README.md"].decode()
    assert files_on(there).keys() >= {WEIGHTS, "training_loss.png"}


def test_a_commit_whose_answer_is_lost_is_not_made_twice(there, trained, capsys):
    there.faults.append(Fault("POST .*/commit/", times=1, loses_answer=True))
    assert push(trained) == 0
    repository = there.repositories["models", "org/sums"]
    assert len(repository.titles) == 1
    assert capsys.readouterr().out.endswith(f"/commit/{repository.refs['main']}\n")


def test_a_push_that_is_given_up_goes_on_with_what_it_wrote(there, trained, tmp_path, capsys, monkeypatch):
    command = (trained, "org/sums", "--output", str(tmp_path / "out"))
    there.faults.append(Fault("POST .*/commit/", status=503))
    assert push(*command) == 1
    fault = f"raysft: failed: org/sums: {there.url} does not respond (503 … run the same command again"
    assert holds(error_of(capsys), fault)
    there.forget()
    monkeypatch.setattr("raysft.models.merging.merge", None)
    assert push(trained, "org/others", "--output", str(tmp_path / "out")) == 2
    assert "is not an empty folder" in error_of(capsys)
    assert push(*command) == 0
    assert files_on(there) == files_of(tmp_path / "out")
    assert not sent(there), "the hub has the weights"
    assert push(*command) == 2, "the folder is an export like any other now"


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        (None, "(You have run out of storage, buy more of it); correct that"),
        (
            Fault("batch", status=403, body=b'{"error": "Private repository storage limit reached"}'),
            "(403 Forbidden: Private repository storage limit reached); correct that",
        ),
        (Fault("/commit/", status=413, body=b"too much"), "(413 … : too much); correct that"),
    ],
)
def test_what_the_hub_has_no_room_for_is_a_line_with_its_words(there, trained, capsys, tmp_path, fault, message):
    there.largest = 1000
    if fault:
        there.largest = None
        there.faults.append(fault)
    assert push(trained) == 1
    assert holds(error_of(capsys), f"raysft: failed: org/sums: the Hub rejects the upload {message}")
    assert not list((tmp_path / "tmp").iterdir())


@pytest.fixture
def interruptible() -> Iterator[None]:
    """Ctrl-C interrupts, as in a terminal; a pytest process that others start ignores it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def test_a_push_is_interrupted_at_once_and_goes_on_with_the_files_that_lack(there, tmp_path, interruptible):
    folder = tmp_path / "model"
    folder.mkdir()
    for name in "abc":
        (folder / f"{name}.safetensors").write_bytes(name.encode() * 300_000)
    there.add("org/sums", {})
    there.faults.append(Fault(f"PUT /store/{hub_hash(folder / 'b.safetensors')}", times=1, seconds=20.0))

    def interrupt() -> None:
        limit = time.monotonic() + 20
        while sent(there) < 2 and time.monotonic() < limit:
            time.sleep(0.02)
        os.kill(os.getpid(), signal.SIGINT)

    hub.WRITE_SECONDS = 30.0  # put back with the fixture
    thread = threading.Thread(target=interrupt)
    thread.start()
    begun = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        hub_upload.push("org/sums", folder, "three", print)
    thread.join()
    assert time.monotonic() - begun < 10
    there.forget()
    hub_upload.push("org/sums", folder, "three", print)
    assert sent(there) == 2
    assert files_on(there) == files_of(folder)


def test_a_push_that_gets_sigterm_leaves_no_temporary_model(there, trained, tmp_path):
    there.faults.append(Fault("PUT /store", times=1, seconds=20.0))
    process = forked(_push_elsewhere, there.url, str(tmp_path / "tmp"), str(trained.path))
    process.start()
    limit = time.monotonic() + 60
    while not sent(there) and time.monotonic() < limit and process.is_alive():
        time.sleep(0.02)
    assert list((tmp_path / "tmp").glob("raysft-export-*/model.safetensors"))
    process.terminate()
    process.join(15)
    assert process.exitcode == 130
    assert not list((tmp_path / "tmp").glob("raysft-*"))


def _push_elsewhere(url: str, temporary: str, run: str) -> None:
    """Push in a process of its own."""
    constants.ENDPOINT, tempfile.tempdir = url, temporary
    sys.exit(main(["export", run, "--push", "org/sums"]))


def hub_hash(file: Path) -> str:
    import hashlib

    return hashlib.sha256(file.read_bytes()).hexdigest()
