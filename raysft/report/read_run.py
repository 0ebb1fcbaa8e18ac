"""Read what a run left behind: the one place of the report that knows how files may be missing, torn or corrupt."""

from __future__ import annotations

import json
import math
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from raysft.errors import RequestError, RunFailed
from raysft.storage.json_files import read_jsonl
from raysft.storage.run_directory import RunDirectory

_SET_LOSS = re.compile(r"eval_([A-Za-z0-9][A-Za-z0-9._-]*)_loss")


@dataclass(frozen=True)
class RunLog:
    """Everything that a report is made from. What a run has not written is empty."""

    directory: RunDirectory
    config: dict[str, Any]
    """The resolved config, as YAML gives it."""
    steps: list[dict[str, Any]]
    """``StepRecord``s in the order of their steps, each step once."""
    evaluations: list[dict[str, Any]]
    """Evaluation records in the order of their steps, each step once."""
    plan: dict[str, Any]
    trained: dict[str, Any]
    """``train_results.json``."""
    evaluated: dict[str, Any]
    """``eval_results.json``."""
    predicted: dict[str, Any]
    """``predict_results.json``."""

    @property
    def name(self) -> str:
        """Name of the run."""
        return str(self.option("run.name") or self.directory.path.resolve().name)

    @property
    def other_model(self) -> str:
        """The model that predicted, in a run in which nothing is trained (``generate.model``); else empty."""
        return "" if self.steps or self.evaluations else str(self.option("generate.model", ""))

    @property
    def evaluation_sets(self) -> list[str]:
        """Names of the evaluation sets, if there are several and so each has results of its own; else none."""
        keys = [key for record in (*self.evaluations, self.evaluated) for key in record]
        names = list(dict.fromkeys(match[1] for key in keys if (match := _SET_LOSS.fullmatch(key))))
        return names if len(names) > 1 else []

    def sources(self, part: str) -> list[dict[str, Any]]:
        """The datasets of ``data.train`` or ``data.eval``."""
        sources = self.option(f"data.{part}", [])
        return [source for source in sources if isinstance(source, dict)] if isinstance(sources, list) else []

    def option(self, key: str, default: Any = None) -> Any:
        """Value of a dotted config key; ``default`` where it is not there or null."""
        at: Any = self.config
        for part in key.split("."):
            at = at.get(part) if isinstance(at, dict) else None
        return default if at is None else at


def finite(value: Any) -> float | None:
    """A number that can be drawn and compared, or None.

    >>> finite(2), finite(float("inf")), finite("2"), finite(True)
    (2.0, None, None, None)
    """
    number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    return float(value) if number else None


def series(records: list[dict[str, Any]], key: str) -> tuple[list[int], list[float]]:
    """Steps and values of one key, without the records where it is missing or not finite.

    >>> series([{"current_steps": 1, "loss": 2.5}, {"current_steps": 2, "loss": float("nan")}], "loss")
    ([1], [2.5])
    """
    points = [(record["current_steps"], finite(record.get(key))) for record in records]
    return [step for step, value in points if value is not None], [value for _, value in points if value is not None]


def read_run(run: RunDirectory) -> RunLog:
    """Read a run directory.

    Raises:
        RequestError: it is no run directory.
        RunFailed: one of its files is corrupt.
    """
    if not run.config.is_file():
        fact = "holds no config.yaml and so is no run directory" if run.path.is_dir() else "there is no such folder"
        raise RequestError(f"{run.remote or run.path}: {fact}; give the folder {{run.storage}}/{{run.name}} of a run")
    steps: dict[int, dict[str, Any]] = {}
    evaluations: dict[int, dict[str, Any]] = {}
    for number, record in enumerate(read_lines(run.trainer_log), start=1):
        step = record.get("current_steps")
        if not isinstance(step, int):
            raise RunFailed(f"{run.trainer_log}:{number}: current_steps={step!r} is no step number; {_remedy('line')}")
        # A resumed run repeats the steps after its checkpoint: the last record is the one whose weights were kept.
        if "loss" in record:
            # JSON's reader makes new keys for each line, which for 100,000 steps are a third of all memory.
            steps[step] = {sys.intern(key): value for key, value in record.items()}
        if any(key.startswith("eval_") for key in record):
            evaluations[step] = record
    return RunLog(
        directory=run,
        config=_read_config(run.config),
        steps=[steps[step] for step in sorted(steps)],
        evaluations=[evaluations[step] for step in sorted(evaluations)],
        plan=_read_object(run.plan),
        trained=_read_object(run.results("train")),
        evaluated=_read_object(run.results("eval")),
        predicted=_read_object(run.results("predict")),
    )


def read_lines(path: Path) -> Iterator[dict[str, Any]]:
    """``read_jsonl`` with errors that name file and line.

    Raises:
        RunFailed: a line is no JSON object. A torn last line, as a killed writer leaves it, is passed over.
    """
    number = 0
    try:
        for number, row in enumerate(read_jsonl(path), start=1):
            if not isinstance(row, dict):
                raise RunFailed(f"{path}:{number}: the line is no JSON object; {_remedy('line')}")
            yield row
    except json.JSONDecodeError as error:
        raise RunFailed(f"{path}:{number + 1}: the line is no JSON ({error.msg}); {_remedy('line')}") from None
    except UnicodeDecodeError:
        raise RunFailed(f"{path}:{_undecodable_line(path)}: the line is no UTF-8; {_remedy('line')}") from None


def _read_object(path: Path) -> dict[str, Any]:
    """A JSON object; empty where the file is not there."""
    if not path.exists():
        return {}
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise RunFailed(f"{path}:{error.lineno}: the file is no JSON ({error.msg}); {_remedy('file')}") from None
    except UnicodeDecodeError:
        raise RunFailed(f"{path}:{_undecodable_line(path)}: the file is no UTF-8; {_remedy('file')}") from None
    if not isinstance(value, dict):
        raise RunFailed(f"{path}:1: the file holds no JSON object; {_remedy('file')}")
    return value


def _read_config(path: Path) -> dict[str, Any]:
    """The config as nested mappings. It is not validated: a run of an older version has a report too."""
    line = 1
    try:
        value = yaml.safe_load(path.read_bytes())
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        value, line = None, mark.line + 1 if mark else _undecodable_line(path)
    if not isinstance(value, dict):
        raise RunFailed(f"{path}:{line}: the file is no YAML mapping; restore the config that the run was started with")
    return value


def _undecodable_line(path: Path) -> int:
    """Number of the first line that is no UTF-8; 1 if there is none."""
    for number, line in enumerate(path.read_bytes().split(b"\n"), start=1):
        try:
            line.decode("utf-8")
        except UnicodeDecodeError:
            return number
    return 1


def _remedy(what: str) -> str:
    return f"the {what} is damaged: restore it or delete it, and repeat the report"
