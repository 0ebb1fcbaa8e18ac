"""All checks in one command: ``python -m tests``. Each one runs even when another has failed; the exit code is 1 then."""

import os
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parent.parent
BIN = Path(sys.executable).parent
PROCESSES = min(8, max(2, len(os.sched_getaffinity(0)) // 2))
"""Test files at a time: two even on two cores, because a test that starts Ray waits for a third of its time. They are begun in
their order, in which those that start Ray come before the many short ones."""
CHECKS = (
    ("format", [BIN / "ruff", "format", "--check", "."]),
    ("lint", [BIN / "ruff", "check", "."]),
    ("types", [BIN / "basedpyright", "--pythonpath", sys.executable]),
    ("layers", [BIN / "lint-imports"]),
    (
        "tests",
        [sys.executable, *f"-m pytest raysft tests -n {PROCESSES} --dist loadfile --no-loadscope-reorder".split()],
    ),
)


def main() -> int:
    """Run the checks and say which failed."""
    failed = []
    for name, command in CHECKS:
        print(f"── {name} ──", flush=True)
        started = time.monotonic()
        code = subprocess.run([str(part) for part in command], cwd=ROOT, check=False).returncode
        print(
            f"── {name}: {'ok' if code == 0 else f'FAILED ({code})'} in {time.monotonic() - started:.0f} s ──",
            flush=True,
        )
        if code:
            failed.append(name)
    print(f"failed: {', '.join(failed)}" if failed else "all checks passed", flush=True)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
