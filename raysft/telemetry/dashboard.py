"""The Grafana dashboard and the Prometheus alerts of trainings, made of ``ray_metrics``. Pure."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

RUN = 'run=~"$run"'
"""The runs that are chosen at the top of the dashboard."""
WIDTH, HEIGHT, PANELS_IN_A_ROW = 8, 8, 3
"""Of a panel; Grafana's grid has 24 columns."""


@dataclass(frozen=True)
class Panel:
    """A graph, or a number, with the queries that it shows."""

    title: str
    queries: tuple[tuple[str, str], ...]
    """(PromQL, legend)."""
    unit: str = "short"
    """A unit of Grafana."""
    kind: str = "timeseries"


def _of(metric: str) -> str:
    return f"ray_raysft_{metric}{{{RUN}}}"


def _count(metric: str) -> str:
    return f"increase(ray_raysft_{metric}_total{{{RUN}}}[10m])"


OWN_TIME = f"({_of('worker_data_wait_seconds')} + {_of('worker_forward_seconds')})"
"""The time of a step in which a worker does not wait for the others."""
WORKER = "{{run}} worker {{rank}} ({{node}})"
"""Legend of what one worker tells."""
PANELS = (
    Panel("Progress", ((f"{_of('steps_done')} / {_of('steps_planned')}", "{{run}}"),), "percentunit", "stat"),
    Panel(
        "Time left",
        ((f"({_of('steps_planned')} - {_of('steps_done')}) / deriv(ray_raysft_steps_done{{{RUN}}}[10m])", "{{run}}"),),
        "s",
        "stat",
    ),
    Panel("Workers", ((_of("workers"), "{{run}}"),), kind="stat"),
    Panel("Loss", ((_of("loss"), "{{run}} training"), (_of("eval_loss"), "{{run}} evaluation"))),
    Panel("Gradient norm", ((_of("gradient_norm"), "{{run}}"),)),
    Panel("Learning rate", ((_of("learning_rate"), "{{run}}"),), "sci"),
    Panel("Tokens per second", ((_of("tokens_per_second"), "{{run}}"),)),
    Panel("Model FLOPs utilization", ((_of("model_flops_utilization"), "{{run}}"),), "percentunit"),
    Panel(
        "Time of a step",
        ((_of("step_seconds"), "{{run}} step"), (_of("data_wait_seconds"), "{{run}} waiting for rows")),
        "s",
    ),
    Panel("Memory of the first worker", ((_of("memory_gibibytes"), "{{run}}"),), "gbytes"),
    Panel("Age of the newest checkpoint", ((f"time() - {_of('checkpoint_time')}", "{{run}}"),), "s"),
    Panel(
        "Own time of the slowest workers in a step",
        (
            (f"topk(5, {OWN_TIME})", WORKER),
            (f"quantile by (run) (0.5, {OWN_TIME})", "{{run}} median"),
            (f"max by (run) ({_of('worker_step_seconds')})", "{{run}} whole step"),
        ),
        "s",
    ),
    Panel("Workers without progress", ((f"topk(5, {_of('worker_idle_seconds')})", WORKER),), "s"),
    Panel("Workers with the most memory", ((f"topk(5, {_of('worker_memory_gibibytes')})", WORKER),), "gbytes"),
    Panel(
        "Faults in ten minutes",
        tuple(
            (_count(name), f"{{{{run}}}} {legend}")
            for name, legend in (
                ("worker_restarts", "restarts"),
                ("preemption_notices", "preemptions"),
                ("steps_skipped", "skipped steps"),
                ("checkpoint_failures", "failed checkpoints"),
                ("waits", "waits for storage or nodes"),
                ("slow_workers", "slow workers"),
                ("hangs", "workers without progress"),
            )
        ),
    ),
)


def dashboard() -> dict[str, Any]:
    """Return the dashboard as Grafana's JSON model (schema 39, Grafana 10 and later)."""
    source = {"type": "prometheus", "uid": "${datasource}"}
    return {
        "title": "raysft",
        "uid": "raysft",
        "schemaVersion": 39,
        "version": 1,
        "refresh": "10s",
        "time": {"from": "now-1h", "to": "now"},
        "tags": ["raysft", "ray"],
        "templating": {
            "list": [
                {"name": "datasource", "type": "datasource", "query": "prometheus", "label": "Data source"},
                {
                    "name": "run",
                    "type": "query",
                    "label": "Run",
                    "datasource": source,
                    "query": "label_values(ray_raysft_steps_planned, run)",
                    "refresh": 2,
                    "multi": True,
                    "includeAll": True,
                    "current": {"text": "All", "value": "$__all"},
                },
            ]
        },
        "panels": [_panel(number, panel, source) for number, panel in enumerate(PANELS)],
    }


def _panel(number: int, panel: Panel, source: dict[str, str]) -> dict[str, Any]:
    row, column = divmod(number, PANELS_IN_A_ROW)
    return {
        "id": number + 1,
        "title": panel.title,
        "type": panel.kind,
        "datasource": source,
        "gridPos": {"h": HEIGHT, "w": WIDTH, "x": column * WIDTH, "y": row * HEIGHT},
        "fieldConfig": {"defaults": {"unit": panel.unit}, "overrides": []},
        "targets": [
            {"refId": chr(65 + index), "expr": query, "legendFormat": legend, "datasource": source}
            for index, (query, legend) in enumerate(panel.queries)
        ],
    }


@dataclass(frozen=True)
class Alert:
    """A condition that somebody should know of."""

    name: str
    query: str
    """PromQL that gives the runs for which it holds."""
    minutes: int
    """How long it must hold."""
    summary: str
    remedy: str
    subject: str = "{{ $labels.run }}"
    """Whom it concerns, in Prometheus' template language."""


_OWN = "(ray_raysft_worker_data_wait_seconds + ray_raysft_worker_forward_seconds)"
ALERTS = (
    Alert(
        "RaysftNoStep", "time() - ray_raysft_step_time > 600", 1, "no step for ten minutes",
        "raysft status RUN_DIR says what its workers do",
    ),
    Alert(
        "RaysftCheckpointOld", "time() - ray_raysft_checkpoint_time > 3600", 1, "no checkpoint for an hour",
        "look for the storage's errors in the run's log",
    ),
    Alert(
        "RaysftCheckpointsFail", "increase(ray_raysft_checkpoint_failures_total[15m]) > 1", 1,
        "checkpoints cannot be written", "look for the storage's errors in the run's log",
    ),
    Alert(
        "RaysftWaitsForData", "ray_raysft_data_wait_seconds > 0.1 * ray_raysft_step_seconds", 10,
        "steps wait for their rows more than a tenth of their time", "add nodes or CPUs for data tasks",
    ),
    Alert(
        "RaysftSlowWorker", "increase(ray_raysft_slow_workers_total[30m]) > 0", 1, "a worker slows the others down",
        "the log and diagnosis.jsonl name the machine",
    ),
    Alert(
        "RaysftWorkerBehind", f"{_OWN} > on (run) group_left () (1.2 * quantile by (run) (0.5, {_OWN})) "
        f"and {_OWN} > 0.05 * ray_raysft_worker_step_seconds", 10,
        "takes 1.2 times as long as the median of the workers for its rows and forward passes",
        "look at its machine: its disk or network if it waits for rows, else the clock of its GPU",
        "{{ $labels.run }}, worker {{ $labels.rank }} ({{ $labels.node }})",
    ),
    Alert(
        "RaysftHangs", "increase(ray_raysft_hangs_total[10m]) > 0", 1, "workers make no progress",
        "the folder diagnosis of the run has their stacks",
    ),
    Alert(
        "RaysftRestarts", "increase(ray_raysft_worker_restarts_total[30m]) > 2", 1,
        "the workers restart again and again", "the log names the cause of each restart",
    ),
)  # fmt: skip


def alerts() -> dict[str, Any]:
    """Return the alerts as a file of rules for Prometheus."""
    rules = [
        {
            "alert": alert.name,
            "expr": alert.query,
            "for": f"{alert.minutes}m",
            "labels": {"severity": "warning"},
            "annotations": {"summary": f"{alert.subject}: {alert.summary}", "description": f"{alert.remedy}."},
        }
        for alert in ALERTS
    ]
    return {"groups": [{"name": "raysft", "rules": rules}]}
