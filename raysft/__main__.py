"""The program ``raysft``, also ``python -m raysft``: a process that runs the command, and ends with its exit code."""

import atexit
import contextlib
import os
import sys


def program() -> None:
    """Run the command, and end the process with its exit code.

    The exit handlers of libraries are called as usual, but Python does not free objects one by one, which takes 2 s of CPU time
    with torch, transformers and Ray.
    """
    codes: list[int] = []
    atexit.register(_leave, codes)  # before the libraries register theirs, so that it is called last
    try:
        from raysft.cli import main
    except KeyboardInterrupt:  # in the first second, before anything has begun
        sys.exit(130)
    codes.append(main())
    sys.exit(codes[0])


def _leave(codes: list[int]) -> None:
    """End the process, unless it ends with a stack trace."""
    if codes:
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(AttributeError, OSError, ValueError):  # closed by who called
                stream.flush()
        os._exit(codes[0])


if __name__ == "__main__":
    program()
