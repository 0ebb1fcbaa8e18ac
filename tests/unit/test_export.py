"""The exported model, and the best model of a run on its way to its place."""

import errno
import json
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file

from raysft.config import parse
from raysft.errors import RunFailed
from raysft.generate.engines import create_engine
from raysft.models.merging import merge
from raysft.storage.path import StoragePath
from raysft.storage.run_directory import RunDirectory
from raysft.train.checkpoint.cursor import Best
from raysft.train.export import Exporter, export, gather
from raysft.train.watched_write import watched
from tests.objects import s3_server
from tests.processes import forked, forks
from tests.tiny import tiny_model


@pytest.fixture
def group():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.usefixtures("group")
def test_buffers_that_belong_to_a_model_are_written_too(tmp_path: Path):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = tiny_model(tmp_path / "base")
    model = AutoModelForCausalLM.from_pretrained(folder)
    model.model.register_buffer("balance", torch.arange(3.0))
    model.model.register_buffer("passing", torch.arange(3.0), persistent=False)
    weights = gather(model)
    assert weights is not None
    export(model, weights, AutoTokenizer.from_pretrained(folder), StoragePath.of(tmp_path / "out"))
    written = load_file(tmp_path / "out" / "model.safetensors")
    assert written["model.balance"].tolist() == [0.0, 1.0, 2.0]
    assert "model.passing" not in written
    assert written.keys() - {"model.balance"} == load_file(folder / "model.safetensors").keys()


class RecordingExporter(Exporter):
    """Records the messages of its events."""

    def __init__(self, run: RunDirectory) -> None:
        self.messages: list[str] = []
        super().__init__(run, lambda event: self.messages.append(event.message))


@pytest.fixture
def run(tmp_path, monkeypatch):
    """A run directory in an object store."""
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setattr("raysft.train.export.gather", lambda model: {})
    monkeypatch.setattr("raysft.train.export.save", save_mark_only)
    with s3_server() as server:
        yield RunDirectory.of(StoragePath.of(server.uri(f"{tmp_path.name}/r")))


def save_mark_only(model: str, weights: object, tokenizer: object, folder: Path, ends: Sequence[int] = ()) -> None:
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(model)


def at_once(work: Callable[[], None]) -> None:
    """Write in the only worker."""
    work()


def unwatched(work: Callable[[], None]) -> None:
    """Write in the first worker, which nobody asks to stop."""
    watched(work, lambda: False, lambda: None, "cpu")


def best_of(step: int) -> Best:
    return Best(step, 0, {"eval_loss": 1.0})


@pytest.mark.usefixtures("group")
def test_the_best_model_is_still_known_when_it_is_the_trained_one_already(run):
    exporter = RecordingExporter(run)
    exporter.save_best(4, "after 4", None)
    exporter.promote_best(4, at_once)
    again = RecordingExporter(run)  # the process was killed before it wrote its results
    assert again.confirm_best(best_of(4)) == best_of(4)
    again.promote_best(4, at_once)
    assert (run.model / "config.json").read_text() == "after 4"
    assert not again.messages
    assert not run.best.entries()


@pytest.mark.usefixtures("group")
def test_an_earlier_best_model_is_not_taken_for_one_that_was_never_uploaded(run):
    exporter = RecordingExporter(run)
    exporter.save_best(4, "after 4", None)
    exporter._wait_for_upload()
    assert RecordingExporter(run).confirm_best(best_of(4)) == best_of(4)
    again = RecordingExporter(
        run
    )  # its machine died during the upload after step 6, which a checkpoint names as the best
    assert again.confirm_best(best_of(6)) is None
    assert "after step 6, is missing" in again.messages[0]
    again.save_best(8, "after 8", None)
    again._wait_for_upload()
    assert list(run.best.entries()) == ["8"]


@pytest.mark.usefixtures("group")
def test_a_later_best_model_is_not_taken_for_the_one_that_a_checkpoint_names(tmp_path, monkeypatch):
    monkeypatch.setattr("raysft.train.export.gather", lambda model: {})
    monkeypatch.setattr("raysft.train.export.save", save_mark_only)
    run = RunDirectory(tmp_path / "r")
    exporter = RecordingExporter(run)
    exporter.save_best(4, "after 4", None)
    assert RecordingExporter(run).confirm_best(best_of(4)) == best_of(4)
    exporter.save_best(6, "after 6", None)
    assert list(run.best.entries()) == ["6"]
    again = RecordingExporter(
        run
    )  # it was killed, and resumes from a checkpoint between the two with another learning rate
    assert again.confirm_best(best_of(4)) is None
    again.save_best(8, "after 8", None)
    again.promote_best(8, at_once)
    assert (run.model / "config.json").read_text() == "after 8"
    assert not run.best.exists()
    assert RecordingExporter(run).confirm_best(best_of(8)) == best_of(8), "it is the trained one already"
    again.save_best(9, "after 9", None)
    again.write("after 10", None, at_once)
    assert (run.model / "config.json").read_text() == "after 10"
    assert not run.best.exists(), "the config no longer asks for it"


def write_models(rank: int, run: str, store: str, out, full: bool) -> None:
    dist.init_process_group(
        "gloo", init_method=f"file://{store}", rank=rank, world_size=2, timeout=timedelta(seconds=20)
    )
    exporter = Exporter(RunDirectory.of(StoragePath.of(run)), lambda event: None)
    model = Unwritable() if full else Writable()
    if rank == 1:
        tempfile.tempdir = "/there/is/no/such/folder"  # like a node with a full disk
    try:
        exporter.save_best(4, model, Tokenizer())
        exporter.write(model, Tokenizer(), unwatched)
        out.put((rank, "written"))
    except RunFailed as error:
        out.put((rank, str(error)))
    dist.barrier()


class Writable(torch.nn.Linear):
    """A model of one matrix."""

    def __init__(self) -> None:
        super().__init__(2, 2)
        self.config = SimpleNamespace()

    def save_pretrained(self, folder: Path, state_dict: dict) -> None:
        folder.mkdir(exist_ok=True)
        (folder / "config.json").write_text(", ".join(state_dict))


class Unwritable(Writable):
    """A model that does not fit on the disk."""

    def save_pretrained(self, folder: Path, state_dict: dict) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")


class Tokenizer:
    name_or_path = ""

    def save_pretrained(self, folder: Path) -> None:
        pass


def outcomes(run: str, store: Path, full: bool) -> dict[int, str]:
    """How it ends for two workers that save and write a model together."""
    out = forks().Queue()
    processes = [forked(write_models, rank, run, str(store), out, full) for rank in range(2)]
    for process in processes:
        process.start()
    found = dict(out.get(timeout=100) for _ in processes)
    for process in processes:
        process.join(timeout=30)
    return found


def test_a_best_model_that_cannot_be_written_ends_all_workers_alike(tmp_path):
    outcome = outcomes(str(tmp_path / "r"), tmp_path / "store", full=True)
    assert outcome[0] == outcome[1]
    assert "No space left" in outcome[0]


def test_a_worker_that_writes_nothing_needs_no_disk_space_to_export(tmp_path):
    """It only takes part in gathering the weights; if it failed before that, the first worker would wait for it."""
    with s3_server() as server:
        outcome = outcomes(server.uri(f"{tmp_path.name}/r"), tmp_path / "store", full=False)
    assert outcome == {0: "written", 1: "written"}


@pytest.mark.usefixtures("group")
def test_work_that_is_not_saved_is_saved_while_the_model_is_written():
    said: list[str] = []
    saved = threading.Event()

    def work() -> None:
        assert saved.wait(60), "nobody saved the work"
        said.append("written")

    def react() -> None:
        said.append("saved")
        saved.set()

    watched(work, lambda: True, react, "cpu")
    assert said == ["saved", "written"]
    watched(lambda: None, lambda: True, react, "cpu")
    assert said == ["saved", "written"], "what is written at once needs nothing"

    def fails() -> None:
        raise RunFailed("the disk is full")

    with pytest.raises(RunFailed, match="the disk is full"):
        watched(fails, lambda: False, react, "cpu")


def write_whole(model: str, weights: object, tokenizer: object, folder: Path, ends: Sequence[int] = ()) -> None:
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(model)
    (folder / "model.safetensors").write_text(model)


def write_half(model: str, weights: object, tokenizer: object, folder: Path, ends: Sequence[int] = ()) -> None:
    write_whole("half", weights, tokenizer, folder)
    (folder.parent / "half").touch()
    time.sleep(LONG)


def write_one(run: str, save: Callable[..., None]) -> None:
    """Write the trained model of a run in a process of its own."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    with patch.multiple("raysft.train.export", gather=lambda model: {}, save=save):
        Exporter(RunDirectory.of(StoragePath.of(run)), lambda event: None).write("new", None, at_once)
    dist.destroy_process_group()


LONG = 600.0
"""Seconds that no test waits for."""


def test_what_a_process_had_written_of_a_model_when_it_was_killed_does_not_count(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    with s3_server() as server:
        local, remote = tmp_path / "local", server.uri(f"{tmp_path.name}/remote")
        runs = [RunDirectory.of(StoragePath.of(place)) for place in (local, remote)]
        write_one(remote, write_whole)  # the model of a shorter training, which is replaced
        server.fails("PUT .*model.safetensors", LONG, late=30)
        processes = [
            forked(write_one, str(place), save) for place, save in ((local, write_half), (remote, write_whole))
        ]
        for process in processes:
            process.start()
        limit = time.monotonic() + 100
        while not ((local / "half").exists() and server.refused):
            assert time.monotonic() < limit
            time.sleep(0.05)
        for process in processes:
            process.kill()
            process.join()
        assert [run.is_trained() for run in runs] == [False, False]
        server.heals()
        for run, place in zip(runs, (local, remote), strict=True):
            write_one(str(place), write_whole)
            assert [(run.model / name).read_text() for name in ("config.json", "model.safetensors")] == ["new", "new"]
            assert run.is_trained()
        assert sorted(path.name for path in local.iterdir()) == ["half", "model"], "nothing else is left behind"


GENERATING = {
    "model": {"path": "m"},
    "data": {"train": [{"name": "a", "path": "a"}]},
    "generate": {"batching": "static"},
}
PUBLISHED = {"do_sample": False, "temperature": 0.6, "eos_token_id": 2, "max_length": 77}
"""transformers warns about it, and refuses to save it after a change."""


@pytest.mark.usefixtures("group")
@pytest.mark.parametrize("adapted", [False, True])
@pytest.mark.parametrize(
    ("before", "after"), [(2, [7, 9, 2]), ([2, 7], [7, 9, 2]), ([9, 7, 2], [9, 7, 2]), (None, [7, 9])]
)
def test_the_generation_config_names_where_turns_end_beside_what_it_had(tmp_path, adapted, before, after):
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

    folder = tiny_model(tmp_path / "base")
    (folder / "generation_config.json").write_text(json.dumps({**PUBLISHED, "eos_token_id": before}))
    model = AutoModelForCausalLM.from_pretrained(folder)
    if adapted:
        model = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"]))
    weights = gather(model)
    assert weights is not None
    export(model, weights, AutoTokenizer.from_pretrained(folder), StoragePath.of(tmp_path / "out"), ends=(7, 9))
    written = GenerationConfig.from_pretrained(tmp_path / "out")
    assert (written.eos_token_id, written.max_length, written.temperature) == (after, 77, 0.6)
    # The merged model keeps them too.
    merge(tmp_path / "out", tmp_path / "whole")
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "whole").generation_config.eos_token_id == after
    engine = create_engine(parse(GENERATING), str(tmp_path / "out"))
    assert set(after) <= set(engine._stops)
