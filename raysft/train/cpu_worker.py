"""Process setup of a worker without a GPU: glibc keeps a step's memory for the next step, and the node's GPUs are hidden.

By default glibc returns each large tensor to the kernel and asks for it again, page by page. For a step of full fine-tuning of
a model with eight of SmolLM2's layers, this means 250,000 page faults and a fifth of the CPU time, instead of 20,000 and 4%.

Training runs in a thread, so all threads must share one memory pool; the other pools consist of pieces of 64 MiB, which come
and go regardless of settings. glibc decides on pools when a process starts. A fork inherits that from its server, and does the
rest itself: with a runtime environment it could not be one of the processes that Ray keeps ready. Pods have all of it in their
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
"""glibc's numbers for the last two (``man mallopt``)."""


def set_up() -> None:
    """Set up the process, before it does anything else."""
    os.environ["CUDA_VISIBLE_DEVICES"] = ""  # Ray does not hide GPUs, and DeepSpeed would compute on them
    with suppress(OSError, AttributeError):  # a different C library
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(MMAP_MAX, 0)
        mallopt(TRIM_THRESHOLD, -1)  # as large as possible
