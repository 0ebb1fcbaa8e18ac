"""The table of a running sweep."""

import io
import time

import pytest
import rich.console

from raysft.tune.ranking import Objectives
from raysft.tune.record import State, TrialRecord
from raysft.tune.table import TrialTable

LOSS = Objectives(("eval_loss",), (1.0,))


def trial(number: int, state: State, **changes) -> TrialRecord:
    now = time.time()
    ended = {} if state == "running" else {"ended": now}
    given = {"started": now - 60, "step": 30, "metrics": {"eval_loss": 2 + number / 8, "total_steps": 90}, **ended}
    return TrialRecord(
        f"t{number}", number, f"t{number}", {"train.learning_rate": number / 10}, 1, state, **given | changes
    )


@pytest.fixture
def table():
    console = rich.console.Console(file=io.StringIO(), force_terminal=True, width=100, height=10)
    found = TrialTable(LOSS, total=20, concurrent=2, console=console)
    yield found
    found.close()


def shown(table: TrialTable) -> str:
    text = io.StringIO()
    rich.console.Console(file=text, width=100).print(table.render())
    return text.getvalue()


def test_a_row_holds_what_a_trial_has_and_the_time_that_it_still_takes(table):
    table.show(trial(1, "running"))
    (row,) = [line for line in shown(table).splitlines() if "0.1" in line]
    cells = [cell.strip() for cell in row.strip("│").split("│")]
    # 30 steps in 60 seconds, so 60 steps take 120 more.
    assert cells == ["1", "train.learning_rate=0.1", "30/90", "2.1250", "running", "0:02:00"]


@pytest.mark.parametrize(("width", "columns"), [(40, 3), (50, 4), (65, 5), (80, 6)])
def test_a_narrow_terminal_shows_values_and_metrics_before_the_rest(width, columns):
    console = rich.console.Console(file=io.StringIO(), force_terminal=True, width=width, height=30)
    table = TrialTable(LOSS, total=20, concurrent=2, console=console)
    table.show(trial(1, "running"))
    table.close()
    text = io.StringIO()
    rich.console.Console(file=text, width=width).print(table.render())
    rows = [line.strip("│") for line in text.getvalue().splitlines() if "│" in line]
    lines = [[cell.strip() for cell in row.split("│")] for row in rows]
    assert {len(line) for line in lines} == {columns}
    values = "".join(line[0 if columns == 3 else 1] for line in lines)
    assert values == "train.learning_rate=0.1"
    assert "2.1250" in lines[0]


def test_trials_that_run_come_first_and_the_terminal_is_not_overrun(table):
    table.show(trial(0, "running"))
    for number in range(1, 9):
        table.show(trial(number, "done"))
    rows = [line.split("│")[1].strip() for line in shown(table).splitlines() if "learning_rate" in line]
    assert rows == ["0", "8", "7", "6"]


def test_the_title_counts_and_estimates(table):
    table.show(trial(0, "running"))
    assert shown(table).splitlines()[0].strip() == "20 trials: 1 running"
    table.show(trial(1, "done"))
    table.show(trial(2, "failed", metrics={}))
    table.show(trial(0, "stopped"))
    # Each took 60 seconds, 17 are to come, two at a time.
    assert shown(table).splitlines()[0].strip() == "20 trials: 1 done, 1 stopped, 1 failed; about 0:08:30 left"
