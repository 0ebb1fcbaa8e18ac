"""Which worker a log line is from: run, rank and node, in front of what any library logs in a worker's process.

Ray Train's own files have fields for them, but Ray's name of a node is a number, and what a process writes to its streams has none
of them. A factory of records reaches the handlers of all libraries, even those that are imported later.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


def worker_name(run: str, rank: int, place: str) -> str:
    """Name a worker, for messages.

    >>> worker_name("toy", 3, "node-2, GPU 1")
    'toy, worker 3 (node-2, GPU 1)'
    """
    return f"{run}, worker {rank} ({place})"


@contextmanager
def named_lines(run: str, rank: int, place: str) -> Iterator[None]:
    """Begin every line that this process logs in the block with its name, also Python's warnings.

    Records have the attributes ``run``, ``rank`` and ``node`` as well, for formatters that write fields.

    Args:
        run: name of the run.
        rank: of this worker.
        place: its host, and its GPU.
    """
    name = worker_name(run, rank, place)
    before = logging.getLogRecordFactory()

    def named(*arguments: Any, **options: Any) -> logging.LogRecord:
        record = before(*arguments, **options)
        record.run, record.rank, record.node = run, rank, place
        # A message with arguments is a format.
        record.msg = f"{name.replace('%', '%%') if record.args else name}: {record.msg}"
        return record

    logging.setLogRecordFactory(named)
    logging.captureWarnings(True)
    # What no logger writes, such as the messages of C++ libraries, stands in the same files below these lines. Ray Train also logs
    # what is printed.
    sys.stdout.write(f"{name}: this process\n")
    sys.stdout.flush()
    logging.getLogger("raysft").info("this process")
    try:
        yield
    finally:
        logging.captureWarnings(False)
        logging.setLogRecordFactory(before)
