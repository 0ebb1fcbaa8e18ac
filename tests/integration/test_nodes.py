"""A cluster of several nodes, of which one dies. More of this is a campaign of its own: ``python -m tests.faults``."""

import random

from tests.faults import nodes
from tests.faults.runs import attempt, prepare, said


def test_training_goes_on_with_fewer_workers_when_a_node_dies(tmp_path):
    prepare(tmp_path)
    assert attempt(tmp_path, "left-alone", None) == 0, said(tmp_path, "left-alone")
    outcome = nodes.dies_in_training(tmp_path, "left-alone", "a node dies in training", random.Random(1))
    printed = said(tmp_path, "node")
    assert outcome.good, f"{outcome}\n{printed}"
    assert "; restarting the workers" in printed, "it says why"
    assert "with 1 worker\n" in printed, "and what it goes on with"
