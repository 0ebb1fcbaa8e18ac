"""Which placement groups nobody uses any more, and when they are removed."""

from __future__ import annotations

import pytest

from raysft.tune import abandoned
from raysft.tune.abandoned import AbandonedGroups, empty_groups

JOB = "02000000"
EMPTY, USED, OTHER, WAITING = f"{'a' * 28}{JOB}", f"{'b' * 28}{JOB}", f"{'c' * 28}03000000", f"{'d' * 28}{JOB}"
TOTAL = {f"bundle_group_{name}": 2000.0 for name in (EMPTY, USED, OTHER)} | {"CPU": 4.0}
FREE = TOTAL | {f"bundle_group_{USED}": 1999.999, "CPU": 1.0}


@pytest.fixture
def removed(monkeypatch) -> list[str]:
    """Ids of the groups that were removed."""
    groups = {name: {"state": "CREATED"} for name in (EMPTY, USED, OTHER)} | {WAITING: {"state": "PENDING"}}
    found: list[str] = []

    class Context:
        def get_job_id(self) -> str:
            return JOB

    monkeypatch.setattr(abandoned, "placement_group_table", lambda: groups)
    monkeypatch.setattr(abandoned.ray, "cluster_resources", lambda: TOTAL)
    monkeypatch.setattr(abandoned.ray, "available_resources", lambda: FREE)
    monkeypatch.setattr(abandoned.ray, "get_runtime_context", Context)
    monkeypatch.setattr(abandoned, "remove_placement_group", lambda group: found.append(group.id.hex()))
    return found


def test_only_groups_of_the_own_job_in_which_nothing_runs_are_empty(removed):
    assert empty_groups(JOB, TOTAL, FREE) == [EMPTY]


def test_a_group_that_stays_empty_after_a_failure_is_removed(removed):
    clock = [0.0]
    groups = AbandonedGroups(clock=lambda: clock[0])
    for clock[0] in range(20):
        groups.on_step_end(0, [])
    assert not removed, "no trial has failed"
    groups.on_trial_recover(0, [], None)
    for clock[0] in range(20, 30):
        groups.on_step_end(0, [])
    assert not removed, "its workers may still be coming"
    clock[0] = 31.0
    groups.on_step_end(0, [])
    assert removed == [EMPTY]


def test_a_group_that_was_used_in_between_starts_anew(removed, monkeypatch):
    clock = [0.0]
    groups = AbandonedGroups(clock=lambda: clock[0])
    groups.on_trial_error(0, [], None)
    for clock[0] in range(30):
        used = FREE | {f"bundle_group_{EMPTY}": 1999.999 if clock[0] % 8 == 0 else 2000.0}
        monkeypatch.setattr(abandoned.ray, "available_resources", lambda used=used: used)
        groups.on_step_end(0, [])
    assert not removed
