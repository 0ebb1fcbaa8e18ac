"""Whatever a library logs in a worker's process begins with run, rank and node."""

from __future__ import annotations

import io
import logging
import warnings

import pytest

from raysft.telemetry.ray_metrics import WORKER_GAUGES
from raysft.telemetry.worker_log import named_lines
from raysft.train.phases import Phases, StepTimes
from raysft.train.step_metrics import worker_values

NAME = "100%, worker 3 (node-2, GPU 1)"


@pytest.fixture
def logged():
    """A library's logger with a handler of its own that passes nothing on, and what it writes."""
    stream, logger = io.StringIO(), logging.getLogger("some.library")
    handler = logging.StreamHandler(stream)
    handler.setFormatter(logging.Formatter("[%(levelname)s] %(message)s"))
    logger.addHandler(handler)
    logger.propagate = False
    yield stream
    logger.removeHandler(handler)
    logger.propagate = True


def test_lines_of_a_library_begin_with_the_worker_while_it_trains(logged, capsys):
    logger = logging.getLogger("some.library")
    with named_lines("100%", 3, "node-2, GPU 1"):
        logger.warning("50% done")
        logger.warning("%d%% of %s", 50, "all")
        logger.error(ValueError("a 5% error"))
        logger.warning("%(part)s", {"part": "a part"})
    logger.warning("later")
    assert logged.getvalue().splitlines() == [
        f"[WARNING] {NAME}: 50% done",
        f"[WARNING] {NAME}: 50% of all",
        f"[ERROR] {NAME}: a 5% error",
        f"[WARNING] {NAME}: a part",
        "[WARNING] later",
    ]
    assert capsys.readouterr().out == f"{NAME}: this process\n"


def test_records_have_fields_for_formatters_that_write_them(caplog):
    with named_lines("toy", 3, "node-2"):
        logging.getLogger("some").error("x")
    (record,) = (record for record in caplog.records if record.name == "some")
    assert (record.__dict__["run"], record.__dict__["rank"], record.__dict__["node"]) == ("toy", 3, "node-2")


def test_warnings_of_python_are_lines_too(caplog):
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        with named_lines("toy", 0, "node-1"):
            warnings.warn("old", stacklevel=1)
    (record,) = (record for record in caplog.records if record.name == "py.warnings")
    assert record.message.startswith("toy, worker 0 (node-1): ")
    assert "UserWarning: old" in record.message


def test_a_worker_tells_its_last_step_its_memory_and_how_long_it_has_been_idle():
    import torch

    now = [100.0]
    phases, device = Phases(lambda: now[0]), torch.device("cpu")
    assert worker_values(phases, device).keys() == WORKER_GAUGES.keys()
    assert worker_values(phases, device)["raysft_worker_step_seconds"] is None
    phases.step_took(StepTimes(2.0, 0.5, 0.75))
    now[0] = 130.0
    values = worker_values(phases, device)
    memory = values.pop("raysft_worker_memory_gibibytes")
    assert memory is not None
    assert 0 < memory < 100
    assert values == {
        "raysft_worker_step_seconds": 2.0,
        "raysft_worker_data_wait_seconds": 0.5,
        "raysft_worker_forward_seconds": 0.75,
        "raysft_worker_idle_seconds": 30.0,
    }
