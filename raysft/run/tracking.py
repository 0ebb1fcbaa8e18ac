"""The trackers of a run and of a sweep, opened or refused."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace

from raysft.config import Config, masked
from raysft.errors import RequestError, RunStopped
from raysft.run.context import RunContext
from raysft.telemetry.terminal import Terminal
from raysft.telemetry.tracker_labels import Labels
from raysft.telemetry.tracker_writers import Outcome
from raysft.telemetry.trackers import Tracker, open_sweep, open_trackers


@contextmanager
def run_trackers(context: RunContext) -> Iterator[list[Tracker]]:
    """Open the trackers of a run for the block, and record in them how it ends.

    Raises:
        RequestError: one of them cannot be opened.
    """
    config, dumped = context.config, context.config.model_dump(mode="json")
    notify = _masking(context.terminal)
    trackers = _opened(
        lambda: open_trackers(config.train.trackers, context.directory, dumped, notify, Labels.of(config))
    )
    with _closing(trackers):
        yield trackers


@contextmanager
def sweep_trackers(config: Config, terminal: Terminal) -> Iterator[None]:
    """Show a sweep as running, for the block, in the trackers that track sweeps.

    Raises:
        RequestError: one of them cannot be opened.
    """
    labels = replace(Labels.of(config), sweep=config.run.sweep or config.run.name)
    names, dumped = config.train.trackers, config.model_dump(mode="json")
    with _closing(_opened(lambda: open_sweep(names, dumped, _masking(terminal), labels))):
        yield


@contextmanager
def _closing(trackers: Sequence[Tracker]) -> Iterator[None]:
    outcome: Outcome = "failed"
    try:
        yield
        outcome = "finished"
    except (RunStopped, KeyboardInterrupt):
        outcome = "stopped"
        raise
    finally:
        for tracker in trackers:
            tracker.close(outcome)


def _masking(terminal: Terminal) -> Callable[[str], None]:
    # A tracker's library may print its server's address from the environment, with a secret in it.
    return lambda line: terminal.line(masked(line))


def _opened(opening: Callable[[], Sequence[Tracker]]) -> list[Tracker]:
    try:
        return list(opening())
    except RuntimeError as error:
        raise RequestError(
            f"train.trackers: {masked(str(error))}; set it up, or remove it from train.trackers"
        ) from None
