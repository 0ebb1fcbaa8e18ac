"""Clusters of several nodes: what is started on which of them, and what becomes of a training when one dies.

More of the latter is a campaign of its own: ``python -m tests.faults``.
"""

import json
import random
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

from raysft.cli import main
from raysft.train.checkpoint import catalog
from tests.faults import nodes
from tests.faults.runs import CLOSE, prepare, said


def test_training_goes_on_with_fewer_workers_when_a_node_dies(local_ray, tmp_path):
    prepare(tmp_path)
    assert main(["train", str(tmp_path / "faults.yaml"), "run.name=left-alone"]) == 0
    with nodes.nodes() as cluster:
        assert_survives(cluster, tmp_path, "node", nodes.ELASTIC, "2 workers", "1 worker")
        cluster.add()
        assert_survives(cluster, tmp_path, "groups", nodes.GROUPS, "2 groups of 2 workers", "2 workers")
    exported = {run: newest_exported(tmp_path / "runs" / run) for run in ("left-alone", "node")}
    assert exported["node"].keys() == exported["left-alone"].keys()
    for name, weight in exported["node"].items():
        np.testing.assert_allclose(weight, exported["left-alone"][name], atol=CLOSE, err_msg=name)


def assert_survives(
    cluster: nodes.Nodes, folder: Path, name: str, settings: tuple[str, ...], first: str, then: str
) -> None:
    """A training with some settings goes on with so many workers when a node dies, and says so."""
    outcome = nodes.dies_under(cluster, folder, "left-alone", "a node dies", random.Random(1), name, settings)
    printed = said(folder, name)
    assert outcome.good, f"{outcome}\n{printed}"
    before, restarts, after = printed.partition("; restarting the workers")
    assert f" {first} × " in before
    assert restarts, "it says why"
    assert f"with {then}\n" in after, "and what it goes on with"


def newest_exported(run: Path) -> dict[str, np.ndarray]:
    """Export the newest checkpoint, and return its weights."""
    newest = catalog.newest(run / "checkpoints")
    assert newest is not None
    output = run.parent / f"{run.name}-exported"
    assert main(["export", f"{run}/checkpoints/{newest.cursor.step}", "--output", str(output)]) == 0
    return load_file(output / "model.safetensors")


ASKED = """
import json, os, sys
import ray
from raysft.cluster.connect import alive_nodes
from raysft.config import load
from raysft.errors import RequestError
from raysft.estimate import hardware
from raysft.estimate.hardware import ask, smallest_node
from raysft.estimate.storage import check_shared, write_beside

ray.init(address=sys.argv[1], log_to_driver=False)
hardware.ASK_SECONDS = 200
nodes, config = alive_nodes(), load(sys.argv[2], ["run.storage=runs"])
node, memory = smallest_node([node for node in nodes if node.cpus < 3], use_gpu=False)
try:
    check_shared(config, nodes)
    refused = ""
except RequestError as error:
    refused = str(error)
probe = config.run_place.parent.local / f"probe{os.getpid()}"
probe.write_text("")
answers = ask(nodes, write_beside, str(probe))
written = len(list(probe.parent.glob(f"{probe.name}-*")))
print(json.dumps([len(nodes), node.cpus, memory.total, refused, answers, written]))
"""
PLACED = """
import json, sys
from pathlib import Path
import numpy as np
import ray, ray.train
from raysft.cluster.connect import cluster
from raysft.config import load, with_overrides
from raysft.data.prepare import prepare
from raysft.data.rows.packed_dataset import PackedDataset
from raysft.data.shards import build, ray_pipeline
from raysft.run.resources import check_resources
from raysft.storage.run_directory import RunDirectory
from raysft.telemetry.events import TrainingEnded
from raysft.train import dataset_config, launch
from raysft.train.event_pump import emitter
from raysft.train.job import TrainJob

folder = Path.cwd()

def here():
    return ray.get_runtime_context().get_node_id()

def noted(tokenizer):
    (folder / f"tokenized-{here()}").touch()
    return tokenizer

class Noted:
    # A tokenizer that notes where it arrives.
    def __init__(self, tokenizer):
        self.tokenizer = tokenizer

    def __reduce__(self):
        return noted, (self.tokenizer,)

class Signed(PackedDataset):
    # Rows that know where they were made.
    def batch(self, rows):
        return {**super().batch(rows), "node": np.full(len(rows), int(here()[:15], 16))}

def look(settings):
    # In place of a training: which rows a worker gets, and from where.
    job, context = settings["job"], ray.train.get_context()
    rank, workers = context.get_world_rank(), context.get_world_size()
    shard = ray.train.get_dataset_shard(dataset_config.TRAIN)
    tables = shard.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=2)
    makers, numbers = set(), []
    for batch in job.train_rows.batches(tables, workers):
        makers |= {f"{node:015x}" for node in batch["node"].tolist()}
        numbers.append(batch["row"].tolist())
    wanted = [job.train_rows.rows_for_rank(step, rank, workers).tolist() for step in range(job.train_rows.row_plan.steps)]
    answer = {"node": here()[:15], "makers": sorted(makers), "right": numbers == wanted}
    (folder / f"{job.config.run.name}-{rank}.json").write_text(json.dumps(answer))
    if rank == 0:
        emitter(settings["mailbox"])(TrainingEnded({}, {}))

launch.train_worker, ray_pipeline.LOCAL_BYTES = look, -1
load_tokenizer = build.Tokenizer.load
build.Tokenizer.load = lambda *arguments: Noted(load_tokenizer(*arguments))
config = load(sys.argv[2], ["run.storage=runs", f"scaling.address={sys.argv[1]}", "scaling.cpus_per_worker=1.5"])
ways = {
    "packed": (1, {"scaling.num_workers": 2}),
    "spread": (64, {"scaling.num_workers": 2, "scaling.placement": "spread", "scaling.data_label": "role=data"}),
}
labelled = with_overrides(config, ways["spread"][1])
with cluster(labelled) as nodes:
    kinds = {node.id[:15]: (node.cpus, node.use) for node in nodes}
    prepared = prepare(labelled, str(folder / "base"))
    tokenized = [path.name.partition("-")[2][:15] for path in folder.glob("tokenized-*")]
    rows = Signed.from_dict(prepared.train_rows.to_dict())
    for name, (split_workers, changes) in ways.items():
        dataset_config.SPLIT_WORKERS = split_workers
        changed = with_overrides(config, {**changes, "run.name": name})
        check_resources(changed, nodes)
        launch._fit(TrainJob(changed, "", RunDirectory.of(changed.run_place), rows, {}), look, lambda event: None)
    (shard,) = rows.node_shards(0, [next(node.id for node in nodes if node.cpus == 3)], "role=data")
    (table, *_) = shard.iter_batches(prefetch_batches=0)
    read_for_another = f"{table['node'][0].as_py()[0]:015x}"
print(json.dumps([kinds, tokenized, read_for_another]))
"""


@pytest.fixture(scope="module")
def several(tmp_path_factory) -> Iterator[tuple[str, Path]]:
    """The address of a cluster, and a folder: a head without CPUs, nodes with 2, 3 and 1 CPUs, and one with 2 for data."""
    folder = tmp_path_factory.mktemp("nodes")
    prepare(folder)
    (folder / "runs").mkdir()
    others = [{"num_cpus": 3}, {"num_cpus": 1}, {"num_cpus": 2, "labels": {"role": "data"}}]
    with nodes.nodes(head=0, count=1, others=others) as cluster:
        yield cluster.address.partition("=")[2], folder


def answer_of(several: tuple[str, Path], script: str, before: tuple[str, ...] = ()) -> Any:
    """What a driver prints that works in the folder."""
    address, folder = several
    command = [*before, sys.executable, "-c", script, address, str(folder / "faults.yaml")]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_every_node_is_asked_for_its_memory_and_writes_to_the_storage(several):
    count, cpus, total, refused, answers, written = answer_of(several, ASKED)
    assert (count, cpus) == (5, 2.0), "of the others, those with two CPUs have less memory for each"
    assert total > 1 << 28
    assert (refused, answers, written) == ("", [""] * 5, 5)


OWN_MOUNTS = ("unshare", "--mount", "--map-root-user")
"""Before a command: it has mounts of its own, as a program on another machine has."""


def has_own_mounts() -> bool:
    try:
        return not subprocess.run([*OWN_MOUNTS, "true"], capture_output=True, check=False, timeout=30).returncode
    except OSError:
        return False


@pytest.mark.skipif(not has_own_mounts(), reason="this machine lets no program have mounts of its own")
def test_a_relative_folder_that_is_another_one_on_other_nodes_is_refused(several):
    mount = f'mount -t tmpfs none {several[1]}/runs && exec "$@"'
    _, _, _, refused, answers, written = answer_of(several, ASKED, (*OWN_MOUNTS, "sh", "-c", mount, "sh"))
    assert refused.startswith(f"run.storage: {several[1]}/runs is another folder on node ")
    assert refused.endswith("; use a folder that every node shares, or a URI (s3://…)")
    assert (answers, written) == (["is another folder"] * 5, 0)


def test_workers_and_data_tasks_run_where_they_should(several):
    """A worker needs 1.5 CPUs. The head has none, and one node has too few."""
    folder = several[1]
    kinds, tokenized, read_for_another = answer_of(several, PLACED)
    assert Counter(map(tuple, kinds.values())) == Counter(
        {(0, "training"): 1, (1, "training"): 1, (2, "training"): 1, (3, "training"): 1, (2, "data"): 1}
    )
    (data,) = (node for node, (_, use) in kinds.items() if use == "data")
    assert tokenized == [data]
    assert read_for_another == data
    found = {
        way: [json.loads((folder / f"{way}-{rank}.json").read_text()) for rank in range(2)]
        for way in ("packed", "spread")
    }
    assert all(worker["right"] for way in found.values() for worker in way)
    packed, spread = ([worker["node"] for worker in found[way]] for way in ("packed", "spread"))
    assert [kinds[node][0] for node in packed] == [3, 3], "the only node with room for both"
    assert all(worker["makers"] == [worker["node"]] for worker in found["packed"]), "each node reads its own rows"
    assert len(set(spread)) == 2
    assert all(kinds[node] in ([2, "training"], [3, "training"]) for node in spread)
    assert all(worker["makers"] == [data] for worker in found["spread"]), "tasks make the rows on the node for data"
