"""What each tracker's library does with metrics: TensorBoard, Weights & Biases, MLflow, SwanLab, trackio."""

from __future__ import annotations

import hashlib
import os
import posixpath
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from raysft.storage.run_directory import RunDirectory
from raysft.telemetry import trackio_internals
from raysft.telemetry.tracker_labels import PROJECT, Labels, variable

MLFLOW_PARENT = "mlflow.parentRunId"
"""The tag by which MLflow nests runs."""

MLFLOW_STATUS = {"finished": "FINISHED", "failed": "FAILED", "stopped": "KILLED"}
"""Outcome → status of a run in MLflow."""
WANDB_AXIS, WANDB_LAST = "train/global_step", "last_steps"
"""The metric of W&B that all others are shown over, named as ``Trainer`` names it, and what its summary has as ``last``."""
SWANLAB_STATE: dict[str, Any] = {"finished": "success", "failed": "crashed", "stopped": "aborted"}
"""Outcome → state of a run in SwanLab."""
Outcome = Literal["finished", "failed", "stopped"]
"""How a run ended; ``stopped`` before its end, by a person, a scheduler or a limit."""


Log = Sequence[tuple[int, Mapping[str, float]]]
"""Steps and their metrics, in the order in which a training has them."""


class Writer:
    """Writes metrics with one library; all its methods are called in one thread."""

    def begin(self, step: int, log: Log) -> None:
        """Start, or resume after a step: write what is missing of the log up to that step.

        A driver that was killed did not pass on its last metrics, or its library did not send them.
        """

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        """Write the metrics of one step, all of one section: ``train``, ``eval`` or ``predict``."""

    def close(self, outcome: Outcome) -> None:
        """Flush and close, and show how the run ended."""


class Appending(Writer):
    """Writes with a library that keeps all it is given. Steps that are repeated after a failure have the same metrics again."""

    def __init__(self) -> None:
        self.last: dict[str, int] | None = {}
        """Section of metrics → the last step that the library has; None if nobody can tell which they are."""

    def begin(self, step: int, log: Log) -> None:
        """Write what the library does not have; if that is unknown, it may have everything."""
        if self.last is None:
            self.last = {_section(metrics): number for number, metrics in log if metrics}
        for number, metrics in log:
            self.write(number, metrics)

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        """Write the metrics of one step that the library does not have."""
        self.last = self.last or {}
        if metrics and step > self.last.get(_section(metrics), -1):
            self.append(step, metrics)
            self.last[_section(metrics)] = step

    def append(self, step: int, metrics: Mapping[str, float]) -> None:
        """Give metrics to the library."""


class TensorBoard(Writer):
    """Event files in ``{run directory}/tensorboard``."""

    def __init__(self, run: RunDirectory, config: Mapping[str, Any], labels: Labels) -> None:
        self._folder, self._writer = run.path / "tensorboard", None

    def begin(self, step: int, log: Log) -> None:
        """Open the writer. Metrics that a killed run wrote after its last checkpoint are hidden: those steps are repeated.

        The last seconds before that checkpoint may be missing: events are written to their file from time to time.
        """
        from torch.utils.tensorboard.writer import SummaryWriter

        if self._writer is not None:
            self._writer.close()
        last = _last_events(self._folder, step) if step else {}
        self._writer = SummaryWriter(str(self._folder), purge_step=step and step + 1, flush_secs=10)
        for number, metrics in log:
            if metrics and number > last.get(_section(metrics), -1):
                self.write(number, metrics)

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        """Write the metrics of one step."""
        assert self._writer is not None
        for name, value in metrics.items():
            self._writer.add_scalar(name, value, step)

    def close(self, outcome: Outcome) -> None:
        """Flush and close; TensorBoard shows no states."""
        if self._writer is not None:
            self._writer.close()


def _section(metrics: Mapping[str, float]) -> str:
    return next(iter(metrics)).partition("/")[0]


def _last_steps(steps: Iterable[tuple[str, int]]) -> dict[str, int]:
    """Return the last step of each section, from names of metrics and their steps."""
    last: dict[str, int] = {}
    for name, step in steps:
        section = name.partition("/")[0]
        last[section] = max(step, last.get(section, -1))
    return last


def _last_events(folder: Path, until: int) -> dict[str, int]:
    """Return the last step of each section in event files, up to some step."""
    from tensorboard.backend.event_processing.event_accumulator import SCALARS, EventAccumulator

    events = EventAccumulator(str(folder), {SCALARS: 0})  # 0: all of them
    events.Reload()
    return _last_steps(
        (name, event.step) for name in events.Tags()[SCALARS] for event in events.Scalars(name) if event.step <= until
    )


class Wandb(Appending):
    """A run of Weights & Biases; the library finds its server and key itself."""

    def __init__(self, run: RunDirectory, config: Mapping[str, Any], labels: Labels) -> None:
        import wandb

        super().__init__()
        self._run = wandb.init(
            project=labels.project or variable("WANDB_PROJECT") or PROJECT,
            name=labels.shown(variable("WANDB_NAME")),
            id=_run_id(run),
            group=labels.group or variable("WANDB_RUN_GROUP") or labels.sweep,
            tags=labels.tags or None,
            job_type="trial" if labels.sweep else None,
            resume="allow",
            dir=str(run.path),
            config=dict(config),
        )
        self._run.define_metric("*", step_metric=WANDB_AXIS)
        # A run that continues has its summary again. Offline it has none, and gets the whole log: where both starts are sent to the
        # server later, the second replaces the first. Without a log it starts again under a name that the server knows.
        if run.trainer_log.exists():
            self.last = dict(self._run.summary.get(WANDB_LAST) or {})

    def append(self, step: int, metrics: Mapping[str, float]) -> None:
        """Give metrics to the library, with their step: its own steps never go back, but scores of predictions come late."""
        self._run.log({**metrics, WANDB_AXIS: step})
        self._run.summary[WANDB_LAST] = {**(self.last or {}), _section(metrics): step}

    def close(self, outcome: Outcome) -> None:
        """Flush and close. W&B knows exit codes alone: a run that was stopped is finished."""
        self._run.finish(exit_code=int(outcome == "failed"))


class SwanLab(Appending):
    """A run of SwanLab; the library finds its server and key itself, and never asks for them."""

    def __init__(self, run: RunDirectory, config: Mapping[str, Any], labels: Labels) -> None:
        import swanlab

        super().__init__()
        own = swanlab.Settings()
        self._run = swanlab.init(
            project=labels.project or own.project.name or PROJECT,
            name=labels.shown(own.experiment.name),
            id=_run_id(run),
            group=labels.group or own.experiment.group or labels.sweep,
            tags=list(labels.tags) or None,
            job_type="trial" if labels.sweep else None,
            resume="allow",
            log_dir=str(run.path / "swanlog"),
            config=dict(config),
            # What the terminal shows is the driver's, whose progress is drawn over itself.
            settings=swanlab.Settings(interactive=False, terminal=swanlab.Settings.Terminal(proxy_type="none")),
        )

    def append(self, step: int, metrics: Mapping[str, float]) -> None:
        """Give metrics to the library, which drops steps that its server has of the same metric, so it gets the whole log again."""
        self._run.log(dict(metrics), step=step)

    def close(self, outcome: Outcome) -> None:
        """Flush and close."""
        self._run.finish(SWANLAB_STATE[outcome], error="the training failed" if outcome == "failed" else None)


class Trackio(Appending):
    """A run of trackio: in its local database, or on the Space or the server that its variables name."""

    def __init__(self, run: RunDirectory, config: Mapping[str, Any], labels: Labels) -> None:
        super().__init__()
        project, group = labels.project or PROJECT, labels.group or labels.sweep
        self._run = trackio_internals.open_run(project, labels.shown(), _run_id(run), group, dict(config))
        if run.trainer_log.exists():
            found = trackio_internals.last_steps(self._run)
            self.last = None if found is None else _last_steps(found.items())

    def append(self, step: int, metrics: Mapping[str, float]) -> None:
        """Give metrics to the library."""
        self._run.log(dict(metrics), step=step)

    def close(self, outcome: Outcome) -> None:
        """Flush and close; trackio shows no states."""
        self._run.finish()


class MLflow(Appending):
    """A run in an experiment of MLflow; the library finds its server itself."""

    def __init__(self, run: RunDirectory, config: Mapping[str, Any], labels: Labels) -> None:
        import mlflow

        super().__init__()
        self._mlflow = mlflow
        parent = {MLFLOW_PARENT: _mlflow_sweep(labels)} if labels.sweep else {}
        # A resumed training continues its own MLflow run.
        found = _find_mlflow_run(labels, "raysft_run", str(run.place))
        mlflow.start_run(run_id=found.info.run_id if found else None, run_name=labels.shown())
        mlflow.set_tags({**labels.tag_values, "raysft_run": str(run.place), **parent})
        if found and run.trainer_log.exists():
            self.last = _last_steps((metric.key, metric.step) for metric in found.data.to_proto().metrics)
        # MLflow refuses new values of a parameter; config.json has those of the newest start.
        known = found.data.params if found else {}
        mlflow.log_params({key: value for key, value in mlflow_parameters(config) if key not in known})
        mlflow.log_dict(dict(config), "config.json")

    def append(self, step: int, metrics: Mapping[str, float]) -> None:
        """Give metrics to the library, which refuses names like ``predict/hit@1``."""
        self._mlflow.log_metrics({mlflow_name(name): value for name, value in metrics.items()}, step=step)

    def close(self, outcome: Outcome) -> None:
        """Flush and close."""
        self._mlflow.end_run(MLFLOW_STATUS[outcome])


class MLflowSweep(Writer):
    """The parent run of a sweep's trials, while the sweep runs."""

    def __init__(self, config: Mapping[str, Any], labels: Labels) -> None:
        import mlflow

        self._client, self._id = mlflow.MlflowClient(), _mlflow_sweep(labels)
        self._client.update_run(self._id, status="RUNNING")
        self._client.log_dict(self._id, dict(config), "config.json")

    def close(self, outcome: Outcome) -> None:
        """Mark it as ended."""
        self._client.set_terminated(self._id, MLFLOW_STATUS[outcome])


def _mlflow_sweep(labels: Labels) -> str:
    """Return the id of a sweep's parent run, which its name finds, so that it has one however often it starts."""
    import mlflow

    assert labels.sweep
    found = _find_mlflow_run(labels, "raysft_sweep", labels.sweep)
    if not found:
        client, tags = mlflow.MlflowClient(), {**labels.tag_values, "raysft_sweep": labels.sweep}
        found = client.create_run(_experiment(labels), tags=tags, run_name=labels.run_name or labels.sweep)
        client.set_terminated(found.info.run_id)  # a trial that runs by itself does not end it
    return found.info.run_id


def _find_mlflow_run(labels: Labels, tag: str, value: str) -> Any:
    """Return the run with a tag in the experiment, which is made if it is missing; None if there is no such run."""
    import mlflow

    # MLflow knows no escape for a quote, only the other kind of quotes.
    quote = '"' if "'" in value else "'"
    query = f"tags.{tag} = {quote}{value}{quote}"
    found = mlflow.search_runs([_experiment(labels)], query, max_results=1, output_format="list")
    return found[0] if found else None


def _experiment(labels: Labels) -> str:
    """Make an experiment the current one, and return its id; MLflow's own variables may name it, too."""
    import mlflow

    name, number = labels.project or variable("MLFLOW_EXPERIMENT_NAME"), variable("MLFLOW_EXPERIMENT_ID")
    try:
        if not name and number:
            return mlflow.set_experiment(experiment_id=number).experiment_id
        return mlflow.set_experiment(name or PROJECT).experiment_id
    finally:  # the library leaves the experiment in this variable, where the next run would find it
        os.environ.pop("MLFLOW_EXPERIMENT_ID", None)
        if number:
            os.environ["MLFLOW_EXPERIMENT_ID"] = number


def _run_id(run: RunDirectory) -> str:
    """Return an id by which a resumed training finds its run again, of at most 128 characters.

    Another sweep may have a trial with the same values, and so the same name.
    """
    return f"{run.place.name[:100]}-{hashlib.sha256(str(run.place).encode()).hexdigest()[:8]}"


def mlflow_name(name: str) -> str:
    """Return the name under which MLflow shows a metric; metrics of other authors may have any.

    >>> mlflow_name("predict/rouge-l"), mlflow_name("predict/hit@1"), mlflow_name("predict/f1/(macro)/")
    ('predict/rouge-l', 'predict/hit_1', 'predict/f1/_macro_')
    """
    return posixpath.normpath(re.sub(r"[^\w./ -]", "_", name))


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


WRITERS: dict[str, Callable[..., Writer]] = {
    "tensorboard": TensorBoard,
    "wandb": Wandb,
    "mlflow": MLflow,
    "swanlab": SwanLab,
    "trackio": Trackio,
}
