"""Figures of a run on their way to TensorBoard, W&B or MLflow: callbacks that the journal calls."""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

SHOWN = (
    "loss",
    "lr",
    "grad_norm",
    "throughput",
    "trained_throughput",
    "mfu",
    "useful",
    "memory_gib",
    "data_wait_seconds",
)
"""Figures of a step that are worth a curve."""


def missing_tracker(names: Sequence[str]) -> str | None:
    """The first tracker whose package, which has its name, is not installed."""
    return next((name for name in names if importlib.util.find_spec(name) is None), None)


def open_trackers(
    names: Sequence[str], run: Path, config: Mapping[str, Any], say: Callable[[str], None] = print
) -> list[Any]:
    """One callback for each name.

    Args:
        names: ``tensorboard``, ``wandb``, ``mlflow``.
        run: the run directory.
        config: the resolved config, shown beside the figures.
        say: takes a line where figures cannot be handed over.

    Raises:
        RuntimeError: one cannot be opened: no key, no server.
    """
    kinds: dict[str, Callable[..., Any]] = {"tensorboard": TensorBoard, "wandb": Wandb, "mlflow": MLflow}
    opened = []
    for name in names:
        try:
            tracker = kinds[name](run, config)
        except Exception as error:  # each has errors of its own
            raise RuntimeError(f"{name} cannot be opened ({_first_line(error)})") from error
        tracker.name, tracker.say = name, say
        opened.append(tracker)
    return opened


def _first_line(error: BaseException) -> str:
    return f"{(str(error).strip().splitlines() or [type(error).__name__])[0]:.200}"


class _Tracker:
    """Turns the journal's events into named numbers."""

    name = ""
    say: Callable[[str], None] = print
    broken = False

    def hand_over(self, step: int, figures: Mapping[str, float]) -> None:
        """Write figures; the training is worth more than a tracker that fails, which is left alone then."""
        if self.broken:
            return
        try:
            self.write(step, figures)
        except Exception as error:
            self.broken = True
            self.say(f"{self.name}: takes no figures any more ({_first_line(error)}); trainer_log.jsonl holds all")

    def write(self, step: int, figures: Mapping[str, float]) -> None:
        """Take the figures of one step."""
        raise NotImplementedError

    def on_step(self, record: Any) -> None:
        """Figures of an optimizer step, as ``train/NAME``."""
        self.hand_over(record.current_steps, dict(_figures("train", asdict(record))))

    def on_evaluate(self, results: Mapping[str, Any]) -> None:
        """Results of an evaluation, as ``eval/NAME``."""
        shown = {
            f"eval/{key.removeprefix('eval_')}": value
            for key, value in results.items()
            if key.startswith("eval_") and not key.endswith("tokens") and math.isfinite(value)
        }
        self.hand_over(results["current_steps"], shown)

    def close(self) -> None:
        """Write what is still held."""


def _figures(group: str, record: Mapping[str, Any]) -> Iterator[tuple[str, float]]:
    for name in SHOWN:
        value = record.get(name)
        if value is not None and math.isfinite(value):
            yield f"{group}/{name}", value
    for source, loss in (record.get("source_losses") or {}).items():
        # Not under the loss itself: MLflow's folders cannot hold a figure and a group of one name.
        yield f"{group}/source_loss/{source}", loss


class TensorBoard(_Tracker):
    """Event files in ``{run directory}/tensorboard``."""

    def __init__(self, run: Path, config: Mapping[str, Any]) -> None:
        self._folder, self._writer = run / "tensorboard", None

    def on_setup(self, content: Mapping[str, Any]) -> None:
        """What a killed run wrote after its last checkpoint is hidden: it is done again."""
        from torch.utils.tensorboard.writer import SummaryWriter

        self._writer = SummaryWriter(str(self._folder), purge_step=content["step"] + 1, flush_secs=10)

    def write(self, step: int, figures: Mapping[str, float]) -> None:
        """Take the figures of one step."""
        assert self._writer is not None
        for name, value in figures.items():
            self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        """Write what is still held."""
        if self._writer is not None:
            self._writer.close()


class Wandb(_Tracker):
    """A run of Weights & Biases; the library finds server and key itself."""

    def __init__(self, run: Path, config: Mapping[str, Any]) -> None:
        import wandb  # pyright: ignore[reportMissingImports]

        self._run = wandb.init(
            project="raysft", name=run.name, id=run.name, resume="allow", dir=str(run), config=dict(config)
        )

    def write(self, step: int, figures: Mapping[str, float]) -> None:
        """Take the figures of one step."""
        self._run.log(dict(figures), step=step)

    def close(self) -> None:
        """Write what is still held."""
        self._run.finish()


class MLflow(_Tracker):
    """A run of MLflow in the experiment ``raysft``; the library finds its server itself."""

    def __init__(self, run: Path, config: Mapping[str, Any]) -> None:
        import mlflow  # pyright: ignore[reportMissingImports]

        self._mlflow = mlflow
        experiment = mlflow.set_experiment("raysft")
        # A training that goes on belongs to the run that it began in.
        mine = f"tags.raysft_run = '{run}'"
        begun = mlflow.search_runs([experiment.experiment_id], mine, max_results=1, output_format="list")
        mlflow.start_run(run_id=begun[0].info.run_id if begun else None, run_name=run.name)
        mlflow.set_tag("raysft_run", str(run))
        mlflow.log_dict(dict(config), "config.json")

    def write(self, step: int, figures: Mapping[str, float]) -> None:
        """Take the figures of one step."""
        self._mlflow.log_metrics(dict(figures), step=step)

    def close(self) -> None:
        """Write what is still held."""
        self._mlflow.end_run()
