"""What a worker without a GPU has in its process: glibc keeps a step's memory for the next step, and the node's GPUs are hidden.

By default glibc returns each large tensor to the kernel and asks for it again, page by page. For a step of full fine-tuning of a
model with eight layers of SmolLM2's that makes 250,000 page faults and a fifth of the CPU time, instead of 20,000 and 4%.

A training runs in a thread, so all threads must share one pool of memory; the other pools consist of pieces of 64 MiB, which
come and go whatever is set. glibc decides on pools when a process starts. A fork has that from its server, and does the rest
itself: a runtime environment would keep it from being one of the processes that Ray has ready. Pods have all of it in their
environment. Workers that Ray itself starts on other clusters get it as a runtime environment: ``mallopt`` alone, called in such
a process, changes neither faults nor time.
"""

from __future__ import annotations

import ctypes
import os
from contextlib import suppress

KEEP_MEMORY = {"MALLOC_ARENA_MAX": "1", "MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(1 << 33)}
"""Variables that glibc reads when a process starts."""
MMAP_MAX, TRIM_THRESHOLD = -4, -1
"""glibc's numbers of the last two (``man mallopt``)."""


def set_up() -> None:
    """Set up the process, before it does anything else."""
    os.environ["CUDA_VISIBLE_DEVICES"] = ""  # Ray does not hide GPUs, and DeepSpeed would compute on them
    with suppress(OSError, AttributeError):  # another C library
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(MMAP_MAX, 0)
        mallopt(TRIM_THRESHOLD, -1)  # as large as can be
