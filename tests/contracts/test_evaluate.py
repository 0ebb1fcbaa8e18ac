"""evaluate: where it keeps the modules that it has fetched."""

from __future__ import annotations

from evaluate import loading

from tests.contracts.contract import Contract

EVALUATE = Contract("evaluate", "raysft/generate/metrics/script.py")


def test_modules_are_kept_in_a_folder_that_can_be_asked_for():
    EVALUATE.positional(EVALUATE.name(loading, "init_dynamic_modules"), 0)
