"""trackio with a run that has a given id: it finds runs by name alone, and another run may have the same name."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from typing import Any


def open_run(project: str, name: str, run_id: str, group: str | None, config: Mapping[str, Any]) -> Any:
    """Start the run with an id, or continue with it. What the driver's machine does is not logged: it trains nothing."""
    import trackio

    run = trackio.init(project, name, group, config=dict(config), embed=False, auto_log_gpu=False, auto_log_cpu=False)
    run.id = run_id
    return run


def last_steps(run: Any) -> dict[str, int] | None:
    """Return the last step of each metric that the run has; None if its server does not tell."""
    last: dict[str, int] = {}
    with suppress(Exception):  # trackio continues without its server, and sends later what it could not
        for entry in _logs(run):
            last |= {name: max(entry["step"], last.get(name, -1)) for name in entry}
        return last
    return None


def _logs(run: Any) -> list[dict[str, Any]]:
    """Return the metrics of each step, with the step."""
    from trackio.remote_client import RemoteClient
    from trackio.sqlite_storage import SQLiteStorage

    if run.url is None:
        return SQLiteStorage.get_logs(run.project, run.name, run_id=run.id)
    client = RemoteClient(run.url, hf_token=run._hf_token_for_remote(), write_token=run._write_token, verbose=False)
    return client.predict(project=run.project, run=run.name, run_id=run.id, api_name="/get_logs")
