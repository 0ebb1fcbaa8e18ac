"""Models that raysft makes in its cache."""

from __future__ import annotations

import fcntl
import threading
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from raysft.errors import RequestError, RunFailed
from raysft.models.weight_files import check_weights
from raysft.storage.model_cache import boot, in_cache
from raysft.storage.path import StoragePath
from tests.messages import holds, refusal


@pytest.fixture
def target(tmp_path) -> StoragePath:
    return StoragePath.of(tmp_path / "cache/models/merged-1")


def write(draft: Path) -> None:
    draft.mkdir()
    (draft / "config.json").write_text("{}")
    save_file({"a": torch.ones(2)}, draft / "model.safetensors")


def test_a_model_is_written_once_as_a_whole_and_others_may_read_it(target):
    folder = target.local
    left = folder.with_name(f".{folder.name}.{boot()}-0123")
    for partial in (folder, left):
        partial.mkdir(parents=True)
        (partial / "model.safetensors").write_bytes(b"half")
    assert in_cache(target, write, print) == target
    assert load_file(folder / "model.safetensors")["a"].tolist() == [1, 1]
    assert {path.stat().st_mode for path in folder.iterdir()} == {(folder / "config.json").stat().st_mode}
    assert not left.exists()
    assert in_cache(target, pytest.fail, print) == target


def test_a_full_disk_is_one_line_and_leaves_nothing(target):
    def fails(draft: Path) -> None:
        write(draft)
        raise Exception("Error while serializing: I/O error: No space left on device (os error 28)")

    with pytest.raises(RunFailed, match=r"models: has no room for merged-1 \(.*No space left.*\); free") as caught:
        in_cache(target, fails, print)
    assert "\n" not in str(caught.value)
    assert [path.name for path in target.local.parent.iterdir()] == [".merged-1.lock"]


def test_a_cache_that_cannot_be_written_is_refused(tmp_path, target):
    (tmp_path / "cache").write_text("a file")
    with pytest.raises(RequestError, match=r"models: .* cannot be written there \(Not a directory\); set data\.cache"):
        in_cache(target, write, print)


def test_who_waits_for_another_process_says_so(target):
    target.local.parent.mkdir(parents=True)
    told, asked = list[str](), threading.Event()

    def notify(line: str) -> None:
        told.append(line)
        asked.set()

    with (target.local.parent / ".merged-1.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        waiting = threading.Thread(target=in_cache, args=(target, write, notify))
        waiting.start()
        assert asked.wait(60)
        write(target.local)
    waiting.join(60)
    assert told == [f"model: waiting for another process, which writes {target}"]


def test_a_damaged_copy_is_to_be_removed_not_copied_again(tmp_path):
    folder = tmp_path / "dequantized-0123456789abcdef"
    write(folder)
    check_weights(folder, str(folder))
    (folder / "model.safetensors").write_bytes(b"half")
    told = refusal(check_weights, folder, str(folder))
    assert holds(
        told, f"{folder}: model.safetensors is damaged … ; remove that folder of the cache, so that it is made again"
    )
