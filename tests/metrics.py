"""Metrics of a real training in a real Prometheus: ``python -m tests.metrics FOLDER`` writes ``dashboard.png`` there.

It trains a tiny model on a cluster whose metrics a Prometheus collects (Debian's package ``prometheus``), lets Prometheus check the
alerts, asks it the dashboard's queries, and draws what Grafana would. The files in ``cluster/`` are written anew.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import socket
import subprocess
import time
import urllib.parse
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import ray
import yaml

import raysft
from raysft.config import load
from raysft.report.matplotlib_agg import Figure, FigureCanvasAgg
from raysft.telemetry.dashboard import PANELS, PANELS_IN_A_ROW, Panel, alerts, dashboard
from tests.sweeps import write_sweep

CLUSTER = Path(__file__).parents[1] / "cluster"
SECONDS = 60.0
ALERTS_HEADER = "# Alerts of trainings, for Prometheus; raysft/telemetry/dashboard.py makes this file.\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="where the picture and the run go")
    folder: Path = parser.parse_args().folder.absolute()
    folder.mkdir(parents=True, exist_ok=True)
    (CLUSTER / "grafana-dashboard.json").write_text(json.dumps(dashboard(), indent=2) + "\n")
    (CLUSTER / "prometheus-alerts.yml").write_text(ALERTS_HEADER + yaml.safe_dump(alerts(), sort_keys=False, width=120))
    subprocess.run(["promtool", "check", "rules", CLUSTER / "prometheus-alerts.yml"], check=True)
    write_sweep(
        folder, [1e-3], 60, {"epochs": 300, "eval_every_steps": 300, "save_every_steps": 700}, {"enabled": False}
    )
    os.chdir(folder)
    port = free_port()
    with prometheus(folder, port) as server:
        ray.init(
            num_cpus=2,
            include_dashboard=False,
            _metrics_export_port=port,
            _system_config={"metrics_report_interval_ms": 1000},
        )
        began = time.time()
        raysft.run_sft(
            load("sweep.yaml", ["run.name=shown", "tune={}", "scaling={num_workers: 2, cpus_per_worker: 0.75}"])
        )
        time.sleep(5)
        draw(server, began, folder / "dashboard.png")
        ray.shutdown()
    print(f"picture: {folder / 'dashboard.png'}")


def free_port() -> int:
    """A port that nobody listens at."""
    with socket.create_server(("127.0.0.1", 0)) as listening:
        return listening.getsockname()[1]


@contextmanager
def prometheus(folder: Path, port: int) -> Iterator[str]:
    """Run a Prometheus that collects the metrics at a port each second; yields its address."""
    own = free_port()
    (folder / "prometheus.yaml").write_text(
        yaml.safe_dump(
            {
                "global": {"scrape_interval": "1s", "evaluation_interval": "1s"},
                "rule_files": [str(CLUSTER / "prometheus-alerts.yml")],
                "scrape_configs": [{"job_name": "ray", "static_configs": [{"targets": [f"127.0.0.1:{port}"]}]}],
            }
        )
    )
    shutil.rmtree(folder / "prometheus", ignore_errors=True)
    command = [
        "prometheus",
        f"--config.file={folder / 'prometheus.yaml'}",
        f"--storage.tsdb.path={folder / 'prometheus'}",
        f"--web.listen-address=127.0.0.1:{own}",
    ]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        try:
            yield f"http://127.0.0.1:{own}"
        finally:
            process.terminate()


def ask(server: str, path: str, **parameters: Any) -> Any:
    """Ask Prometheus; waits until it answers."""
    limit = time.monotonic() + SECONDS
    while True:
        try:
            with urllib.request.urlopen(f"{server}/api/v1/{path}?{urllib.parse.urlencode(parameters)}") as answer:
                return json.load(answer)["data"]
        except OSError:
            if time.monotonic() > limit:
                raise
            time.sleep(0.5)


def curves(server: str, query: str, begin: float) -> list[tuple[dict[str, str], list[float], list[float]]]:
    """Answers to a query of the dashboard, for all runs: (labels, seconds, values) of each line."""
    query = query.replace("$run", ".*")
    found = ask(server, "query_range", query=query, start=begin, end=time.time(), step=1)["result"]
    return [
        (one["metric"], [at - begin for at, _ in one["values"]], [float(value) for _, value in one["values"]])
        for one in found
    ]


def draw(server: str, begin: float, file: Path) -> None:
    """Draw every panel."""
    rows = len(PANELS) // PANELS_IN_A_ROW
    figure = Figure(figsize=(16, 3 * rows), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(rows, PANELS_IN_A_ROW)
    for axis, panel in zip(axes.flat, PANELS, strict=True):
        draw_panel(axis, server, panel, begin)
    figure.savefig(file, dpi=90)


def named(legend: str, labels: dict[str, str]) -> str:
    """A legend with the values of its labels, as Grafana shows it."""
    return re.sub(r"{{(\w+)}}", lambda label: labels.get(label[1], ""), legend)


def draw_panel(axis: Any, server: str, panel: Panel, begin: float) -> None:
    axis.set_title(f"{panel.title} [{panel.unit}]", fontsize="medium")
    lines = [
        axis.plot(seconds, values, label=named(legend, labels))
        for query, legend in panel.queries
        for labels, seconds, values in curves(server, query, begin)
    ]
    if len(lines) > 1:
        axis.legend(fontsize="x-small")
    elif not lines:
        axis.text(0.5, 0.5, "no data", transform=axis.transAxes, ha="center")


if __name__ == "__main__":
    main()
