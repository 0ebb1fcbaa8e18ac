"""Checkpoints that cannot be written, and how many are kept."""

import errno
import json
import os
from dataclasses import replace

import pytest
import torch
import torch.distributed as dist

from raysft.errors import RunFailed, StorageFailed
from raysft.storage import retry
from raysft.storage.path import StoragePath
from raysft.telemetry.events import CheckpointFailed, CheckpointSaved
from raysft.train.checkpoint import catalog, parts, state
from raysft.train.checkpoint.async_writer import AsyncWriter
from raysft.train.checkpoint.catalog import folder_name
from raysft.train.checkpoint.cursor import Cursor
from raysft.train.checkpoint.parts import Snapshot
from raysft.train.checkpoint.tensor_io import TensorReader


@pytest.fixture(scope="module", autouse=True)
def group():
    """A process group of one."""
    store = dist.HashStore()
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.fixture(params=["local", "s3"])
def checkpoints(request, tmp_path) -> StoragePath:
    if request.param == "local":
        return StoragePath.of(tmp_path / "checkpoints")
    return StoragePath.of(request.getfixturevalue("server").uri(f"{tmp_path.name}/checkpoints"))


@pytest.fixture
def saved(monkeypatch):
    """Saves a small state after some steps; gives what was told."""
    monkeypatch.setattr(state, "snapshot", lambda engine, cursor, log: part(cursor.step))

    def save(saver: AsyncWriter, *steps: int) -> None:
        for step in steps:
            saver(None, Cursor(step, step, step, {}), [])
        saver.close()

    return save


def part(step: int, workers: int = 1, rank: int = 0) -> Snapshot:
    return Snapshot(
        rank, {"weight:0:w": torch.full((5,), float(step))}, {}, Cursor(step, step, step, {}, None, workers)
    )


def steps(checkpoints: StoragePath) -> list[int]:
    return [Cursor.read(folder).step for folder in catalog.complete(checkpoints)]


def test_the_newest_are_kept_and_what_is_half_written_before_them_goes(checkpoints, saved):
    half, later = (checkpoints / folder_name(step, "half") for step in (2, 9))
    parts.write(part(2, workers=2), half)
    parts.write(part(9, workers=2), later)
    events: list = []
    saver = AsyncWriter(checkpoints, 2, events.append)
    saved(saver, 1, 2, 3)
    assert [event.step for event in events if isinstance(event, CheckpointSaved)] == [1, 2, 3]
    assert steps(checkpoints) == [3, 2]
    assert later.exists(), "perhaps it is still being written"
    assert not half.exists()
    again = AsyncWriter(checkpoints, 2, print)
    saved(again, 3, 4)
    assert steps(checkpoints) == [4, 3]


def test_passing_ones_push_no_others_out_and_go_when_the_model_is_written(checkpoints):
    def have(*temporary: int) -> None:
        for step in (1, 2, 3, 4, 5):
            cursor = replace(part(step).cursor, temporary=step in temporary)
            parts.write(replace(part(step), cursor=cursor), checkpoints / folder_name(step, "a"))

    have(4, 5)
    catalog.prune(checkpoints, 2)
    assert steps(checkpoints) == [5, 4, 3, 2], "the newest two, and the newest two that were asked for"
    catalog.remove_temporary(checkpoints)
    assert steps(checkpoints) == [3, 2]
    have(2, 4, 5)
    catalog.prune(checkpoints, None)
    assert steps(checkpoints) == [5, 3, 1], "all that were asked for, and the newest"
    have(1, 2, 3, 4, 5)
    catalog.prune(checkpoints, 2)
    assert steps(checkpoints) == [5, 4]
    catalog.remove_temporary(checkpoints)
    assert not checkpoints.entries()


def test_a_full_disk_costs_the_checkpoint_and_nothing_else(tmp_path, saved, monkeypatch):
    checkpoints, events = StoragePath.of(tmp_path), []
    saver = AsyncWriter(checkpoints, 2, events.append)
    saved(saver, 1)

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", full)
        saved(saver, 2)
    assert isinstance(events[-1], CheckpointFailed)
    assert events[-1].reason == "No space left on device; free some, or lower train.keep_last"
    assert len(list(tmp_path.iterdir())) == 1, "nothing of it is left"
    saved(saver, 3)
    assert steps(checkpoints) == [3, 1]


def test_a_storage_that_does_not_come_back_costs_the_checkpoint_and_nothing_else(server, tmp_path, saved, monkeypatch):
    monkeypatch.setattr(retry, "RETRY_SECONDS", 1.0)
    checkpoints, events = StoragePath.of(server.uri(f"{tmp_path.name}/c")), []
    saver = AsyncWriter(checkpoints, 2, events.append)
    server.fails("PUT", seconds=600)
    saved(saver, 1)
    server.heals()
    assert isinstance(events[-1], CheckpointFailed)
    assert "no answer from the storage for" in events[-1].reason
    saved(saver, 2)
    assert steps(checkpoints) == [2]


def test_storage_that_is_away_is_not_taken_for_no_checkpoint(server, tmp_path, saved, monkeypatch):
    monkeypatch.setattr(retry, "RETRY_SECONDS", 0.5)
    checkpoints = StoragePath.of(server.uri(f"{tmp_path.name}/c"))
    saved(AsyncWriter(checkpoints, 2, print), 1)
    server.fails("GET|HEAD", seconds=600)
    with pytest.raises(StorageFailed):
        catalog.newest(checkpoints)
    server.heals()


def test_a_torn_upload_is_none_and_looking_takes_few_requests(server, tmp_path):
    checkpoints, workers = StoragePath.of(server.uri(f"{tmp_path.name}/c")), 20
    for step in (1, 2):
        for rank in range(workers):
            parts.write(part(step, workers, rank), checkpoints / folder_name(step, "a"))
    asked = len(server.requests)
    assert steps(checkpoints)[0] == 2
    assert len(server.requests) - asked < 20
    for name in ("part_7.json", "state_19.pt", "cursor.json"):
        file = checkpoints / folder_name(2, "a") / name
        content = file.read_bytes()
        file.remove()
        assert steps(checkpoints) == [1]
        file.write_bytes(content)
    assert steps(checkpoints) == [2, 1]
    (checkpoints / folder_name(2, "a") / catalog.DAMAGED).write_text(json.dumps({"file": "x"}))
    assert steps(checkpoints) == [1]


def test_a_cursor_with_a_flipped_bit_is_passed_over(checkpoints):
    for step in (1, 2):
        parts.write(part(step), checkpoints / folder_name(step, "a"))
    file = checkpoints / folder_name(2, "a") / "cursor.json"
    file.write_text(file.read_text().replace('"step": 2', '"step": 3'))
    assert steps(checkpoints) == [1]


def test_ranges_of_parts_are_read_and_what_differs_from_its_digest_is_found(checkpoints, tmp_path):
    folder = checkpoints / folder_name(1, "a")
    for rank in range(2):
        values = torch.arange(5 * rank, 5 * rank + 5, dtype=torch.float32)
        tensors = {f"weight:{5 * rank}:w": values, f"exp_avg:{5 * rank}:w": values.to(torch.bfloat16)}
        parts.write(replace(part(1, workers=2, rank=rank), tensors=tensors), folder)
    cursor = Cursor.read(folder)
    near = parts.check(folder, cursor, tmp_path / "scratch")
    assert near.keys() == {0, 1}, "one worker checks all"
    pieces = TensorReader({0: folder, 1: near[1]}, mine=near)
    assert pieces.kinds == ["exp_avg", "weight"]
    weight, average = torch.zeros(4), torch.zeros(10)
    pieces.want("weight", "w", 3, weight)
    pieces.want("exp_avg", "w", 0, average)
    pieces.read()
    assert weight.tolist() == [3, 4, 5, 6]
    assert average.tolist() == list(range(10))
    pieces.want("weight", "w", 8, torch.zeros(4))
    with pytest.raises(RunFailed, match="it has no weight of w"):
        pieces.read()
    content = bytearray((folder / "part_1.safetensors").read_bytes())
    content[-1] ^= 1
    (folder / "part_1.safetensors").write_bytes(bytes(content))
    with pytest.raises(catalog.CorruptCheckpoint, match=r"part_1\.safetensors is not what was written"):
        parts.check(folder, cursor, tmp_path / "again")
    assert catalog.newest(checkpoints) is None
