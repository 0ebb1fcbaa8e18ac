"""What each tracker's library does with metrics: TensorBoard, Weights & Biases, MLflow."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Literal

from raysft.storage.run_directory import RunDirectory

PROJECT = "raysft"
"""Project in W&B and experiment in MLflow."""
MLFLOW_PARENT = "mlflow.parentRunId"
"""The tag by which MLflow nests runs."""

MLFLOW_STATUS = {"finished": "FINISHED", "failed": "FAILED", "stopped": "KILLED"}
"""Outcome → status of a run in MLflow."""
Outcome = Literal["finished", "failed", "stopped"]
"""How a run ended; ``stopped`` before its end, by a person, a scheduler or a limit."""


class Writer:
    """Writes metrics with one library; all its methods are called in one thread."""

    def begin(self, step: int) -> None:
        """Start or resume after a step."""

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        """Write the metrics of one step."""

    def close(self, outcome: Outcome) -> None:
        """Flush and close, and show how the run ended."""


class TensorBoard(Writer):
    """Event files in ``{run directory}/tensorboard``."""

    def __init__(self, run: RunDirectory, config: Mapping[str, Any], sweep: str | None) -> None:
        self._folder, self._writer = run.path / "tensorboard", None

    def begin(self, step: int) -> None:
        """Open the writer. Metrics that a killed run wrote after its last checkpoint are hidden: those steps are repeated."""
        from torch.utils.tensorboard.writer import SummaryWriter

        self._writer = SummaryWriter(str(self._folder), purge_step=step + 1, flush_secs=10)

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        """Write the metrics of one step."""
        assert self._writer is not None
        for name, value in metrics.items():
            self._writer.add_scalar(name, value, step)

    def close(self, outcome: Outcome) -> None:
        """Flush and close; TensorBoard shows no states."""
        if self._writer is not None:
            self._writer.close()


class Wandb(Writer):
    """A run of Weights & Biases; the library finds its server and key itself."""

    def __init__(self, run: RunDirectory, config: Mapping[str, Any], sweep: str | None) -> None:
        import wandb

        name = run.place.name
        self._run = wandb.init(
            project=PROJECT,
            name=name,
            # Another sweep may have a trial with the same values, and so the same name. An id has at most 128 characters.
            id=f"{name[:100]}-{hashlib.sha256(str(run.place).encode()).hexdigest()[:8]}",
            group=sweep,
            job_type="trial" if sweep else None,
            resume="allow",
            dir=str(run.path),
            config=dict(config),
        )

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        """Write the metrics of one step."""
        self._run.log(dict(metrics), step=step)

    def close(self, outcome: Outcome) -> None:
        """Flush and close. W&B knows exit codes alone: a run that was stopped is finished."""
        self._run.finish(exit_code=int(outcome == "failed"))


class MLflow(Writer):
    """A run in MLflow's experiment ``raysft``; the library finds its server itself."""

    def __init__(self, run: RunDirectory, config: Mapping[str, Any], sweep: str | None) -> None:
        import mlflow

        self._mlflow = mlflow
        tags = {"raysft_run": str(run.place), **({MLFLOW_PARENT: _mlflow_sweep(sweep)} if sweep else {})}
        # A resumed training continues its own MLflow run.
        found = _find_mlflow_run("raysft_run", str(run.place))
        mlflow.start_run(run_id=found.info.run_id if found else None, run_name=run.place.name)
        mlflow.set_tags(tags)
        # MLflow refuses new values of a parameter; config.json has those of the newest start.
        known = found.data.params if found else {}
        mlflow.log_params({key: value for key, value in mlflow_parameters(config) if key not in known})
        mlflow.log_dict(dict(config), "config.json")

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        """Write the metrics of one step."""
        self._mlflow.log_metrics(dict(metrics), step=step)

    def close(self, outcome: Outcome) -> None:
        """Flush and close."""
        self._mlflow.end_run(MLFLOW_STATUS[outcome])


class MLflowSweep(Writer):
    """The parent run of a sweep's trials, while the sweep runs."""

    def __init__(self, sweep: str, config: Mapping[str, Any]) -> None:
        import mlflow

        self._client, self._id = mlflow.MlflowClient(), _mlflow_sweep(sweep)
        self._client.update_run(self._id, status="RUNNING")
        self._client.log_dict(self._id, dict(config), "config.json")

    def close(self, outcome: Outcome) -> None:
        """Mark it as ended."""
        self._client.set_terminated(self._id, MLFLOW_STATUS[outcome])


def _mlflow_sweep(sweep: str) -> str:
    """Return the id of a sweep's parent run, which its name finds, so that it has one however often it starts."""
    import mlflow

    found = _find_mlflow_run("raysft_sweep", sweep)
    if not found:
        client, experiment = mlflow.MlflowClient(), mlflow.set_experiment(PROJECT)
        found = client.create_run(experiment.experiment_id, tags={"raysft_sweep": sweep}, run_name=sweep)
        client.set_terminated(found.info.run_id)  # a trial that runs by itself does not end it
    return found.info.run_id


def _find_mlflow_run(tag: str, value: str) -> Any:
    """Return the run with a tag in the experiment ``raysft``, which is made if it is missing; None if there is no such run."""
    import mlflow

    experiment = mlflow.set_experiment(PROJECT)
    # MLflow knows no escape for a quote, only the other kind of quotes.
    quote = '"' if "'" in value else "'"
    query = f"tags.{tag} = {quote}{value}{quote}"
    found = mlflow.search_runs([experiment.experiment_id], query, max_results=1, output_format="list")
    return found[0] if found else None


def mlflow_parameters(value: Any, key: str = "") -> Iterator[tuple[str, str]]:
    """Yield the settings of a config by dotted key, except those whose keys MLflow refuses.

    >>> list(mlflow_parameters({"train": {"betas": [0.9, 0.95]}, "data": {"train": [{"weight": 2.0, "columns": {"答": "a"}}]}}))
    [('train.betas', '[0.9, 0.95]'), ('data.train.0.weight', '2.0')]
    """
    if isinstance(value, list) and value and all(isinstance(item, Mapping) for item in value):
        value = dict(enumerate(value))
    if isinstance(value, Mapping):
        for name, inner in value.items():
            yield from mlflow_parameters(inner, f"{key}.{name}" if key else str(name))
    elif re.fullmatch(r"[\w./ -]{1,250}", key, re.ASCII):
        yield key, str(value)


WRITERS: dict[str, Callable[..., Writer]] = {"tensorboard": TensorBoard, "wandb": Wandb, "mlflow": MLflow}
