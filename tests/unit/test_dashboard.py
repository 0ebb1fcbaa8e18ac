"""The dashboard and the alerts use metrics that exist, and are the files that the guide names."""

from __future__ import annotations

import json
import re
from pathlib import Path

import yaml

from raysft.telemetry.dashboard import ALERTS, PANELS, alerts, dashboard
from raysft.telemetry.ray_metrics import COUNTED, COUNTERS, GAUGES

CLUSTER = Path(__file__).parents[2] / "cluster"
QUERIES = [query for panel in PANELS for query, _ in panel.queries] + [alert.query for alert in ALERTS]
NAMES = {name for query in QUERIES for name in re.findall(r"ray_(raysft_\w+)", query)}


def test_every_metric_is_shown_and_every_query_asks_for_one():
    assert GAUGES.keys() | COUNTERS.keys() == NAMES
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


def test_the_files_are_what_the_code_makes():
    """``python -m tests.metrics FOLDER`` writes them anew, and shows the dashboard with a real Prometheus."""
    assert json.loads((CLUSTER / "grafana-dashboard.json").read_text()) == dashboard()
    assert yaml.safe_load((CLUSTER / "prometheus-alerts.yml").read_text()) == alerts()
