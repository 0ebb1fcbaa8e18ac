"""How much memory the caches of the engines on a node may take."""

import psutil
import pytest

from raysft.config import parse
from raysft.generate import engine_actor
from raysft.generate.engine_actor import EngineActor
from raysft.generate.engines import base, batching, create_engine
from tests.tiny import tiny_model

GIB = 2**30


@pytest.mark.parametrize("limit", ["max\n", "9223372036854771712\n", "", None])
def test_a_container_without_a_limit_may_take_the_memory_of_the_machine(tmp_path, limit):
    if limit is not None:
        (tmp_path / "limit").write_text(limit)
    assert base.memory_bytes([tmp_path / "limit"]) == psutil.virtual_memory().total


@pytest.mark.parametrize("name", ["new", "old"])
def test_a_container_may_take_no_more_than_its_limit(tmp_path, name):
    (tmp_path / name).write_text(f"{GIB // 4}\n")
    assert base.memory_bytes([tmp_path / "new", tmp_path / "old"]) == GIB // 4


def test_the_engines_of_a_node_share_a_quarter(monkeypatch):
    monkeypatch.setattr(base, "memory_bytes", lambda: 8 * GIB)
    assert [base.cpu_cache_bytes(engines) for engines in (1, 4)] == [2 * GIB, GIB / 2]


@pytest.mark.parametrize("kind", ["static", "continuous"])
def test_an_engine_knows_how_many_share_its_node(tmp_path, monkeypatch, kind):
    model = str(tiny_model(tmp_path))
    generate = {"max_new_tokens": 2, "batching": kind}
    settings = {"model": {"path": model}, "data": {"train": [{"name": "a", "path": "a"}]}, "generate": generate}
    config = parse({**settings, "scaling": {"threads_per_worker": 1}})
    assert batching(config, model) == kind
    actor = EngineActor(config, [model], (), 3)
    made = []
    monkeypatch.setattr(engine_actor, "create_engine", lambda *given: made.append(create_engine(*given)) or made[-1])
    actor._load(0)
    shares = []
    for module in ("static", "continuous"):
        name = f"raysft.generate.engines.{module}.cpu_cache_bytes"
        monkeypatch.setattr(name, lambda engines: shares.append(engines) or 1e9)
    made[0].complete(["a", "b"], [[5, 6], [7]])
    assert set(shares) == {3}
