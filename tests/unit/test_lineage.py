"""A run that goes on from another run's checkpoint: its checkpoints, its log, and the record of it."""

import json
from pathlib import Path

import pytest

from raysft.errors import RunFailed
from raysft.storage.path import StoragePath
from raysft.train.checkpoint import catalog, parts
from raysft.tune.lineage import adopt, read_lineage
from tests.unit.test_async_writer import part

STEPS = 9


@pytest.fixture(params=["local", "remote"])
def trials(request, tmp_path) -> StoragePath:
    """A folder for run directories, on this disk and in an object store."""
    if request.param == "local":
        return StoragePath.of(tmp_path / "trials")
    server = request.getfixturevalue("server")
    return StoragePath.of(server.uri(f"{tmp_path.name}/trials"))


def trial(trials: StoragePath, name: str, *saved: int, loss: float) -> StoragePath:
    """A run that has trained nine steps and kept checkpoints of some."""
    run = trials / name
    for step in saved:
        parts.write(part(step), run / "checkpoints" / catalog.folder_name(step, name))
    log = [{"current_steps": step, "loss": loss + step} for step in range(1, STEPS + 1)]
    (run / "trainer_log.jsonl").write_text("".join(json.dumps(record) + "\n" for record in log))
    return run


def log(run: StoragePath) -> list[float]:
    return [json.loads(line)["loss"] for line in (run / "trainer_log.jsonl").read_text().splitlines()]


def test_the_other_run_up_to_its_checkpoint_becomes_the_past(trials):
    behind, ahead = trial(trials, "behind", 3, 8, loss=100), trial(trials, "ahead", 6, 9, loss=0)
    adopt(behind, ahead, 6)
    (only,) = catalog.complete(behind / "checkpoints")
    (same,) = [folder for folder in catalog.complete(ahead / "checkpoints") if "00000006" in folder.name]
    assert {name: (only / name).read_bytes() for name in only.walk()} == {
        name: (same / name).read_bytes() for name in same.walk()
    }
    assert log(behind) == [1, 2, 3, 4, 5, 6]
    assert read_lineage(behind) == [{"trial": "ahead", "step": 6}]
    assert len(list(catalog.complete(ahead / "checkpoints"))) == 2
    assert log(ahead) == [1, 2, 3, 4, 5, 6, 7, 8, 9]
    assert read_lineage(ahead) == []


def test_what_was_adopted_is_not_adopted_again(trials):
    behind, ahead = trial(trials, "behind", loss=100), trial(trials, "ahead", 6, loss=0)
    adopt(behind, ahead, 6)
    parts.write(part(7), behind / "checkpoints" / catalog.folder_name(7, "own"))
    adopt(behind, ahead, 6)
    newest = catalog.newest(behind / "checkpoints")
    assert newest
    assert newest.cursor.step == 7
    assert len(read_lineage(behind)) == 1
    third = trial(trials, "third", 9, loss=0)
    adopt(behind, third, 9)
    assert read_lineage(behind) == [{"trial": "ahead", "step": 6}, {"trial": "third", "step": 9}]


def test_a_half_written_line_of_a_running_trial_is_left_out(trials):
    behind, ahead = trial(trials, "behind", loss=100), trial(trials, "ahead", 6, loss=0)
    (ahead / "trainer_log.jsonl").write_text('{"current_steps": 1, "loss": 1.0}\n{"current_steps": 2, "lo')
    adopt(behind, ahead, 6)
    assert log(behind) == [1.0]


def test_a_checkpoint_that_is_gone_is_one_line_and_nothing_is_lost(trials):
    behind, ahead = trial(trials, "behind", 3, loss=100), trial(trials, "ahead", 9, loss=0)
    with pytest.raises(RunFailed, match=r"ahead: the checkpoint after step 6 no longer exists.*raise train\.keep_last"):
        adopt(behind, ahead, 6)
    assert len(list(catalog.complete(behind / "checkpoints"))) == 1
    assert log(behind)[0] == 101


def test_what_is_no_file_has_no_lineage(tmp_path):
    assert read_lineage(StoragePath.of(Path(tmp_path) / "nothing")) == []
