"""The same rows in the same steps, whatever becomes of the code: hashes of plans and rows that earlier versions made.

A difference would change the data of every run that is resumed with a newer version.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from raysft.data.rows import mixture, row_layouts, row_plan
from raysft.data.rows.packed_dataset import PackedDataset
from raysft.data.rows.row_plan import RowPlan, SourceLengths, plan_rows
from tests.synthetic import write_set

RECORDED = Path(__file__).with_name("recorded_rows.json")
"""Name of a case → hash. Written by ``python -m tests.unit.test_recorded_rows``, by the code before it changed."""
CAPACITY = 64


def sources(weighted: bool) -> list[SourceLengths]:
    """Two sources in uneven shards; some examples of the second have a weight of their own."""
    random = np.random.default_rng(7)
    made = []
    for number, (size, weight) in enumerate(((700, 3.0), (1500, 1.0))):
        lengths = np.minimum(CAPACITY, 2 + random.exponential(14, size)).astype(np.int32)
        ends = np.unique([*np.sort(random.integers(1, size, 6)), size])
        weights = np.round(random.random(size), 2).astype(np.float32) if weighted and number else None
        made.append(SourceLengths(lengths, lengths - np.maximum(1, lengths // 3), ends, weight, weights))
    return made


def plans() -> Iterator[tuple[str, dict[str, Any]]]:
    """Every mixing, layout, number of epochs and kind of weights."""
    for layout in ("packed", "single", "joined"):
        for mixing in ("concat", "first_exhausted", "all_exhausted"):
            for shuffle in (True, False):
                for epochs, max_steps in ((1, None), (3, None), (3, 70), (3, 23)):
                    options = {"layout": layout, "mixing": mixing, "shuffle": shuffle, "epochs": epochs}
                    yield f"{json.dumps(options)} {max_steps}", {**options, "max_steps": max_steps}
        yield f"{layout} auto", {"layout": layout, "global_batch_size": None, "epochs": 2}
        yield f"{layout} one text", {"layout": layout, "document_mask": False, "capacity": 40}
        yield f"{layout} weighted", {"layout": layout, "weighted": True, "epochs": 2}
        yield f"{layout} other seed", {"layout": layout, "seed": 12345}


def planned(options: dict[str, Any]) -> RowPlan:
    options = {"capacity": CAPACITY, "global_batch_size": 12, "seed": 5, **options}
    if options["layout"] == "packed":
        options["capacity"] = CAPACITY
    return plan_rows(sources(options.pop("weighted", False)), **options)


def hash_of(*arrays: np.ndarray | None) -> str:
    """Hash of the numbers, whatever integer type holds them; floating point by its bits."""
    digest = hashlib.sha256()
    for values in arrays:
        if values is None:
            digest.update(b"none")
            continue
        exact = values.astype(np.int64) if values.dtype.kind in "iu" else values
        digest.update(f"{exact.dtype} {exact.shape}".encode() + np.ascontiguousarray(exact).tobytes())
    return digest.hexdigest()[:16]


def hash_of_plan(plan: RowPlan) -> str:
    sums = (plan.step_rows, plan.step_tokens, plan.step_loss_tokens, plan.step_squares, plan.step_weight)
    of_sources = np.array([plan.source_weight(step, 3) for step in range(plan.steps)])
    sizes = np.array([plan.rows, plan.steps, plan.global_batch_size, plan.capacity, *plan.rows_of_epochs])
    fractions = np.array([plan.packing_efficiency, *(plan.epoch_of(rows) for rows in range(0, plan.rows, 37))])
    ends = plan.group_ends, plan.epoch_ends
    return hash_of(*plan.segments, plan.sources, plan.weights, *ends, *sums, of_sources, sizes, fractions)


def datasets(folder: Path) -> Iterator[tuple[str, PackedDataset]]:
    """Rows of shards: each layout, weights, a change on the way, an automatic batch size, an evaluation set."""
    given = sources(True)
    paths = tuple(
        write_set(folder / f"s{number}", each.lengths[:300], number, 70, weights)
        for number, (each, weights) in enumerate(zip(given, (None, given[1].example_weights[:300]), strict=True))
    )
    for layout in ("packed", "single", "joined"):
        for mixing in ("concat", "first_exhausted", "all_exhausted"):
            yield (
                f"rows {layout} {mixing}",
                PackedDataset(paths, CAPACITY, 10, 3, 2, None, layout, mixing, (2.0, 1.0)),
            )
        yield f"rows {layout} one source, in order", PackedDataset(paths[:1], CAPACITY, 4, layout=layout, shuffle=False)
        yield f"rows {layout} auto", PackedDataset(paths, CAPACITY, None, 1, 20, 40, layout)
        before = PackedDataset(paths[:1], CAPACITY, 10, 3, 2, None, layout)
        yield f"rows {layout} changed", PackedDataset(paths, CAPACITY, 10, 3, 4, None, layout, earlier=before)
    yield "rows one text", PackedDataset(paths, CAPACITY, 10, 3, 1, None, "joined", document_mask=False)


def hash_of_rows(rows: PackedDataset) -> str:
    """Hash of each worker's batches, for several numbers of workers, from the first step and from a later one."""
    found = []
    for workers in (1, 2, 3, 8):
        for worker in range(workers):
            for step, batch in enumerate(rows.steps(2, worker, workers)):
                assert np.array_equal(batch["row"], rows.rows_for_rank(2 + step, worker, workers))
                found.append(hash_of(*(batch[name] for name in sorted(batch))))
    found.append(hash_of_plan(rows.row_plan))
    found += rows.records(3)
    return hashlib.sha256("\n".join(found).encode()).hexdigest()[:16]


def cases(folder: Path) -> Iterator[tuple[str, str]]:
    for name, options in plans():
        yield name, hash_of_plan(planned(options))
    for name, rows in datasets(folder):
        yield name, hash_of_rows(rows)


@pytest.fixture(autouse=True)
def groups(monkeypatch):
    monkeypatch.setattr(mixture, "GROUP_EXAMPLES", 250)  # several groups of shards in an epoch


def test_plans_and_rows_are_those_of_earlier_versions(tmp_path):
    recorded = json.loads(RECORDED.read_text())
    found = dict(cases(tmp_path))
    assert {name for name in recorded if found.get(name) != recorded[name]} == set()
    assert found.keys() == recorded.keys()


def test_sums_and_rows_made_in_small_blocks_are_those_of_earlier_versions_to_the_bit(tmp_path, monkeypatch):
    monkeypatch.setattr(row_plan, "BLOCK", 50)
    monkeypatch.setattr(row_layouts, "JOINED_ROWS", 7)
    recorded = json.loads(RECORDED.read_text())
    found = {name: hash_of_plan(planned(options)) for name, options in plans()}
    assert {name for name in found if found[name] != recorded[name]} == set()


if __name__ == "__main__":
    import tempfile

    mixture.GROUP_EXAMPLES = 250
    with tempfile.TemporaryDirectory() as made:
        RECORDED.write_text(json.dumps(dict(cases(Path(made))), indent=1) + "\n")
