"""Write the trained model while all workers watch for a request to stop.

Writing takes minutes for a large model and cannot be interrupted, and the machine may disappear before it is done. So any
unsaved work is saved as soon as the run is asked to stop, and the same command then only has to write the model.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import torch.distributed as dist

from raysft.train.decisions import from_first

LOOK_SECONDS = 1.0
Watch = Callable[[Callable[[], None]], None]
"""Does the first worker's work, and returns on all workers once it is done."""


def watched(work: Callable[[], None], asked: Callable[[], bool], react: Callable[[], None], device: Any) -> None:
    """Do work in a thread of the first worker. A collective.

    Args:
        work: what only the first worker does.
        asked: True if the run is asked to stop; the first worker's answer counts.
        react: called once by all workers together, if the run is asked to stop before the work is done.
        device: for the collectives.

    Raises:
        BaseException: what the work raised; on the first worker only.
    """
    failures: list[BaseException] = []

    def run() -> None:
        try:
            work()
        except BaseException as error:
            failures.append(error)

    thread = threading.Thread(target=run, name="model", daemon=True)
    if dist.get_rank() == 0:
        thread.start()
    done = reacted = False
    while not done:
        if dist.get_rank() == 0:
            thread.join(LOOK_SECONDS)
        done, stops = map(bool, from_first(not thread.is_alive(), asked(), device=device))
        if stops and not done and not reacted:
            reacted = True
            react()
    if failures:
        raise failures[0]
