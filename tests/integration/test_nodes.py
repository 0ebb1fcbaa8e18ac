"""A cluster of several nodes, of which one dies. More of this is a campaign of its own: ``python -m tests.faults``."""

import json
import random
import subprocess
import sys

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


ASKED = """
import json, sys
import ray
from raysft.cluster.connect import alive_nodes
from raysft.config import load
from raysft.estimate.hardware import ask, smallest_node
from raysft.estimate.storage import check_shared, write_beside

ray.init(address=sys.argv[1], log_to_driver=False)
nodes = alive_nodes()
node, memory = smallest_node(nodes, use_gpu=False)
check_shared(load(sys.argv[2]), nodes)
print(json.dumps([len(nodes), node.cpus, memory.total, ask(nodes, write_beside, "/nowhere/probe")]))
"""


def test_every_node_is_asked_for_its_memory_and_for_the_storage(tmp_path):
    prepare(tmp_path)
    (tmp_path / "runs").mkdir()
    with nodes.nodes() as cluster:
        address = cluster.address.partition("=")[2]
        asked = [sys.executable, "-c", ASKED, address, str(tmp_path / "faults.yaml")]
        done = subprocess.run(asked, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    count, cpus, total, answers = json.loads(done.stdout.splitlines()[-1])
    assert (count, cpus) == (3, 2.0), "the nodes with two CPUs have less memory for each"
    assert total > 1 << 28
    assert answers == ["is another folder"] * 3
