"""The rendered examples in ``cluster/``; ``python -m tests.cluster_examples`` writes them anew.

An example is a comment, which says when to use it and has the command that renders it, and what the renderer gives.
"""

from __future__ import annotations

import os
import shlex
from pathlib import Path
from typing import Any

import yaml

from raysft.config import Config, load
from raysft.submit.kubernetes import render

ROOT = Path(__file__).parents[1]
EXAMPLES = sorted((ROOT / "cluster").glob("*.yaml"))
ALL_OPTIONS = ROOT / "tests" / "samples" / "kubernetes.yaml"
"""A config that uses the options which no example shows."""


def comment(path: Path) -> str:
    """Return the comment of an example, up to the first empty line."""
    return path.read_text().partition("\n\n")[0]


def command(path: Path) -> list[str]:
    """Return the words of the command in an example's comment."""
    lines = [line.removeprefix("#").strip() for line in comment(path).splitlines()]
    first = next(number for number, line in enumerate(lines) if line.startswith("raysft submit "))
    last = next(number for number in range(first, len(lines)) if not lines[number].endswith("\\"))
    return shlex.split(" ".join(line.removesuffix("\\") for line in lines[first : last + 1]))


def config_of(path: Path) -> Config:
    """Load the config of an example as its command does, from the root of the repository."""
    words = command(path)
    folder = os.getcwd()
    os.chdir(ROOT)
    try:
        return load(words[2], [word for word in words[3:] if "=" in word])
    finally:
        os.chdir(folder)


def expected(path: Path) -> str:
    """Return what an example must contain."""
    return f"{comment(path)}\n\n{render(config_of(path))}"


def objects(path: Path) -> dict[str, Any]:
    """Return the objects of an example by their kind, that of the dashboard's ConfigMap being ``Dashboard``."""
    found = yaml.safe_load_all(path.read_text())
    return {"Dashboard" if "grafana_dashboard" in one["metadata"]["labels"] else one["kind"]: one for one in found}


if __name__ == "__main__":
    for example in (*EXAMPLES, ALL_OPTIONS):
        example.write_text(expected(example))
        print(example.relative_to(ROOT))
