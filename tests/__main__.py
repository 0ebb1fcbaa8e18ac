"""All checks in one command: ``python -m tests``. Each one runs even when another has failed; the exit code is 1 then."""

import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parent.parent
BIN = Path(sys.executable).parent
CHECKS = (
    ("format", [BIN / "ruff", "format", "--check", "."]),
    ("lint", [BIN / "ruff", "check", "."]),
    ("types", [BIN / "basedpyright", "--pythonpath", sys.executable]),
    ("layers", [BIN / "lint-imports"]),
    ("tests", [sys.executable, "-m", "pytest", "raysft", "tests"]),
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
