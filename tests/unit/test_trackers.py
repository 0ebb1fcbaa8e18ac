"""Metrics reach the trackers, and a tracker that fails does not disturb the training."""

from __future__ import annotations

import json
import re
import shutil
import struct
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import nullcontext, suppress
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from raysft.errors import RunFailed, RunStopped
from raysft.run.tracking import _closing
from raysft.storage.run_directory import RunDirectory
from raysft.telemetry import trackers, trackio_internals
from raysft.telemetry.events import EvaluationDone, GenerationDone
from raysft.telemetry.terminal import Terminal
from raysft.telemetry.tracker_labels import Labels
from raysft.telemetry.tracker_writers import Writer
from raysft.telemetry.trackers import missing_tracker, open_sweep, open_trackers
from raysft.telemetry.train_log import TrainLog
from tests.servers import http, serving, silent
from tests.unit.test_train_log import set_up, step


def scalars(folder) -> dict[str, list[tuple[int, float]]]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder))
    events.Reload()
    return {name: [(point.step, point.value) for point in events.Scalars(name)] for name in events.Tags()["scalars"]}


def test_tensorboard_has_steps_sources_and_evaluations(tmp_path):
    for begin, last in ((0, 4), (2, 3)):
        time.sleep(1.1)  # files of one second are not always read in their order
        (tracker,) = open_trackers(["tensorboard"], RunDirectory(tmp_path), {})
        tracker.on_setup(asdict(set_up(begin)))
        for number in range(begin + 1, last + 1):
            tracker.on_step(replace(step(number, loss=float(number + begin)), source_losses={"a": 0.5}))
        tracker.on_evaluate({"current_steps": last, "eval_loss": 2.0, "eval_tokens": 9, "epoch": 1.0})
        tracker.close()
    found = scalars(tmp_path / "tensorboard")
    assert found["train/loss"] == [(1, 1.0), (2, 2.0), (3, 5.0)]
    assert found["eval/loss"] == [(3, 2.0)]
    assert found["train/source_loss/a"][0] == (1, 0.5)
    assert {"train/lr", "train/grad_norm", "train/throughput", "train/loss_token_throughput"} <= found.keys()
    assert "train/mfu" not in found
    assert "eval/tokens" not in found


def test_a_tracker_without_its_package_is_named(monkeypatch):
    assert missing_tracker(["tensorboard"]) is None
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert missing_tracker(["wandb"]) == "wandb"


@pytest.mark.parametrize("name", ["wandb", "mlflow", "swanlab", "trackio"])
def test_a_tracker_whose_package_is_missing_is_named(name, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(RuntimeError, match=f"cannot open {name} .*{name}"):
        open_trackers([name], RunDirectory(tmp_path), {})


def logged(name: str, place: Path, labels: Labels | None = None, first: int = 1, last: int = 1) -> Any:
    """Log steps of a run to a tracker, and return the library's run."""
    place.mkdir(parents=True, exist_ok=True)
    config = {"train": {"learning_rate": 0.1}}
    (tracker,) = open_trackers([name], RunDirectory(place), config, pytest.fail, labels)
    tracker.on_setup(asdict(set_up(first - 1)))
    for number in range(first, last + 1):
        tracker.on_step(step(number, loss=1.0 / number))
    tracker.on_evaluate({"current_steps": last, "eval_loss": 2.0, "eval_tokens": 9, "epoch": 1.0})
    tracker.close()
    return getattr(tracker._writer, "_run", None)


def wandb_run(place: Path, sweep: str | None = None) -> Any:
    return logged("wandb", place, Labels(place.name, sweep))


def test_the_trials_of_a_sweep_are_a_group_in_wandb(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    one = wandb_run(tmp_path / "a" / "lr-0.1", "a")
    assert (one.name, one.group, one.job_type) == ("lr-0.1", "a", "trial")
    assert one.config["train"] == {"learning_rate": 0.1}
    # Values make a trial's name, so another sweep has a trial of this name, which is another run of W&B.
    assert wandb_run(tmp_path / "b" / "lr-0.1", "b").id != one.id
    assert wandb_run(tmp_path / "a" / "lr-0.1", "a").id == one.id
    alone = wandb_run(tmp_path / ("long" * 36))
    assert (alone.group or None, alone.job_type or None) == (None, None)
    assert len(alone.id) <= 128


@pytest.fixture(scope="module")
def empty_database(tmp_path_factory) -> Path:
    """MLflow's, made once: it makes fifty changes to the first version of its tables, and waits for the disk after each."""
    import mlflow

    path = tmp_path_factory.mktemp("mlflow") / "mlflow.db"
    mlflow.MlflowClient(f"sqlite:///{path}").search_experiments()
    return path


@pytest.fixture
def mlflow_store(tmp_path, monkeypatch, empty_database):
    """A client of an empty MLflow store."""
    import mlflow

    monkeypatch.chdir(tmp_path)  # for its files
    shutil.copy(empty_database, tmp_path / "mlflow.db")
    before = mlflow.get_tracking_uri()
    mlflow.set_tracking_uri(f"sqlite:///{tmp_path}/mlflow.db")
    yield mlflow.MlflowClient()
    mlflow.set_tracking_uri(before)


def test_the_trials_of_a_sweep_are_nested_runs_in_mlflow_and_a_resumed_sweep_has_no_second_parent(
    tmp_path, mlflow_store
):
    def log(place: str, config: dict, sweep: str | None = None) -> None:
        labels = Labels(Path(place).name, sweep)
        (tracker,) = open_trackers(["mlflow"], RunDirectory(tmp_path / place), config, pytest.fail, labels)
        tracker.on_setup(asdict(set_up(0)))
        tracker.on_step(step(1, loss=2.5))
        tracker.close()

    def runs() -> dict[str, Any]:
        experiment = mlflow_store.get_experiment_by_name("raysft")
        return {run.info.run_name: run for run in mlflow_store.search_runs([experiment.experiment_id])}

    log("alone", {})
    for trials in (["one", "two"], ["two", "three"]):
        (sweep,) = open_sweep(["tensorboard", "wandb", "mlflow"], {"tune": {}}, pytest.fail, Labels("search", "search"))
        assert runs()["search"].info.status == "RUNNING"
        for number, trial in enumerate(trials):
            log(f"search/trials/{trial}", {"train": {"learning_rate": number}, "data": {"train": []}}, "search")
        sweep.close()
    # A trial that runs by itself, of a sweep that MLflow does not know.
    log("other/trials/one", {}, "other")
    found = runs()
    parents = {name: run.data.tags.get("mlflow.parentRunId") for name, run in found.items()}
    search, other = found["search"].info.run_id, found["other"].info.run_id
    assert parents["two"] == parents["three"] == search
    assert parents["alone"] is parents["search"] is parents["other"] is None
    assert found["three"].data.metrics["train/loss"] == 2.5
    # The second trial began with the rate 1; MLflow keeps a parameter as it was.
    assert found["two"].data.params == {"train.learning_rate": "1", "data.train": "[]"}
    assert {found[name].info.status for name in found} == {"FINISHED"}
    experiment = mlflow_store.get_experiment_by_name("raysft")
    every = mlflow_store.search_runs([experiment.experiment_id])
    assert sorted(run.data.tags.get("mlflow.parentRunId", "") for run in every) == sorted(
        ["", "", "", search, search, search, other]
    )


MINE = Labels("own", None, "a project", "a name", ("quick", "team=nlp"), "a group")
"""Names that a config gives."""


@pytest.fixture
def variables(monkeypatch):
    """Names that the environment gives, as each library's own variables have them; none of them asks a server."""
    import wandb

    given = {
        "WANDB_PROJECT": "env-project", "WANDB_NAME": "env-name", "WANDB_RUN_GROUP": "env-group", "WANDB_TAGS": "x,y",
        "MLFLOW_EXPERIMENT_NAME": "env-project", "SWANLAB_PROJECT_NAME": "env-project", "SWANLAB_EXPERIMENT_NAME": "env-name",
        "SWANLAB_EXPERIMENT_GROUP": "env-group", "SWANLAB_EXPERIMENT_TAGS": "x,y",
    }  # fmt: skip
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    wandb.teardown()  # it reads them once
    yield
    wandb.teardown()


@pytest.fixture(autouse=True)
def _offline(monkeypatch):
    for name in ("WANDB_PROJECT", "WANDB_NAME", "WANDB_RUN_GROUP", "WANDB_TAGS", "MLFLOW_EXPERIMENT_NAME"):
        monkeypatch.delenv(name, raising=False)
    for name, value in {"WANDB_MODE": "offline", "WANDB_SILENT": "true", "SWANLAB_MODE": "offline"}.items():
        monkeypatch.setenv(name, value)


def wandb_names(run: Any) -> tuple:
    return run.project, run.name, tuple(run.tags), run.group or None


def test_wandb_shows_the_names_of_the_config(tmp_path):
    assert wandb_names(logged("wandb", tmp_path / "own", MINE)) == MINE_EXPECTED
    assert wandb_names(logged("wandb", tmp_path / "own")) == ("raysft", "own", (), None)
    trial = replace(MINE, name="lr-1", sweep="search", group=None)
    assert wandb_names(logged("wandb", tmp_path / "lr-1", trial))[1::2] == ("a name-lr-1", "search")


MINE_EXPECTED = ("a project", "a name", ("quick", "team=nlp"), "a group")


@pytest.mark.usefixtures("variables")
def test_wandb_takes_names_from_its_variables_where_the_config_has_none(tmp_path):
    assert wandb_names(logged("wandb", tmp_path / "own")) == ("env-project", "env-name", ("x", "y"), "env-group")
    assert wandb_names(logged("wandb", tmp_path / "own", MINE)) == MINE_EXPECTED


def swanlab_names(run: Any) -> tuple:
    settings = run._ctx.config.settings
    return settings.project.name, run.name, tuple(settings.experiment.tags), settings.experiment.group


def test_swanlab_shows_the_names_of_the_config(tmp_path):
    pytest.importorskip("swanlab")
    mine = replace(MINE, project="a.project")
    expected = ("a.project", *MINE_EXPECTED[1:])
    assert swanlab_names(logged("swanlab", tmp_path / "own", mine)) == expected
    assert swanlab_names(logged("swanlab", tmp_path / "own")) == ("raysft", "own", (), None)
    trial = Labels("lr-1", "search")
    assert swanlab_names(logged("swanlab", tmp_path / "lr-1", trial)) == ("raysft", "lr-1", (), "search")


@pytest.mark.usefixtures("variables")
def test_swanlab_takes_names_from_its_variables_where_the_config_has_none(tmp_path):
    pytest.importorskip("swanlab")
    assert swanlab_names(logged("swanlab", tmp_path / "own")) == ("env-project", "env-name", ("x", "y"), "env-group")


def swanlab_points(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """Metric → steps and values that SwanLab has written for a later upload."""
    from swanlab.proto.swanlab.record.v1.record_pb2 import Record
    from swanlab.sdk.internal.core_python.store import DataStoreReader

    found: dict[str, list[tuple[int, float]]] = {}
    for file in sorted(folder.glob("run-*/*.swanlab")):
        reader = DataStoreReader()
        reader.open(file)
        while (data := reader.scan()) is not None:
            record = Record()
            record.ParseFromString(data)
            if record.WhichOneof("record_type") == "scalar":
                found.setdefault(record.scalar.key, []).append((record.scalar.step, record.scalar.value.number))
    return found


def test_mlflow_has_an_experiment_names_and_tags(tmp_path, mlflow_store, monkeypatch):
    logged("mlflow", tmp_path / "own", MINE)
    monkeypatch.setenv("MLFLOW_EXPERIMENT_NAME", "env-project")
    logged("mlflow", tmp_path / "other")
    logged("mlflow", tmp_path / "own", MINE)
    experiments = {each.name: each.experiment_id for each in mlflow_store.search_experiments()}
    assert {"a project", "env-project"} <= experiments.keys()
    (mine,), (other,) = (mlflow_store.search_runs([experiments[name]]) for name in ("a project", "env-project"))
    assert (mine.info.run_name, mine.data.tags["quick"], mine.data.tags["team"]) == ("a name", "true", "nlp")
    assert other.info.run_name == "other"
    monkeypatch.delenv("MLFLOW_EXPERIMENT_NAME")
    monkeypatch.setenv("MLFLOW_EXPERIMENT_ID", experiments["a project"])
    logged("mlflow", tmp_path / "third")
    assert len(mlflow_store.search_runs([experiments["a project"]])) == 2


def test_mlflow_has_each_step_once_after_a_crash(tmp_path, mlflow_store):
    place = tmp_path / "own"
    logged("mlflow", place, last=5)
    (place / "trainer_log.jsonl").touch()  # as a training leaves it
    logged("mlflow", place, first=3, last=7)  # from the checkpoint of step 2
    (run,) = mlflow_store.search_runs([mlflow_store.get_experiment_by_name("raysft").experiment_id])
    points = [(each.step, each.value) for each in mlflow_store.get_metric_history(run.info.run_id, "train/loss")]
    assert points == [(number, 1.0 / number) for number in range(1, 8)]
    assert [each.step for each in mlflow_store.get_metric_history(run.info.run_id, "eval/loss")] == [5, 7]


def test_mlflow_takes_metrics_of_any_name(tmp_path, mlflow_store):
    (tracker,) = open_trackers(["mlflow"], RunDirectory(tmp_path / "own"), {}, pytest.fail)
    tracker.on_setup(asdict(set_up(0)))
    odd = ("hit@1", "f1 (macro), %", "a=b", "准确率", "p//q/")
    tracker.on_generate({"current_steps": 1, **{f"predict_{name}": 0.5 for name in odd}, "predict_chrf": 1.0})
    tracker.on_step(step(2))
    tracker.close()
    (run,) = mlflow_store.search_runs([mlflow_store.get_experiment_by_name("raysft").experiment_id])
    found = {name for name in run.data.metrics if name.startswith("predict/")}
    assert found == {f"predict/{name}" for name in ("hit_1", "f1 _macro__ _", "a_b", "准确率", "p/q", "chrf")}
    assert run.data.metrics["train/loss"] == 1.0


@pytest.mark.parametrize(("goes_on", "steps"), [(True, [6]), (False, [4, 5, 6])])
def test_a_training_that_starts_anew_under_a_known_name_is_in_wandb_whole(tmp_path, monkeypatch, goes_on, steps):
    import wandb

    rows: list[dict[str, Any]] = []
    known = SimpleNamespace(  # as the server knows a run of which it got the first five steps
        summary={"last_steps": {"train": 5, "eval": 5}},
        log=rows.append,
        define_metric=lambda *names, **settings: None,
        finish=lambda **how: None,
    )
    monkeypatch.setattr(wandb, "init", lambda **settings: known)
    place = tmp_path / "own"
    place.mkdir()
    if goes_on:
        (place / "trainer_log.jsonl").touch()
    logged("wandb", place, first=4, last=6)
    assert [row["train/global_step"] for row in rows if "train/loss" in row] == steps


@pytest.fixture
def trackio_store(tmp_path, monkeypatch):
    """trackio's database, in a folder of this test; the library reads its variable when it is imported."""
    pytest.importorskip("trackio")
    from trackio import sqlite_storage, utils

    for module in (sqlite_storage, utils):
        monkeypatch.setattr(module, "TRACKIO_DIR", tmp_path / "trackio")
    return sqlite_storage.SQLiteStorage


def test_trackio_has_names_and_each_step_once_after_a_crash(tmp_path, trackio_store):
    mine, place = replace(MINE, project="p"), tmp_path / "a" / "own"
    run = logged("trackio", place, mine, last=5)
    (place / "trainer_log.jsonl").touch()
    again = logged("trackio", place, mine, first=3, last=7)
    assert again.id == run.id
    assert (run.project, run.name, run.group) == ("p", "a name", "a group")
    logs = trackio_store.get_logs("p", "a name", run_id=run.id)
    points = [(entry["step"], entry["train/loss"]) for entry in logs if "train/loss" in entry]
    assert points == [(number, 1.0 / number) for number in range(1, 8)]
    assert [entry["step"] for entry in logs if "eval/loss" in entry] == [5, 7]
    # Another training with the same name is another run, and a trial is in the group of its sweep.
    other = logged("trackio", tmp_path / "b" / "own", Labels("own", "search", "p", "a name"))
    assert (other.id != run.id, other.name, other.group) == (True, "a name-own", "search")
    assert logged("trackio", tmp_path / "c").project == "raysft"


def test_swanlab_has_steps_and_evaluations_and_goes_on_in_its_run(tmp_path):
    pytest.importorskip("swanlab")
    place = tmp_path / "own"
    run = logged("swanlab", place, last=3)
    points = swanlab_points(place / "swanlog")
    assert [number for number, _ in points["train/loss"]] == [1, 2, 3]
    assert [value for _, value in points["train/loss"]] == pytest.approx([1, 1 / 2, 1 / 3])
    assert points["eval/loss"] == [(3, 2.0)]
    assert logged("swanlab", place, first=4, last=4).id == run.id
    assert logged("swanlab", tmp_path / "b" / "own").id != run.id


class Shown:
    """What each tracker has of the run in ``place``: metric → steps and values."""

    def __init__(self, place: Path, mlflow_store: Any, trackio_store: Any) -> None:
        self._place, self._mlflow, self._trackio = place, mlflow_store, trackio_store

    def __call__(self, name: str) -> dict[str, list[tuple[int, float]]]:
        return getattr(self, f"_{name}_points")()

    def _tensorboard_points(self):
        return scalars(self._place / "tensorboard")

    def _swanlab_points(self):
        return swanlab_points(self._place / "swanlog")

    def _mlflow_points(self):
        experiment = self._mlflow.get_experiment_by_name("raysft").experiment_id
        (run,) = self._mlflow.search_runs([experiment])
        return {
            key: [(each.step, each.value) for each in self._mlflow.get_metric_history(run.info.run_id, key)]
            for key in run.data.metrics
        }

    def _trackio_points(self):
        (record,) = self._trackio.get_run_records("raysft")
        found: dict[str, list[tuple[int, float]]] = {}
        for entry in self._trackio.get_logs("raysft", record["name"], run_id=record["id"]):
            for key, value in entry.items():
                found.setdefault(key, []).append((entry["step"], value))
        return found

    def _wandb_points(self):
        """Of the newest start, which replaces the one before it when both are sent to the server."""
        return wandb_points(max(self._place.glob("wandb/offline-run-*/*.wandb")))


def wandb_points(file: Path) -> dict[str, list[tuple[int, float]]]:
    from google.protobuf.message import DecodeError
    from wandb.proto import wandb_internal_pb2

    Record: Any = wandb_internal_pb2.Record  # type: ignore[attr-defined]  # which a generated module has
    found: dict[str, list[tuple[int, float]]] = {}
    records, kinds, until = [], [], time.monotonic() + 30
    while "exit" not in kinds:  # a process of W&B's own writes them
        assert time.monotonic() < until, f"no end in {file}: {kinds}"
        with suppress(DecodeError):  # it writes the last one now
            records = [Record.FromString(data) for data in leveldb_records(file.read_bytes())]
        kinds = [record.WhichOneof("record_type") for record in records]
    for record in records:
        if record.WhichOneof("record_type") == "history":
            row = {item.key or ".".join(item.nested_key): json.loads(item.value_json) for item in record.history.item}
            for key, value in row.items():
                found.setdefault(key, []).append((row["train/global_step"], value))
    return found


def leveldb_records(data: bytes, block: int = 2**15) -> Iterator[bytes]:
    """Yield the records of a log as LevelDB writes them: in blocks, whose first bytes are W&B's own header."""
    place, record = 7, b""
    while place < len(data):
        if block - place % block < 7:  # too little is left of a block for a header
            place += block - place % block
            continue
        _, length, kind = struct.unpack_from("<IHB", data, place)
        record += data[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (1, 4):  # whole, or the last part
            yield record
            record = b""


@pytest.fixture
def shown(tmp_path, mlflow_store, trackio_store):
    pytest.importorskip("swanlab")
    (tmp_path / "own").mkdir()
    return Shown(tmp_path / "own", mlflow_store, trackio_store)


ALL = ("tensorboard", "wandb", "mlflow", "swanlab", "trackio")


def score(at: int) -> dict[str, Any]:
    return {"current_steps": at, "predict_chrf": 30.0 + at, "predict_examples": 8}


def evaluation(at: int) -> dict[str, Any]:
    return {"current_steps": at, "eval_loss": 1.0 + 1 / at, "eval_tokens": 9, "epoch": 1.0}


@pytest.mark.parametrize("dies", [True, False], ids=["the driver died", "the workers died"])
@pytest.mark.parametrize("name", ALL)
def test_a_tracker_gets_what_it_lacks_of_the_log(tmp_path, name, dies, shown):
    log = tmp_path / "own" / "trainer_log.jsonl"

    def start() -> tuple[Any, TrainLog]:
        (tracker,) = open_trackers([name], RunDirectory(log.parent), {}, pytest.fail)
        return tracker, TrainLog(log, Terminal(), [tracker])

    tracker, train_log = start()
    train_log(set_up(0))
    train_log(step(1, loss=1.0))
    train_log(step(2, loss=0.5))
    train_log(EvaluationDone({**evaluation(2), "eval_perplexity": 4.5, "eval_accuracy": 0.25}))
    train_log(step(3, loss=0.25))
    if dies:
        tracker.close("stopped")
        time.sleep(1.1)  # TensorBoard does not always read files of one second in their order
        tracker, train_log = start()
    # The workers got further than the driver, which knows nothing of steps 4 and 5: the checkpoint has their records.
    missed = [asdict(step(4, loss=0.125)), evaluation(4), asdict(step(5, loss=0.0625))]
    train_log(set_up(5, [asdict(step(2, loss=0.5)), asdict(step(3, loss=0.25)), *missed]))
    train_log(step(6, loss=0.03125))
    # Scores of predictions that were made beside the training.
    train_log(GenerationDone(score(2)))
    train_log(step(7, loss=0.015625))
    train_log(GenerationDone(score(4)))
    train_log(GenerationDone(score(6)))
    tracker.close()
    found = shown(name)
    if name == "swanlab":  # its server, or what sends the files to it, takes each step of a metric once
        found = {key: sorted(set(points)) for key, points in found.items()}
    assert found["train/loss"] == [(number, 2.0 ** (1 - number)) for number in range(1, 8)]
    assert found["eval/loss"] == [(2, 1.5), (4, 1.25)]
    assert found["predict/chrf"] == [(2, 32.0), (4, 34.0), (6, 36.0)]


@pytest.mark.parametrize("name", ALL)
def test_steps_that_are_repeated_are_in_a_tracker_once(tmp_path, name, shown):
    log = tmp_path / "own" / "trainer_log.jsonl"
    (tracker,) = open_trackers([name], RunDirectory(log.parent), {}, pytest.fail)
    train_log = TrainLog(log, Terminal(), [tracker])
    for first, last in ((1, 3), (2, 4), (1, 5)):  # the last time from the start, without a checkpoint
        if first == 1:
            time.sleep(1.1)  # TensorBoard does not always read files of one second in their order
        train_log(set_up(first - 1))
        for number in range(first, last + 1):
            train_log(step(number, loss=1.0 / number))
    tracker.close()
    found = shown(name)["train/lr"]
    assert [number for number, _ in (sorted(set(found)) if name == "swanlab" else found)] == [1, 2, 3, 4, 5]


def test_a_server_of_trackio_that_does_not_tell_what_it_has_gets_nothing_twice(tmp_path, shown, monkeypatch):
    def cut(run: Any) -> Any:
        raise ConnectionError

    def train(first: int) -> None:
        log = tmp_path / "own" / "trainer_log.jsonl"
        (tracker,) = open_trackers(["trackio"], RunDirectory(log.parent), {}, pytest.fail)
        train_log = TrainLog(log, Terminal(), [tracker])
        train_log(set_up(first - 1))
        train_log(step(first))
        train_log(step(first + 1))
        tracker.close()

    train(1)
    monkeypatch.setattr(trackio_internals, "_logs", cut)
    train(3)
    assert [number for number, _ in shown("trackio")["train/loss"]] == [1, 2, 3, 4]


def test_mlflow_shows_how_a_run_ended_also_in_a_folder_with_a_quote(tmp_path, mlflow_store):
    def last(ending: BaseException | None) -> tuple[str, int]:
        (tracker,) = open_trackers(["mlflow"], RunDirectory(tmp_path / "it's" / "one"), {}, pytest.fail)
        with pytest.raises(type(ending)) if ending else nullcontext(), _closing([tracker]):
            tracker.on_setup(asdict(set_up(0)))
            if ending:
                raise ending
        runs = mlflow_store.search_runs([mlflow_store.get_experiment_by_name("raysft").experiment_id])
        return runs[0].info.status, len(runs)

    endings = [RunFailed("no memory"), RunStopped("by the scheduler"), KeyboardInterrupt(), None]
    assert [last(ending) for ending in endings] == [("FAILED", 1), ("KILLED", 1), ("KILLED", 1), ("FINISHED", 1)]


def test_wandb_marks_a_run_that_failed(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    codes = []
    for ending in (RunFailed("no memory"), RunStopped("by the scheduler")):
        (tracker,) = open_trackers(["wandb"], RunDirectory(tmp_path), {}, pytest.fail)
        writer: Any = tracker._writer
        monkeypatch.setattr(writer._run, "finish", lambda **given: codes.append(given["exit_code"]))
        with pytest.raises(type(ending)), _closing([tracker]):
            raise ending
    assert codes == [1, 0]


class Posting(Writer):
    """Sends metrics to a server without a time limit, as some tracker libraries do."""

    port = 0

    def __init__(self, run, config, labels) -> None:
        if config.get("greets"):
            self.write(0, {})

    def write(self, step, metrics) -> None:
        with urllib.request.urlopen(f"http://127.0.0.1:{self.port}/", json.dumps(metrics).encode()) as answer:
            json.load(answer)


@pytest.fixture
def hurried(monkeypatch):
    monkeypatch.setattr(trackers, "OPEN_SECONDS", 0.5)
    monkeypatch.setattr(trackers, "CLOSE_SECONDS", 0.5)
    monkeypatch.setitem(trackers.WRITERS, "wandb", Posting)


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        (silent, "no answer for 0.5 s"),
        (http("500 Internal Server Error"), "HTTP Error 500: Internal Server Error"),
        (http("403 Forbidden"), "HTTP Error 403: Forbidden"),
        (http("200 OK", b"<html>"), "Expecting value: line 1 column 1 (char 0)"),
        (http("200 OK", b"{", length=99), "IncompleteRead(1 bytes read, 98 more expected)"),
    ],
    ids=["silent", "fails", "forbids", "a page", "half an answer"],
)
@pytest.mark.usefixtures("hurried")
def test_a_server_that_fails_neither_ends_nor_holds_up_the_training(tmp_path, monkeypatch, answer, reason):
    lines: list[str] = []
    with serving(answer) as Posting.port:
        with pytest.raises(RuntimeError, match=re.escape(f"cannot open wandb ({reason})")):
            open_trackers(["wandb"], RunDirectory(tmp_path), {"greets": True}, lines.append)
        (tracker,) = open_trackers(["wandb"], RunDirectory(tmp_path), {}, lines.append)
        started = time.monotonic()
        tracker.on_setup(asdict(set_up(0)))
        for number in range(1, 100):
            tracker.on_step(step(number))
        assert time.monotonic() - started < 0.4
        tracker.close()
        assert time.monotonic() - started < 2
    assert lines == [f"wandb: disabled ({reason}); trainer_log.jsonl has all metrics"]


@pytest.mark.usefixtures("hurried")
def test_metrics_that_no_server_takes_do_not_fill_the_memory(tmp_path, monkeypatch):
    lines: list[str] = []
    monkeypatch.setattr(trackers, "MAX_QUEUED", 10)
    with serving(silent) as Posting.port:
        (tracker,) = open_trackers(["wandb"], RunDirectory(tmp_path), {}, lines.append)
        for number in range(1, 100):
            tracker.on_step(step(number))
    assert lines == ["wandb: disabled (10 writes are waiting); trainer_log.jsonl has all metrics"]
