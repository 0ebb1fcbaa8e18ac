"""The dashboard and the alerts use metrics that exist, and are the files that the guide names."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import yaml

from raysft.telemetry.dashboard import ALERTS, PANELS, alerts, dashboard
from raysft.telemetry.ray_metrics import COUNTED, COUNTERS, GAUGES, WORKER_GAUGES

CLUSTER = Path(__file__).parents[2] / "cluster"
QUERIES = [query for panel in PANELS for query, _ in panel.queries] + [alert.query for alert in ALERTS]
NAMES = {name for query in QUERIES for name in re.findall(r"ray_(raysft_\w+)", query)}


def test_every_metric_is_shown_and_every_query_asks_for_one():
    assert GAUGES.keys() | COUNTERS.keys() | WORKER_GAUGES.keys() == NAMES
    assert set(COUNTED.values()) == set(COUNTERS)


def test_panels_do_not_overlap():
    squares = [
        (panel["gridPos"]["x"] + x, panel["gridPos"]["y"] + y)
        for panel in dashboard()["panels"]
        for x in range(panel["gridPos"]["w"])
        for y in range(panel["gridPos"]["h"])
    ]
    assert len(squares) == len(set(squares))
    assert max(x for x, _ in squares) < 24


@pytest.mark.skipif(not shutil.which("promtool"), reason="promtool is not installed")
def test_an_alert_names_the_worker_that_falls_behind(tmp_path):
    """In one run a worker's own time is 1.8 times the median, in another all are equal, and a third has one worker alone."""
    times = {("a", rank): 0.9 if rank == 3 else 0.5 for rank in range(5)}
    times |= {("b", rank): 0.5 for rank in range(4)} | {("c", 0): 0.9}
    series = [
        {
            "series": f'ray_raysft_worker_{name}_seconds{{run="{run}", rank="{rank}", node="n{rank}"}}',
            "values": f"{value}x20",
        }
        for (run, rank), own in times.items()
        for name, value in (("data_wait", 0.1), ("forward", own - 0.1), ("step", 2.0))
    ]
    labels = {"run": "a", "rank": "3", "node": "n3", "severity": "warning"}
    rule = next(one for one in alerts()["groups"][0]["rules"] if one["alert"] == "RaysftWorkerBehind")
    summary = rule["annotations"]["summary"]
    for name, value in labels.items():
        summary = summary.replace(f"{{{{ $labels.{name} }}}}", value)
    expected = [{"exp_labels": labels, "exp_annotations": {**rule["annotations"], "summary": summary}}]
    case = {"alertname": "RaysftWorkerBehind", "eval_time": "15m", "exp_alerts": expected}
    test = {"interval": "1m", "input_series": series, "alert_rule_test": [case]}
    (tmp_path / "alerts.yml").write_text(yaml.safe_dump(alerts()))
    (tmp_path / "test.yml").write_text(yaml.safe_dump({"rule_files": ["alerts.yml"], "tests": [test]}))
    done = subprocess.run(
        ["promtool", "test", "rules", tmp_path / "test.yml"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert summary.startswith("a, worker 3 (n3): ")


def test_the_files_are_what_the_code_makes():
    """``python -m tests.metrics FOLDER`` writes them anew, and shows the dashboard with a real Prometheus."""
    assert json.loads((CLUSTER / "grafana-dashboard.json").read_text()) == dashboard()
    assert yaml.safe_load((CLUSTER / "prometheus-alerts.yml").read_text()) == alerts()
