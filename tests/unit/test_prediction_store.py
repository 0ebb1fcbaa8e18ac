"""Predictions that are kept as they come: what of them is gone on with."""

import json
from pathlib import Path

import pytest

from raysft.generate.prediction_store import PredictionStore


def entry(id: str) -> dict:
    return {"id": id, "predict": "x"}


def ids(journal: PredictionStore) -> list[str]:
    return [entry.id for entry in journal.open()]


def begun(folder: Path) -> PredictionStore:
    journal = PredictionStore(folder / "out.jsonl", "here")
    assert journal.open() == []
    journal.append([entry("a"), entry("b")])
    journal.close()
    return PredictionStore(folder / "out.jsonl", "here")


def test_entries_of_a_call_that_died_are_there_for_the_next(tmp_path):
    assert ids(begun(tmp_path)) == ["a", "b"]
    assert PredictionStore(tmp_path / "out.jsonl", "other").open() == []


@pytest.mark.parametrize("line", ["[]", "null", "{", '{"other": 1}', "[1]"])
@pytest.mark.parametrize("place", [0, 1])
def test_lines_that_are_no_entries_are_begun_anew(tmp_path, place, line):
    journal, partial = begun(tmp_path), tmp_path / ".out.jsonl.partial"
    lines = partial.read_text().splitlines()
    partial.write_text("\n".join([*lines[:place], line, *lines[place + 1 :]]) + "\n")
    assert journal.open() == []
    journal.append([entry("c")])
    journal.close()
    assert ids(PredictionStore(tmp_path / "out.jsonl", "here")) == ["c"]


def test_an_output_is_complete_under_its_own_settings_and_without_failures(tmp_path):
    journal = begun(tmp_path)
    journal.open()
    journal.finish([entry("a"), entry("b")], {"runtime": 1.0}, failed=1)
    assert journal.finished() is None
    assert ids(journal) == ["a", "b"], "for the call that tries the failed one again"
    journal.finish([entry("a"), entry("b")], {"runtime": 1.0})
    facts = journal.finished()
    assert facts is not None
    assert facts["runtime"] == 1.0
    assert not (tmp_path / ".out.jsonl.partial").exists()
    assert PredictionStore(tmp_path / "out.jsonl", "other").finished() is None
    for torn in ("[]", "null", "{", json.dumps({**facts, "bytes": 1})):
        (tmp_path / ".out.jsonl.done").write_text(torn)
        assert journal.finished() is None
