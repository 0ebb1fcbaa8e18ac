"""Python's garbage collection: rarely while a process imports its libraries, as usual once it works.

torch, transformers, peft and Ray make a million objects when they are imported, and no garbage. At Python's default thresholds,
looking for some takes 30% of the time: 5.7 s instead of 8.1 s of CPU time without it, in every process of a run.
"""

import gc

_DEFAULT = 700, 10, 10


def postpone_collection() -> None:
    """Collect rarely from now on."""
    gc.set_threshold(100_000, 50, 10)


def resume_collection() -> None:
    """Collect at Python's default thresholds again, because garbage may hold memory of a device.

    What is alive now, the libraries, is left out of later collections, which would otherwise interrupt the work. Call it before
    the model is loaded, so that a model can be freed.
    """
    gc.freeze()
    gc.set_threshold(*_DEFAULT)
