"""What a run directory tells about its run, without access to the cluster."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable

from raysft.errors import RequestError
from raysft.report.read_run import RunLog, finite, read_lines, read_run
from raysft.storage.lock import LockDenied, live_owner
from raysft.storage.path import StoragePath
from raysft.storage.retry import FIRST_SECONDS, retry_for
from raysft.storage.run_directory import RunDirectory
from raysft.storage.sync import open_read_only
from raysft.telemetry.terminal import duration
from raysft.train.checkpoint.catalog import newest

Notify = Callable[[str], None]


def print_run_status(place: StoragePath, notify: Notify) -> None:
    """Print state, progress and checkpoint of a run, who works in its directory, and what to do next.

    Raises:
        RequestError: the folder is not a run directory.
    """
    with open_read_only(place, notify) as directory, retry_for(FIRST_SECONDS, notify):
        problems: list[str] = []
        log, trials = read_run(directory, problems), trial_states(directory, problems)
        holder = holder_of(place, notify)
        notify(f"run: {log.name} in {place}")
        for name, value in (
            ("state", f"running, {holder}" if holder else _state(directory, log, trials)),
            ("progress", _progress(log, trials)),
            ("last record", _age(place / "trainer_log.jsonl")),
            ("checkpoint", "" if log.other_model else _checkpoint(directory)),
            ("next", _next(place, holder, _state(directory, log, trials), bool(log.other_model))),
        ):
            if value:
                notify(f"{name}: {value}")
        for problem in problems:
            notify(f"problem: {problem}")


def holder_of(place: StoragePath, notify: Notify) -> str:
    """The live process that works in a run directory, for messages; empty if there is none."""
    try:
        owner = live_owner(place, notify)
    except LockDenied as error:
        raise RequestError(f"{error}; ask that user, or run this as that user") from None
    return f"process {owner.process} on {owner.host}" if owner else ""


def newest_checkpoint(directory: RunDirectory) -> str:
    """The newest complete checkpoint as ``after step N, H:MM:SS old``; empty without one."""
    point = newest(directory.checkpoints)
    if point is None:
        return ""
    age = _age(point.path / "cursor.json")
    return f"after step {point.cursor.step}" + (f", {age}" if age else "")


def trial_states(directory: RunDirectory, problems: list[str]) -> Counter[str]:
    """Number of a sweep's trials by their state; empty if it is not a sweep. Up to a damaged line, of which ``problems`` tells."""
    last: dict[str, str] = {}
    try:
        for line in read_lines(directory.trials):
            last[str(line.get("trial"))] = str(line.get("state"))
    except RequestError as error:
        problems.append(str(error))
    return Counter(last.values())


def state_of(directory: RunDirectory) -> str:
    """``done`` or ``not running``, for a run directory that nobody works in."""
    return _state(directory, read_run(directory, []), trial_states(directory, []))


def _state(directory: RunDirectory, log: RunLog, trials: Counter[str]) -> str:
    if trials:
        return "not running" if set(trials) - {"done", "stopped"} else "done"
    if log.other_model:
        done = all(directory.results("eval" if work == "evaluation" else "predict").exists() for work in log.other_work)
        return "done" if done else "not running"
    return "done" if directory.is_done() else "not running"


def _progress(log: RunLog, trials: Counter[str]) -> str:
    if trials:
        return f"{trials.total()} trials begun: " + ", ".join(f"{count} {state}" for state, count in trials.items())
    if not log.steps:
        return "" if log.other_model else "no step yet"
    record = log.steps[-1]
    step, total, loss = record["current_steps"], record.get("total_steps"), finite(record.get("loss"))
    parts = [f"step {step}" + (f" of {total}" if total else "")]
    parts += [f"loss {loss:.4f}"] if loss is not None else ["loss not finite"]
    if log.evaluations and (evaluated := finite(log.evaluations[-1].get("eval_loss"))) is not None:
        parts.append(f"eval loss {evaluated:.4f} at step {log.evaluations[-1]['current_steps']}")
    return ", ".join(parts)


def _checkpoint(directory: RunDirectory) -> str:
    found = newest_checkpoint(directory)
    return found or ("" if directory.is_done() or directory.trials.exists() else "none")


def _age(file: StoragePath) -> str:
    """How long ago a file was written; empty if it does not exist or the storage does not say."""
    try:
        modified = file.entry().modified
    except FileNotFoundError:
        return ""
    return f"{duration(time.time() - modified / 1e9)} old" if modified else ""


def _next(place: StoragePath, holder: str, state: str, other_model: bool) -> str:
    if holder:
        return f"wait for it, or raysft stop {place}"
    if state == "done":
        return f"raysft report {place}"
    if other_model:
        return "run the command that started it again"
    return "the command that started it resumes it from the newest checkpoint"
