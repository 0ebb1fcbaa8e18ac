"""A training's metrics are where Prometheus collects them."""

from __future__ import annotations

import itertools
import re
import time
import urllib.request

import ray

from raysft.telemetry.events import StepSkipped, WorkersRestarting
from raysft.telemetry.ray_metrics import COUNTERS, GAUGES, WORKER_GAUGES, RayMetrics, WorkerMetrics
from tests.unit.test_train_log import set_up, step

SECONDS, FORGOTTEN_SECONDS = 60, 25
"""Time within which values appear, and after which Ray forgets them."""


def collected(run: str, *labels: str) -> dict[str, float]:
    """What this node exports of a run, with further labels: name → value."""
    (node,) = ray.nodes()
    with urllib.request.urlopen(
        f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics", timeout=10
    ) as answer:
        text = answer.read().decode()
    found = re.findall(r"^ray_(raysft_\w+){([^}]*)} (\S+)$", text, re.MULTILINE)
    wanted = {f'run="{run}"', *labels}
    return {name: float(value) for name, told, value in found if wanted <= set(told.split(","))}


def test_every_metric_of_a_training_is_exported(local_ray):
    """Also those that were told long ago."""
    seconds = itertools.count()
    looks = (lambda: dict.fromkeys(WORKER_GAUGES, float(next(seconds))), lambda: dict.fromkeys(WORKER_GAUGES, 0.5))
    ranks = [WorkerMetrics("ranks", rank, f"node-{rank}", look) for rank, look in enumerate(looks)]
    with ranks[0], ranks[1], RayMetrics("exported") as metrics:
        for event in (set_up(3), step(4, loss=2.5), StepSkipped(5, "NaN"), *[WorkersRestarting("died")] * 2):
            metrics(event)
        limit = time.monotonic() + SECONDS
        while not (found := collected("exported")) and time.monotonic() < limit:
            time.sleep(1)
        time.sleep(FORGOTTEN_SECONDS)
        assert collected("exported") == found
        for rank in range(2):
            of_rank = collected("ranks", f'node="node-{rank}"', f'rank="{rank}"')
            assert of_rank.keys() == WORKER_GAUGES.keys()
            assert all(value == 0.5 if rank else value > 1 for value in of_rank.values())
    assert found["raysft_loss"] == 2.5
    assert found["raysft_steps_done"] == 4
    assert found["raysft_worker_restarts_total"] == 2
    assert found["raysft_steps_skipped_total"] == 1
    assert found["raysft_hangs_total"] == 0
    unset = {"raysft_eval_loss", "raysft_model_flops_utilization"}
    assert found.keys() == (GAUGES.keys() | COUNTERS.keys()) - unset
