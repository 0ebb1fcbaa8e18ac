"""A run that is open: its directory locked, its cluster joined, its data prepared and its plan written."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from raysft.config import Config
from raysft.data.prepare import PreparedData
from raysft.run.generation_plan import GenerationPlan
from raysft.run.inputs import ModelFiles
from raysft.run.preflight import Preflight, preflight
from raysft.run.source_plan import write_unusable
from raysft.run.verb_checks import Verb
from raysft.stopping import current
from raysft.storage.json_files import write_atomically, write_json
from raysft.storage.run_directory import RunDirectory
from raysft.telemetry.terminal import Terminal


@dataclass(frozen=True)
class RunContext:
    """A run whose stages may start."""

    config: Config
    """With the batch size that the data determined."""
    directory: RunDirectory
    terminal: Terminal
    files: ModelFiles
    """Its model."""
    prepared: PreparedData
    identity: dict[str, str]
    """Hashes of the model and the data, as ``Cursor`` keeps them."""
    push: Callable[[], None]
    """``Preflight.push``."""
    generation: GenerationPlan | None = None
    """Predictions during the training."""


@contextmanager
def open_run(config: Config, verb: Verb = "train", allow_changed: bool = False) -> Iterator[RunContext]:
    """Check the request, write what was planned into the run directory, and keep it open for the block.

    Raises:
        RequestError: the request cannot be carried out; the run directory is as it was.
    """
    with preflight(config, verb, allow_changed) as ready:
        current().check()
        yield _begin(ready)


def _begin(ready: Preflight) -> RunContext:
    """Write config, plan and rejected records, and print the plan."""
    from raysft.run.resumption import ROW_PLAN, record_changes

    directory, terminal, (run,) = ready.directory, ready.terminal, ready.runs
    assert run.resumption is not None
    if run.resumption.changes:
        terminal.line(record_changes(directory, run.resumption))
    # The config comes last: a process that is killed before it finds the old one, and asks for the change again.
    write_json(directory.plan, {**run.plan.as_dict(), ROW_PLAN: run.resumption.recorded_rows.to_dict()})
    write_atomically(directory.config, run.config.to_yaml())
    write_unusable(directory, (*run.prepared.train, *run.prepared.eval))
    ready.push()  # checkpoints go there directly, and nobody can resume from them without the config
    for line in run.plan.lines():
        terminal.line(line)
    return RunContext(
        run.config,
        directory,
        terminal,
        run.files,
        run.prepared,
        run.identity,
        ready.push,
        run.plan.generation,
    )
