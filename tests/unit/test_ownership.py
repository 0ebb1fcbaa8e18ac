"""A run directory keeps what was decided when its training began."""

from __future__ import annotations

from pathlib import Path

import pytest

from raysft.config import Config, parse
from raysft.errors import RequestError
from raysft.run.ownership import check_ownership, differences, with_recorded_batch_size
from raysft.storage.run_directory import RunDirectory


def config(folder: Path, **train) -> Config:
    return parse(
        {
            "run": {"name": "r", "storage": str(folder)},
            "model": {"path": "m"},
            "data": {"train": [{"name": "a", "path": "a.jsonl"}]},
            "train": train,
        }
    )


def begun(folder: Path, **train) -> RunDirectory:
    directory = RunDirectory(folder / "r")
    directory.path.mkdir()
    directory.config.write_text(config(folder, **train).to_yaml())
    directory.trainer_log.write_text("")
    return directory


def test_auto_goes_on_with_the_number_that_the_run_began_with(tmp_path):
    directory = begun(tmp_path, global_batch_size=4)
    auto = config(tmp_path)
    assert auto.train.global_batch_size == "auto"
    check_ownership(directory, auto)
    assert with_recorded_batch_size(directory, auto) == config(tmp_path, global_batch_size=4)
    assert (
        with_recorded_batch_size(directory, auto).numerics_keys()
        == config(tmp_path, global_batch_size=4).numerics_keys()
    )


def test_with_more_epochs_auto_keeps_its_number_and_only_the_epochs_differ(tmp_path):
    directory = begun(tmp_path, global_batch_size=4)
    longer = config(tmp_path, epochs=50)
    assert differences(directory, longer) == {"train.epochs": [1, 50]}
    assert with_recorded_batch_size(directory, longer).train.global_batch_size == 4


def test_another_number_is_another_config(tmp_path):
    directory = begun(tmp_path, global_batch_size=4)
    with pytest.raises(RequestError, match=r"train\.global_batch_size=8 \(the run has 4\)"):
        check_ownership(directory, config(tmp_path, global_batch_size=8))


def test_before_anything_is_trained_the_data_decides(tmp_path):
    directory = begun(tmp_path, global_batch_size=4)
    directory.trainer_log.unlink()
    assert with_recorded_batch_size(directory, config(tmp_path)).train.global_batch_size == "auto"


def test_auto_is_the_number_that_it_stands_for(tmp_path):
    auto = config(tmp_path)  # rows of 2,048 tokens
    assert auto.train.micro_batch_size == "auto"
    assert differences(begun(tmp_path, micro_batch_size=1), auto) == {}


def test_auto_is_another_config_where_it_stands_for_another_number(tmp_path):
    assert differences(begun(tmp_path, micro_batch_size=2), config(tmp_path)) == {"train.micro_batch_size": [2, 1]}


@pytest.mark.parametrize("left", ["plan.json", "rejected.jsonl", ".plan.json.5ac1", ".config.yaml.5ac1", ".lock"])
def test_a_run_that_ended_before_its_config_was_there_starts_again(tmp_path, left):
    directory = RunDirectory(tmp_path / "r")
    directory.path.mkdir()
    (directory.path / left).write_text("{}")
    assert check_ownership(directory, config(tmp_path)) == {}


@pytest.mark.parametrize("left", ["notes.txt", "my-plan.json", "config.yml", ".git"])
def test_a_folder_with_other_files_is_refused(tmp_path, left):
    directory = RunDirectory(tmp_path / "r")
    directory.path.mkdir()
    (directory.path / left).write_text("{}")
    with pytest.raises(RequestError, match="is not empty, but contains no config"):
        check_ownership(directory, config(tmp_path))
