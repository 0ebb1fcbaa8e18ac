"""A worker that makes no progress reports itself, keeps its stacks, and ends; who keeps whom waiting is told in one line."""

from __future__ import annotations

import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path

import pytest

from raysft.storage.path import StoragePath
from raysft.telemetry.events import WorkerHangs, WorkersAlive, WorkerSlow
from raysft.telemetry.hangs import Hangs, diagnosis
from raysft.telemetry.terminal import Terminal
from raysft.telemetry.train_log import TrainLog
from raysft.train.phases import Phases, StepTimes
from raysft.train.watchdog import Watchdog
from tests.unit.test_train_log import set_up

HANG_MINUTES = 0.01


class Ended(Exception):
    pass


def hang(rank: int, phase: str, step: int = 812, ends: bool = False, workers: int = 4) -> WorkerHangs:
    return WorkerHangs(rank, workers, f"host-{rank}", step, phase, 240, "", ends)


def test_a_worker_that_waits_for_rows_is_found_and_ends(tmp_path):
    ended, reports = threading.Event(), []
    phases = Phases()
    phases.step = 7
    watchdog = Watchdog(
        phases, 3, 4, "host, GPU 5", StoragePath.of(tmp_path / "diagnosis"), reports.append, HANG_MINUTES,
        end=lambda code: ended.set() or watchdog._closing.set(),
    )  # fmt: skip
    with watchdog:
        phases.enter("data")
        assert ended.wait(20)
    first, last = reports
    assert (first.rank, first.place, first.step, first.phase, first.ends) == (3, "host, GPU 5", 7, "data", False)
    assert last.ends
    stacks = (tmp_path / "diagnosis" / first.stacks).read_text()
    assert stacks.startswith("worker 3 (host, GPU 5), step 7: no progress in data for ")
    assert "test_a_worker_that_waits_for_rows" in stacks


def test_a_limit_of_any_length_can_be_given(tmp_path):
    with Watchdog(Phases(), 0, 1, "host", StoragePath.of(tmp_path), print, 1e300, end=pytest.fail) as watchdog:
        watchdog._look()


def test_a_worker_ends_though_its_stacks_cannot_be_kept(tmp_path, monkeypatch):
    ended, reports, phases = threading.Event(), [], Phases()
    watchdog = Watchdog(
        phases, 0, 1, "host", StoragePath.of(tmp_path), reports.append, HANG_MINUTES,
        end=lambda code: ended.set() or watchdog._closing.set(),
    )  # fmt: skip
    with watchdog:
        monkeypatch.setattr("tempfile.TemporaryFile", lambda *_, **__: (_ for _ in ()).throw(OSError(28, "disk full")))
        phases.enter("data")
        assert ended.wait(20)
    assert {report.stacks for report in reports} == {""}


def test_a_file_that_a_killed_process_left_is_in_nobodys_way(tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    watchdogs = [Watchdog(Phases(), 0, 1, "host", StoragePath.of(tmp_path), print, 1) for _ in range(2)]
    with watchdogs[0], watchdogs[1]:
        assert len(list(tmp_path.glob("raysft-stacks-*"))) == 2
    assert list(tmp_path.iterdir()) == []


def test_progress_keeps_a_worker_alive_and_a_step_that_takes_long_is_no_hang(tmp_path):
    reports: list = []
    now = [0.0]
    phases = Phases(lambda: now[0])
    with Watchdog(phases, 1, 2, "host", StoragePath.of(tmp_path), reports.append, 15, end=pytest.fail) as watchdog:
        phases.enter("evaluation")
        for _ in range(20):
            now[0] += 100
            watchdog._look()
            phases.progress()
        phases.step_took(StepTimes(200, 0, 0))
        phases.enter("backward")
        now[0] += 440
        watchdog._look()
        assert reports == []
        now[0] += 1000  # 1,440 s: less than ten steps
        watchdog._look()
    assert [(report.phase, report.seconds, report.ends) for report in reports] == [("backward", 1440, False)]


def test_a_large_model_may_take_longer_to_load_than_a_step():
    phases = Phases()
    watchdog = Watchdog(phases, 0, 2, "host", StoragePath.of("/tmp"), print, 15)
    assert watchdog.limits("forward") == (120, 900)
    assert watchdog.limits("setup") == (480, 3600)
    phases.step_took(StepTimes(100.0, 0, 0))
    assert watchdog.limits("forward") == (450, 1000)
    assert Watchdog(Phases(), 0, 1, "host", StoragePath.of("/tmp"), print, None).limits("data") == (120, None)


def test_a_worker_that_holds_the_interpreter_ends_too(tmp_path):
    """A loop in C that lets no other thread of Python run."""
    script = f"""
        import re
        from raysft.storage.path import StoragePath
        from raysft.train import watchdog
        from raysft.train.phases import Phases
        watchdog.LEAST_SECONDS = 0.5
        phases = Phases()
        with watchdog.Watchdog(phases, 0, 2, "host", StoragePath.of({str(tmp_path)!r}), print, {HANG_MINUTES}):
            import time; time.sleep(0.3)
            phases.enter("data")
            re.match(r"(a+)+b", "a" * 40)
    """
    begun = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)], timeout=60, check=False, cwd=Path(__file__).parents[2]
    )
    assert done.returncode == 1
    assert time.monotonic() - begun < 50


def test_the_first_worker_shows_that_it_is_alive(tmp_path, monkeypatch):
    monkeypatch.setattr("raysft.train.watchdog.ALIVE_SECONDS", 0.1)
    reports: list = []
    with Watchdog(Phases(), 0, 1, "host", StoragePath.of(tmp_path), reports.append, 0.05):
        time.sleep(0.6)
    assert WorkersAlive(0, "setup") in reports


@pytest.mark.parametrize(
    ("reports", "line"),
    [
        ([hang(0, "forward", workers=1)], "no progress for 4 minutes: worker 0 (host-0) computes a forward pass"),
        ([hang(rank, "setup", workers=2) for rank in range(2)], "worker 0 (host-0) loads the model; worker 1 (host-1)"),
        ([hang(rank, "data", workers=6) for rank in range(6)], "worker 3 (host-3) waits for its rows; 2 more likewise"),
        ([hang(0, "step", workers=7)], "workers 1, 2, 3, 4 and 2 more do not respond; 1 other waits in step"),
        ([hang(0, "step", workers=2), hang(1, "backward", workers=2)], "1 other waits in step; 1 other waits in backward"),
        ([hang(0, "data", ends=True, workers=1)], "; the workers will restart from the newest checkpoint"),
    ],
)  # fmt: skip
def test_who_keeps_whom_waiting(reports, line):
    assert line in diagnosis(reports, "runs/r/diagnosis")


def test_reports_of_a_moment_are_one_line(tmp_path):
    told: list = []
    hangs = Hangs(lambda step, line: told.append((step, line)), "d", gather_seconds=0.2)
    for rank, phase in enumerate(("backward", "data", "backward")):
        hangs.add(hang(rank, phase, workers=3))
    time.sleep(0.6)
    assert told == [
        (812, "no progress for 4 minutes: worker 1 (host-1) waits for its rows; 2 others wait in backward; stacks: d")
    ]


def test_findings_are_printed_and_kept_for_the_report(tmp_path, capsys):
    from raysft.report.read_run import read_lines

    log = TrainLog(tmp_path / "trainer_log.jsonl", Terminal(), stacks="d")
    log(set_up(0))
    log(WorkerSlow(20, 1, "host", 1.37, "forward pass 0.55 s instead of 0.40 s"))
    log(WorkersAlive(20, "forward"))
    assert "step 20: worker 1 (host) is 1.37 times as slow as the others: forward pass" in capsys.readouterr().out
    (line,) = read_lines(tmp_path / "diagnosis.jsonl")
    assert line["step"] == 20
