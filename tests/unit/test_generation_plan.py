"""Where a training generates: beside its workers, where the cluster has room for engines, else between two steps."""

import pytest

from raysft.cluster.placement import Node
from raysft.config import Config
from raysft.errors import RequestError
from raysft.generate.engine_pool import engine_devices
from raysft.run.generation_plan import plan_generation


def config(workers: int = 2, cpus: float = 1.0, use_gpu: bool = False, sweep: str | None = None, **generate) -> Config:
    return Config.model_validate(
        {
            "model": {"path": "m"},
            "run": {"sweep": sweep},
            "data": {"train": [{"name": "a", "path": "a"}], "holdout": 0.1},
            "scaling": {"num_workers": workers, "cpus_per_worker": cpus, "use_gpu": use_gpu},
            "generate": {"every_steps": 5, **generate},
        }
    )


@pytest.mark.parametrize(
    ("settings", "nodes", "engines"),
    [
        ({}, [Node(3.5)], 1),
        ({}, [Node(3.4)], 0),  # data tasks need half a CPU
        ({}, [Node(2.0), Node(2.0)], 1),  # one on the other node, which data tasks share
        ({}, [Node(2.0), Node(1.0), Node(1.5)], 2),  # one for each node that has room
        ({"num_actors": 3}, [Node(8.0)], 3),
        ({"num_actors": 3}, [Node(4.5)], 2),
        ({"use_gpu": True}, [Node(8.0, 4.0)], 2),
        ({"use_gpu": True, "gpus_per_engine": 2}, [Node(8.0, 3.0), Node(8.0, 1.0)], 0),
        ({"use_gpu": True, "gpus_per_engine": 2}, [Node(8.0, 4.0)], 1),
        ({"use_gpu": True, "num_actors": 1}, [Node(8.0, 4.0)], 1),
        ({"sweep": "s"}, [Node(16.0)], 0),
    ],
)
def test_engines_get_what_workers_and_data_tasks_leave(settings, nodes, engines):
    plan = plan_generation(config(**settings), nodes, steps=12)
    assert plan is not None
    assert (plan.engines, plan.pauses, plan.times) == (engines, not engines, 2)
    assert ("alongside training" in plan.line()) == bool(engines)
    assert ("between two steps" in plan.line()) == (not engines)


@pytest.mark.parametrize(
    ("every", "steps", "said"),
    [
        (1, 1, "after every step, 1 time, by 1 engine alongside training (6 CPUs are free next to 2 workers of 1 CPU)"),
        (2, 5, "after every 2 steps, 2 times, "),
        (5, 4, "after every 5 steps, so never, because training has fewer steps; lower generate.every_steps=5"),
    ],
)
def test_the_plan_says_how_often(every, steps, said):
    plan = plan_generation(config(every_steps=every), [Node(8.5)], steps)
    assert plan is not None
    assert said in plan.line()


def test_nothing_is_planned_without_every_steps():
    assert plan_generation(config(every_steps=None), [Node(8.0)], steps=12) is None


@pytest.mark.parametrize(
    ("settings", "nodes", "named"),
    [
        ({"engine": "vllm"}, [Node(2.0)], "generate.engine=vllm"),
        ({"use_gpu": True, "gpus_per_engine": 4}, [Node(8.0, 2.0)], "generate.gpus_per_engine=4"),
    ],
)
def test_engines_that_cannot_share_devices_with_workers_are_refused(settings, nodes, named):
    with pytest.raises(RequestError) as refused:
        plan_generation(config(**settings), nodes, steps=12)
    assert named in str(refused.value)
    assert "generate.every_steps=5" in str(refused.value)
    assert "\n" not in str(refused.value)


def test_the_devices_of_workers_are_lent_whole_and_on_one_node():
    places = [("a", ("0",)), ("b", ("3",)), ("a", ("1",)), ("a", ("2",))]
    assert engine_devices(places, 1) == [("a", ("0",)), ("a", ("1",)), ("a", ("2",)), ("b", ("3",))]
    assert engine_devices(places, 2) == [("a", ("0", "1"))]
