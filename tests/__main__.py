"""All checks in one command: ``python -m tests``. Each one runs even when another has failed; the exit code is 1 then."""

import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).parent.parent
BIN = Path(sys.executable).parent
PROCESSES = min(8, max(2, len(os.sched_getaffinity(0)) // 2))
"""Test files at a time: two even on two cores, because a test that starts Ray waits for a third of its time. They are begun in
their order, in which those that start Ray come before the many short ones."""
CHECKS = {
    "format": [BIN / "ruff", "format", "--check", "."],
    "lint": [BIN / "ruff", "check", "."],
    "types": [BIN / "basedpyright", "--pythonpath", sys.executable],
    "layers": [BIN / "lint-imports"],
    "tests": [sys.executable, *f"-m pytest raysft tests -n {PROCESSES} --dist loadfile --no-loadscope-reorder".split()],
}
BESIDE = "types"
"""The check on one core that takes longest; it runs beside the others, and what it prints comes at the end."""


def main() -> int:
    """Run the checks and say which failed."""
    with ThreadPoolExecutor(1) as thread:
        beside = thread.submit(_run, BESIDE, quiet=True)
        codes = {name: _run(name)[0] for name in CHECKS if name != BESIDE}
        codes[BESIDE], printed = beside.result()
    print(printed, end="")
    failed = [name for name, code in codes.items() if code]
    print(f"failed: {', '.join(failed)}" if failed else "all checks passed", flush=True)
    return 1 if failed else 0


def _run(name: str, quiet: bool = False) -> tuple[int, str]:
    """Run a check; returns its exit code and, if it is to be quiet, what it would have printed."""
    if not quiet:
        print(f"── {name} ──", flush=True)
    started = time.monotonic()
    command = [str(part) for part in CHECKS[name]]
    done = subprocess.run(
        command,
        cwd=ROOT,
        check=False,
        text=True,
        stdout=subprocess.PIPE if quiet else None,
        stderr=subprocess.STDOUT if quiet else None,
    )
    result = "ok" if done.returncode == 0 else f"FAILED ({done.returncode})"
    ended = f"── {name}: {result} in {time.monotonic() - started:.0f} s ──"
    if not quiet:
        print(ended, flush=True)
    return done.returncode, f"── {name} ──\n{done.stdout}{ended}\n" if quiet else ""


if __name__ == "__main__":
    sys.exit(main())
