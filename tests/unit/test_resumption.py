"""What may change in a run that has begun, what is refused, and that a refusal leaves all as it was."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from raysft.config import Config, documented_fields, parse, with_overrides
from raysft.config.resume_effects import EFFECTS, Effect, effect_of
from raysft.data.rows.packed_dataset import PackedDataset
from raysft.errors import RequestError
from raysft.run.ownership import check_ownership, differences
from raysft.run.resumption import ROW_PLAN, Resumption, check_resumption, record_changes
from raysft.storage.run_directory import RunDirectory
from raysft.train.checkpoint import catalog, parts
from raysft.train.checkpoint.cursor import EVALUATION, PREDICTION, Best, Cursor
from tests import messages
from tests.shards import data_config, the_set, write_records, written
from tests.tiny import tiny_tokenizer

IDENTITY = {"the model": "m", "the data of source 'a'": "d", EVALUATION: "e"}


def config(folder: Path, **changes: Any) -> Config:
    base = parse(
        {
            "run": {"name": "r", "storage": str(folder)},
            "model": {"path": "m"},
            "data": {"train": [{"name": "a", "path": "a.jsonl"}], "holdout": 0.1},
            "train": {"global_batch_size": 4, "eval_every_steps": 1, "early_stopping": {"patience": 9}},
        }
    )
    return with_overrides(base, {key.replace("__", "."): value for key, value in changes.items()})


def begun(folder: Path, step: int | None = 4, done: bool = False, best: Best | None = None) -> RunDirectory:
    """A run that was begun with ``config(folder)`` and has a checkpoint."""
    directory = RunDirectory(folder / "r")
    directory.path.mkdir()
    directory.config.write_text(config(folder).to_yaml())
    directory.trainer_log.write_text("{}\n")
    if step is not None:
        cursor = Cursor(step, 4 * step, 0, dict(IDENTITY), best)
        part = parts.Snapshot(0, {"weight:0:w": torch.zeros(2)}, {}, cursor)
        parts.write(part, directory.checkpoints / catalog.folder_name(step, "a"))
    if done:
        (directory.path / "model").mkdir()
        (directory.path / "model" / "config.json").write_text("{}")
        for stage in ("train", "eval", "all"):
            directory.results(stage).write_text("{}")
    return directory


def content(directory: RunDirectory) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in directory.path.rglob("*") if path.is_file()}


def goes_on(directory: RunDirectory, steps: int, identity: dict[str, str] = IDENTITY, **changes: Any) -> Cursor | None:
    """Ask with ``--allow-changed``; steps are those of the whole training then."""
    asked = config(directory.path.parent, **changes)
    changed = check_ownership(directory, asked, allow_changed=True)
    return check_resumption(directory, asked, planned(steps), identity, changed, allow_changed=True).cursor


def planned(steps: int) -> Any:
    """Rows of which nothing but the number of steps counts."""
    rows = PackedDataset(("a-all-d/manifest.parquet",), 64, 4)
    rows.__dict__["row_plan"] = SimpleNamespace(steps=steps)
    return rows


def refusal(directory: RunDirectory, *arguments: Any, **changes: Any) -> str:
    before = content(directory)
    message = messages.refusal(goes_on, directory, *arguments, **changes)
    assert content(directory) == before, "nothing is rewritten"
    return message.removeprefix(f"{directory.place}: ")


def test_every_key_of_the_config_is_decided_and_none_else():
    documented = [key for key, _, _ in documented_fields()]
    assert sorted(documented) == sorted(EFFECTS)


@pytest.mark.parametrize(
    ("key", "effect"),
    [
        ("train.epochs", Effect.NOW),
        ("train.optimizer_options.rank", Effect.NEVER),
        ("train.early_stopping.patience", Effect.NOW),
        ("data.train.3.columns.output", Effect.EPOCH),
        ("data.train.0.path", Effect.NOW),
        ("data.eval.0.format", Effect.NOW),
        ("generate.top_k", Effect.ALWAYS),
        ("the data of source 'x'", Effect.EPOCH),
        ("the adapter", Effect.NEVER),
    ],
)
def test_keys_inside_lists_and_mappings_are_decided_with_them(key, effect):
    assert effect_of(key) is effect


def test_without_leave_a_changed_key_is_refused_with_both_values_and_the_ways_out(tmp_path):
    directory = begun(tmp_path)
    with pytest.raises(RequestError) as caught:
        check_ownership(directory, config(tmp_path, train__epochs=3, train__learning_rate=0.5))
    assert str(caught.value) == (
        f"{directory.place}: belongs to another config: train.epochs=3 (the run has 1), train.learning_rate=0.5 (the run has "
        "0.0001); choose another run.name, or resume with --allow-changed"
    )
    assert check_ownership(directory, config(tmp_path, generate__top_k=3, train__save_every_minutes=None)) == {}


@pytest.mark.parametrize("allow_changed", [False, True])
def test_what_the_state_depends_on_is_refused_even_with_leave(tmp_path, allow_changed):
    directory = begun(tmp_path)
    with pytest.raises(RequestError) as caught:
        check_ownership(directory, config(tmp_path, train__epochs=3, model__lora__rank=4), allow_changed)
    message = str(caught.value)
    assert "model.lora.rank=4 (the run has 8); model.lora.rank cannot change" in message
    assert "train.epochs" not in message, "that may change"
    assert message.endswith("choose another run.name")


def test_where_nothing_was_kept_all_may_change(tmp_path):
    directory = begun(tmp_path, step=None)
    assert goes_on(directory, 6, model__lora__rank=4) is None
    anew = Resumption(None, planned(6), planned(6), differences(directory, config(tmp_path, model__lora__rank=4)))
    assert record_changes(directory, anew).endswith(
        "has no checkpoint and starts from the beginning with model.lora.rank=4 (before: 8)"
    )


def test_a_run_that_is_done_trains_on_where_there_is_more_to_train(tmp_path):
    directory = begun(tmp_path, done=True)
    cursor = goes_on(directory, 6, train__epochs=3)
    assert cursor
    assert cursor.step == 4
    assert refusal(directory, 4, train__learning_rate=0.5) == (
        "the run has done 4 steps, but with train.learning_rate=0.5 (the run has 0.0001) it has 4 in all; "
        "raise train.epochs or train.max_steps, or choose another run.name"
    )
    assert "has done 4 steps, but with train.max_steps=3" in refusal(directory, 3, train__max_steps=3)
    done = check_resumption(directory, config(tmp_path), planned(4), {"the model": "another"}, {})
    assert done.cursor is None, "it is just done"


def test_a_run_that_is_done_without_a_checkpoint_cannot_train_on(tmp_path):
    directory = begun(tmp_path, step=None, done=True)
    message = refusal(directory, 6, train__epochs=3)
    assert message.startswith("is already trained, but has no checkpoint to resume from (train.save_every_steps ")
    assert "choose another run.name" in message


def test_an_interrupted_run_may_end_where_it_is_but_not_before(tmp_path):
    directory = begun(tmp_path)
    cursor = goes_on(directory, 4, train__max_steps=4)
    assert cursor
    assert cursor.step == 4
    assert refusal(directory, 3, train__max_steps=3).startswith("the run has done 4 steps, but ")


def test_a_run_that_stopped_early_goes_on_only_with_more_patience(tmp_path):
    best = Best(step=1, since=3, results={"eval_loss": 1.0}, seen=4)
    directory = begun(tmp_path, done=True, best=best)
    told = refusal(directory, 12, train__epochs=2, train__early_stopping__patience=3)
    assert told.startswith("the last evaluations before step 4 brought no improvement")
    assert told.endswith("raise train.early_stopping.patience=3, set it to null, or choose another run.name")
    assert goes_on(directory, 12, train__epochs=2, train__early_stopping__patience=4)
    assert goes_on(directory, 12, {**IDENTITY, EVALUATION: "other sets"}, train__early_stopping__patience=3)


@pytest.mark.parametrize("what", ["the model", "the data of source 'a'"])
def test_other_files_under_the_same_name_are_refused(tmp_path, what):
    directory = begun(tmp_path)
    for changes in ({}, {"train__epochs": 3}):
        assert refusal(directory, 6, {**IDENTITY, what: "other"}, **changes) == (
            f"{what} changed since this run's checkpoint after step 4; restore the old files, or choose another run.name"
        )
    assert goes_on(directory, 6, model__path="elsewhere/m", data__train__0__path="elsewhere/a.jsonl"), "the same files"


def test_what_changed_is_recorded_with_the_step_and_the_run_is_done_no_more(tmp_path):
    directory = begun(tmp_path, done=True)
    asked = config(tmp_path, train__epochs=3)
    it = check_resumption(directory, asked, planned(6), IDENTITY, check_ownership(directory, asked, allow_changed=True))
    line = record_changes(directory, it)
    assert line == f"{directory.place}: resumes after step 4 with train.epochs=3 (before: 1)"
    assert json.loads(directory.changes.read_text()) == {"after_step": 4, "changed": {"train.epochs": [1, 3]}}
    assert not directory.is_done()
    assert directory.is_trained(), "its model stays until there is another"
    assert not list(directory.path.glob("*_results.json"))


@pytest.fixture(scope="module")
def sources(tmp_path_factory) -> dict[str, PackedDataset]:
    """Rows of 20 examples, of 12 others and of 8 more, one in each."""
    folder = tmp_path_factory.mktemp("sources")
    tiny_tokenizer().save_pretrained(folder / "model")
    found = {}
    for name, count in (("a", 20), ("b", 12), ("c", 8)):
        write_records(folder / f"{name}.jsonl", [[f"{name} {number}", "yes"] for number in range(count)])
        each = the_set(data_config(folder, [name]), str(folder / "model"))
        written(each, str(folder / "model"))
        found[name] = PackedDataset((each.manifest.location,), 64, 4, epochs=4, layout="single")
    return found


def with_data(
    directory: RunDirectory, rows: PackedDataset, key: str, allow_changed: bool = True, **changes: Any
) -> Resumption:
    """Ask with other data; 20 examples are an epoch of 5 steps."""
    asked = config(directory.path.parent, **{"train__epochs": 4, **changes})
    changed = check_ownership(directory, asked, allow_changed=True)
    identity = {**IDENTITY, "the data of source 'a'": key}
    return check_resumption(directory, asked, rows, identity, changed, allow_changed)


def trained_with(directory: RunDirectory, scheduled: PackedDataset, **changes: Any) -> None:
    """As a run leaves it that was let through."""
    directory.plan.write_text(json.dumps({ROW_PLAN: scheduled.to_dict()}))
    directory.config.write_text(config(directory.path.parent, **{"train__epochs": 4, **changes}).to_yaml())


def test_other_data_comes_with_the_next_epoch_and_stays_so(tmp_path, sources):
    directory = begun(tmp_path, step=7)
    trained_with(directory, sources["a"])
    with pytest.raises(RequestError, match=r", or use the new data from the next epoch on with --allow-changed$"):
        with_data(directory, sources["b"], "other", allow_changed=False)
    it = with_data(directory, sources["b"], "other")
    assert it.rows == replace(sources["b"], earlier=replace(sources["a"], epochs=2))
    assert it.rows.row_plan.steps == 2 * 5 + 2 * 3
    assert record_changes(directory, it).endswith(
        "resumes after step 7 from epoch 3 on with the data of source 'a'='other' (before: 'd')"
    )
    told = {"after_step": 7, "changed": {"the data of source 'a'": ["d", "other"]}, "from_epoch": 3}
    assert json.loads(directory.changes.read_text()) == told
    # Killed before its next checkpoint, it goes on as was let through; changed once more, that comes with epoch 3, too.
    trained_with(directory, it.rows)
    again = with_data(directory, sources["b"], "other", allow_changed=False)
    assert again.rows == it.rows
    assert not again.changes
    third = with_data(directory, sources["c"], "third")
    assert third.rows == replace(sources["c"], earlier=replace(sources["a"], epochs=2))


def test_what_is_trained_in_three_parts_keeps_each(tmp_path, sources):
    directory = begun(tmp_path, step=11)
    trained_with(directory, replace(sources["b"], earlier=replace(sources["a"], epochs=2)))
    it = with_data(directory, sources["c"], "third")
    assert it.from_epoch == 4
    before = replace(sources["b"], epochs=3, earlier=replace(sources["a"], epochs=2))
    assert it.rows == replace(sources["c"], earlier=before)
    assert it.rows.row_plan.rows_of_epochs == [20, 20, 12, 8]


def test_other_data_without_an_epoch_to_come_is_refused(tmp_path, sources):
    directory = begun(tmp_path, step=4)
    trained_with(directory, replace(sources["a"], epochs=1), train__epochs=1)
    with pytest.raises(RequestError) as caught:
        with_data(directory, replace(sources["b"], epochs=1), "other", train__epochs=1)
    assert str(caught.value) == (
        f"{directory.place}: the data of source 'a' can change from epoch 2 on, but train.epochs=1; "
        "raise train.epochs, restore the old data, or choose another run.name"
    )
    more = with_data(directory, replace(sources["b"], epochs=2), "other", train__epochs=2)
    assert more.rows.row_plan.rows_of_epochs == [20, 12]


def test_with_max_steps_other_data_comes_with_the_next_epoch_and_repeats_until_they_are_done(tmp_path, sources):
    """Five steps an epoch before, then three: 10 steps, 3, and 1 of the next epoch."""
    directory = begun(tmp_path, step=7)
    settings: dict[str, Any] = {"train__epochs": 1, "train__max_steps": 14}
    endless = {name: replace(rows, epochs=1, max_steps=14, repeat=True) for name, rows in sources.items()}
    trained_with(directory, endless["a"], **settings)
    it = with_data(directory, endless["b"], "other", **settings)
    assert it.from_epoch == 3
    assert it.rows.row_plan.steps == 14
    assert it.rows.row_plan.rows_of_epochs == [20, 20, 12, 4]
    shorter: dict[str, Any] = {"train__epochs": 1, "train__max_steps": 10}
    with pytest.raises(RequestError) as caught:
        with_data(directory, replace(endless["b"], max_steps=10), "other", **shorter)
    assert str(caught.value) == (
        f"{directory.place}: the data of source 'a' can change from epoch 3 on, but train.max_steps=10; "
        "raise train.max_steps, restore the old data, or choose another run.name"
    )


def test_other_data_within_a_fraction_of_an_epoch_comes_with_the_next_one(tmp_path, sources):
    directory = begun(tmp_path, step=7)
    half = {name: replace(rows, epochs=1.5) for name, rows in sources.items()}
    trained_with(directory, half["a"], train__epochs=1.5)
    with pytest.raises(RequestError, match=r"can change from epoch 3 on, but train\.epochs=1\.5; raise train\.epochs"):
        with_data(directory, half["b"], "other", train__epochs=1.5)
    it = with_data(directory, replace(half["b"], epochs=2.5), "other", train__epochs=2.5)
    assert it.rows.row_plan.rows_of_epochs == [20, 20, 8], "half of three steps, rounded up, of four rows"


def test_other_data_that_has_not_come_yet_can_be_put_back(tmp_path, sources):
    """Let through, killed before its epoch began, and asked for as it was: nothing of the last epoch is another."""
    directory = begun(tmp_path, step=4)
    trained_with(directory, replace(sources["b"], epochs=2, earlier=replace(sources["a"], epochs=1)), train__epochs=2)
    back = with_data(directory, replace(sources["a"], epochs=1), "d", train__epochs=1)
    assert back.rows.row_plan.rows_of_epochs == [20]
    assert dict(back.changes) == {"train.epochs": [2, 1]}


@pytest.mark.parametrize(
    ("changes", "identity", "reason"),
    [
        ({}, {}, ""),
        ({"generate__every_steps": 3}, {}, ""),
        ({}, {PREDICTION: "q"}, "generate settings"),
        ({}, {EVALUATION: "f"}, "different data is now evaluated"),
        ({"train__best_metric": "predict_rouge-1"}, {}, "a different metric"),
    ],
)
def test_a_best_model_that_does_not_count_any_more_is_told(tmp_path, changes, identity, reason):
    metric = "predict_rouge-l"
    cursor = Cursor(4, 16, 0, IDENTITY | {PREDICTION: "p"}, Best(2, 1, {metric: 12.5}, 12.5, 4, True, metric, False))
    asked = config(
        tmp_path, **{"train__keep_best": True, "train__best_metric": metric, "generate__every_steps": 2, **changes}
    )
    resumption = Resumption(cursor, planned(6), planned(6), {})
    now = IDENTITY | {PREDICTION: "p"} | identity
    line = resumption.forgotten_best(asked, now)
    assert bool(line) == bool(reason)
    assert (resumption.best(asked, now) is None) == bool(reason)
    assert reason in line
    if reason:
        assert "step 2 with predict_rouge-l=12.5" in line
        assert "from step 4 on" in line
        assert "\n" not in line
