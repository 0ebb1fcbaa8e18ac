"""Who keeps the others waiting: put together from what each worker reports of itself when nothing makes progress."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Collection, Sequence

from raysft.telemetry.events import WorkerHangs

GATHER_SECONDS = 15.0
"""Time in which the workers report: each looks every few seconds."""
NAMED = 4
"""Most workers that a line names."""
ALONE = frozenset({"setup", "data", "generation", "decision", "checkpoint", "export"})
"""Phases in which a worker does not wait for another one."""
DOING = {
    "setup": "loads the model",
    "data": "waits for its rows",
    "forward": "computes a forward pass",
    "backward": "computes a backward pass",
    "step": "updates the weights",
    "evaluation": "evaluates",
    "generation": "waits for predictions",
    "decision": "waits for the scheduler of trials",
    "checkpoint": "waits for the checkpoint before this one",
    "export": "writes the model",
}


class Hangs:
    """Gathers the reports of a moment, and tells them in one line."""

    def __init__(self, tell: Callable[[int, str], None], folder: str, gather_seconds: float = GATHER_SECONDS) -> None:
        """
        Args:
            tell: receives the step and the line, in another thread.
            folder: where the stacks are.
            gather_seconds: time between the first report and the line.
        """
        self._tell, self._folder, self._seconds = tell, folder, gather_seconds
        self._lock = threading.Lock()
        self._reports: dict[int, WorkerHangs] = {}

    def add(self, report: WorkerHangs) -> None:
        """Take a report; the first one of a moment starts the clock."""
        with self._lock:
            if not self._reports:
                timer = threading.Timer(self._seconds, self._conclude)
                timer.daemon = True
                timer.start()
            self._reports[report.rank] = report

    def _conclude(self) -> None:
        with self._lock:
            reports, self._reports = list(self._reports.values()), {}
        self._tell(min(one.step for one in reports), diagnosis(reports, self._folder))


def diagnosis(reports: Sequence[WorkerHangs], folder: str) -> str:
    """Say who keeps whom waiting, and what happens next.

    >>> waiting = [WorkerHangs(rank, 4, "b", 812, "backward", 240, "", False) for rank in range(3)]
    >>> diagnosis([*waiting, WorkerHangs(3, 4, "a, GPU 5", 812, "data", 240, "", False)], "runs/r/diagnosis")
    'no progress for 4 minutes: worker 3 (a, GPU 5) waits for its rows; 3 others wait in backward; stacks: \
runs/r/diagnosis'
    >>> diagnosis(waiting, "d")
    'no progress for 4 minutes: worker 3 does not respond; 3 others wait in backward; stacks: d'
    >>> diagnosis([*waiting, WorkerHangs(3, 4, "a", 812, "backward", 240, "", False)], "d")
    'no progress for 4 minutes: all 4 workers wait for each other in backward; stacks: d'
    """
    seconds, workers = max(one.seconds for one in reports), reports[-1].workers
    silent = sorted(set(range(workers)) - {one.rank for one in reports})
    alone = [one for one in reports if one.phase in ALONE]
    waiting = Counter(one.phase for one in reports if one.phase not in ALONE)
    parts = [
        f"worker{'s' if len(silent) > 1 else ''} {_listed(silent)} {'do' if len(silent) > 1 else 'does'} not respond"
    ] * bool(silent)
    parts += [f"worker {one.rank} ({one.place}) {DOING[one.phase]}" for one in alone[:NAMED]]
    parts += [f"{len(alone) - NAMED} more likewise"] * (len(alone) > NAMED)
    everyone = sum(waiting.values()) == workers > 1
    for phase, count in waiting.most_common():
        if workers == 1:
            parts.append(f"worker 0 ({reports[0].place}) {DOING[phase]}")
        elif everyone and len(waiting) == 1:
            parts.append(f"all {count} workers wait for each other in {phase}")
        else:
            parts.append(f"{count} {'others wait' if count > 1 else 'other waits'} in {phase}")
    shown = f"{seconds // 60} minutes" if seconds >= 120 else f"{seconds} s"
    ending = "; the workers will restart from the newest checkpoint" if any(one.ends for one in reports) else ""
    return f"no progress for {shown}: {'; '.join(parts)}; stacks: {folder}{ending}"


def _listed(ranks: Collection[int]) -> str:
    named = ", ".join(map(str, list(ranks)[:NAMED]))
    return named + (f" and {len(ranks) - NAMED} more" if len(ranks) > NAMED else "")
