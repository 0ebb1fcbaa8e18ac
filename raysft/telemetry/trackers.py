"""Figures of a run on their way to TensorBoard, W&B or MLflow: callbacks that the journal calls."""

from __future__ import annotations

import importlib.util
import math
import queue
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

OPEN_SECONDS, CLOSE_SECONDS = 60.0, 60.0
"""How long a tracker may take to be opened, and to write what is still held at the end."""
MOST_WAITING = 10_000
"""Figures of so many steps wait for a tracker's server at most."""
SHOWN = (
    "loss",
    "lr",
    "grad_norm",
    "throughput",
    "loss_token_throughput",
    "mfu",
    "packing_efficiency",
    "memory_gib",
    "data_wait_seconds",
)
"""Figures of a step that are worth a curve."""


def missing_tracker(names: Sequence[str]) -> str | None:
    """The first tracker whose package, which has its name, is not installed."""
    return next((name for name in names if importlib.util.find_spec(name) is None), None)


def open_trackers(
    names: Sequence[str], run: Path, config: Mapping[str, Any], notify: Callable[[str], None] = print
) -> list[Any]:
    """One callback for each name.

    Args:
        names: ``tensorboard``, ``wandb``, ``mlflow``.
        run: the run directory.
        config: the resolved config, shown beside the figures.
        notify: takes a line where figures cannot be handed over.

    Raises:
        RuntimeError: one cannot be opened: no key, no server.
    """
    return [Tracker(name, lambda kind=KINDS[name]: kind(run, config), notify) for name in names]


def _first_line(error: BaseException) -> str:
    return f"{(str(error).strip().splitlines() or [type(error).__name__])[0]:.200}"


class Tracker:
    """Turns the journal's events into named numbers, and hands them over on a thread of its own.

    A server that is slow or gone is waited for there: the training is worth more than a tracker that fails, which is left alone
    then.
    """

    def __init__(self, name: str, make: Callable[[], _Writer], notify: Callable[[str], None]) -> None:
        self.name, self.notify, self.broken = name, notify, False
        self._tasks: queue.Queue[Callable[[], None] | None] = queue.Queue(MOST_WAITING)
        self._opened: queue.Queue[Exception | None] = queue.Queue()
        self._thread = threading.Thread(target=self._work, args=(make,), name=name, daemon=True)
        self._thread.start()
        try:
            error = self._opened.get(timeout=OPEN_SECONDS)
        except queue.Empty:
            raise RuntimeError(f"{name} cannot be opened (no answer for {OPEN_SECONDS:g} s)") from None
        if error:  # each has errors of its own
            raise RuntimeError(f"{name} cannot be opened ({_first_line(error)})") from error

    def _work(self, make: Callable[[], _Writer]) -> None:
        try:
            self._writer = make()
        except Exception as error:
            self._opened.put(error)
            return
        self._opened.put(None)
        while task := self._tasks.get():
            try:
                if not self.broken:
                    task()
            except Exception as error:
                self._leave(_first_line(error))

    def _leave(self, reason: str) -> None:
        if not self.broken:
            self.broken = True
            self.notify(f"{self.name}: takes no figures any more ({reason}); trainer_log.jsonl holds all")

    def _hand_over(self, task: Callable[[], None]) -> None:
        if self.broken:
            return
        try:
            self._tasks.put_nowait(task)
        except queue.Full:
            self._leave(f"{MOST_WAITING} wait to be taken")

    def on_setup(self, content: Mapping[str, Any]) -> None:
        """The training begins, or goes on."""
        self._hand_over(lambda: self._writer.begin(content["step"]))

    def on_step(self, record: Any) -> None:
        """Figures of an optimizer step, as ``train/NAME``."""
        figures = dict(_figures("train", asdict(record)))
        self._hand_over(lambda: self._writer.write(record.current_steps, figures))

    def on_evaluate(self, results: Mapping[str, Any]) -> None:
        """Results of an evaluation, as ``eval/NAME``."""
        shown = {
            f"eval/{key.removeprefix('eval_')}": value
            for key, value in results.items()
            if key.startswith("eval_") and not key.endswith("tokens") and math.isfinite(value)
        }
        step = results["current_steps"]
        self._hand_over(lambda: self._writer.write(step, shown))

    def close(self) -> None:
        """Wait, for a while, until all is written."""
        self._hand_over(self._writer.close)
        with suppress(queue.Full):
            self._tasks.put_nowait(None)
        self._thread.join(CLOSE_SECONDS)
        if self._thread.is_alive():
            self._leave(f"no answer for {CLOSE_SECONDS:g} s")


def _figures(group: str, record: Mapping[str, Any]) -> Iterator[tuple[str, float]]:
    for name in SHOWN:
        value = record.get(name)
        if value is not None and math.isfinite(value):
            yield f"{group}/{name}", value
    for source, loss in (record.get("source_losses") or {}).items():
        # Not under the loss itself: MLflow's folders cannot hold a figure and a group of one name.
        yield f"{group}/source_loss/{source}", loss


class _Writer:
    """What figures are written with; everything in it is called on one thread."""

    def begin(self, step: int) -> None:
        """The training begins behind this step."""

    def write(self, step: int, figures: Mapping[str, float]) -> None:
        """Take the figures of one step."""
        raise NotImplementedError

    def close(self) -> None:
        """Write what is still held."""


class TensorBoard(_Writer):
    """Event files in ``{run directory}/tensorboard``."""

    def __init__(self, run: Path, config: Mapping[str, Any]) -> None:
        self._folder, self._writer = run / "tensorboard", None

    def begin(self, step: int) -> None:
        """What a killed run wrote after its last checkpoint is hidden: it is done again."""
        from torch.utils.tensorboard.writer import SummaryWriter

        self._writer = SummaryWriter(str(self._folder), purge_step=step + 1, flush_secs=10)

    def write(self, step: int, figures: Mapping[str, float]) -> None:
        """Take the figures of one step."""
        assert self._writer is not None
        for name, value in figures.items():
            self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        """Write what is still held."""
        if self._writer is not None:
            self._writer.close()


class Wandb(_Writer):
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


class MLflow(_Writer):
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


KINDS: dict[str, Callable[..., _Writer]] = {"tensorboard": TensorBoard, "wandb": Wandb, "mlflow": MLflow}
