"""Read the files of a run. This is the only module of the report that handles missing, torn and corrupt files."""

from __future__ import annotations

import json
import math
import re
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from raysft.errors import RequestError, one_line
from raysft.report.file_types import fault
from raysft.storage.json_files import read_jsonl
from raysft.storage.run_directory import RunDirectory

_INVALID = (json.JSONDecodeError, ValueError, RecursionError)
"""What the JSON parser raises; a ValueError for an integer of more than 4,300 digits."""
_CONFIG_REMEDY = "restore the config that the run was started with"
_SET_LOSS = re.compile(r"eval_([A-Za-z0-9][A-Za-z0-9._-]*)_loss")


@dataclass(frozen=True)
class RunLog:
    """The content of a run's files, from which the report is made. Files that the run has not written are empty."""

    directory: RunDirectory
    config: dict[str, Any]
    """``config.yaml``."""
    steps: list[dict[str, Any]]
    """``StepRecord``s in the order of their steps, one per step."""
    evaluations: list[dict[str, Any]]
    """Evaluation records in the order of their steps, one per step."""
    generations: list[dict[str, Any]]
    """Records of predictions during the training in the order of their steps, one per step."""
    plan: dict[str, Any]
    trained: dict[str, Any]
    """``train_results.json``."""
    evaluated: dict[str, Any]
    """``eval_results.json``."""
    metrics: list[dict[str, Any]]
    """Rows of ``metrics.jsonl``: metrics of the predictions, but for those during the training."""

    @property
    def name(self) -> str:
        """Name of the run."""
        return str(self.option("run.name") or self.directory.path.resolve().name)

    @property
    def other_model(self) -> str:
        """The model of a run that trains nothing (``evaluate.model``, ``generate.model``); empty if the run trains."""
        model = self.option("evaluate.model") or self.option("generate.model", "")
        return "" if self.steps or self.evaluations else str(model)

    @property
    def other_work(self) -> list[str]:
        """What a run that trains nothing does with its model: ``evaluation``, ``predictions`` or both."""
        work = {"evaluation": "evaluate.model", "predictions": "generate.model"}
        return [name for name, key in work.items() if self.option(key)]

    @property
    def evaluation_sets(self) -> list[str]:
        """Names of the evaluation sets if there are several, which then have their own results; otherwise none."""
        keys = [key for record in (*self.evaluations, self.evaluated) for key in record]
        names = list(dict.fromkeys(match[1] for key in keys if (match := _SET_LOSS.fullmatch(key))))
        return names if len(names) > 1 else []

    @property
    def resolved(self) -> dict[str, Any]:
        """Settings after every default that raysft decides, as ``plan.json`` has them: dtype, adapter, workers, …"""
        resolved = self.plan.get("resolved")
        return resolved if isinstance(resolved, dict) else {}

    @property
    def finetuning(self) -> str:
        """``full``, ``freeze``, ``lora`` or ``oft``."""
        return str(self.resolved.get("finetuning") or self.option("model.finetuning", ""))

    @property
    def adapter(self) -> str:
        """Kind of the adapter that the run trains, ``lora`` or ``oft``; empty if it trains weights of the model."""
        adapter = str(self.resolved.get("adapter") or "none")
        return "" if adapter == "none" else adapter

    @property
    def library(self) -> str:
        """The library that loads the trained model: peft or transformers."""
        return "peft" if self.adapter else "transformers"

    @property
    def best(self) -> tuple[int, str, float] | None:
        """Step, metric and value of the best evaluation of a training that is complete; None if it looked for none."""
        step, metric = self.trained.get("best_step"), str(self.option("train.best_metric", "eval_loss"))
        value = finite(self.trained.get(f"best_{metric}"))
        return (step, metric, value) if isinstance(step, int) and value is not None else None

    def sources(self, part: str) -> list[dict[str, Any]]:
        """The sources in ``data.train`` or ``data.eval``."""
        sources = self.option(f"data.{part}", [])
        return [source for source in sources if isinstance(source, dict)] if isinstance(sources, list) else []

    def option(self, key: str, default: Any = None) -> Any:
        """Value of a dotted config key; ``default`` if it is missing or null."""
        value: Any = self.config
        for part in key.split("."):
            value = value.get(part) if isinstance(value, dict) else None
        return default if value is None else value


def finite(value: Any) -> float | None:
    """The value as a float if it is a finite number, otherwise None.

    >>> finite(2), finite(float("inf")), finite("2"), finite(True)
    (2.0, None, None, None)
    """
    number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    return float(value) if number else None


def series(records: list[dict[str, Any]], key: str) -> tuple[list[int], list[float]]:
    """Steps and values of one key, without records in which it is missing or not finite.

    >>> series([{"current_steps": 1, "loss": 2.5}, {"current_steps": 2, "loss": float("nan")}], "loss")
    ([1], [2.5])
    """
    points = [(record["current_steps"], finite(record.get(key))) for record in records]
    return [step for step, value in points if value is not None], [value for _, value in points if value is not None]


def read_run(run: RunDirectory, problems: list[str] | None = None) -> RunLog:
    """Read a run directory.

    Args:
        run: the directory.
        problems: if given, corrupt files are left out, and receives a line for each of them.

    Raises:
        RequestError: the folder is not a run directory, or one of its files is corrupt and ``problems`` is not given.
    """
    if not run.config.is_file():
        fact = "not a run directory (no config.yaml)" if run.path.is_dir() else "no such folder"
        raise RequestError(f"{run.remote or run.path}: {fact}; pass the folder {{run.storage}}/{{run.name}} of a run")

    def readable(read: Callable[[Path], Any], path: Path, otherwise: Any) -> Any:
        try:
            return read(path)
        except RequestError as error:
            if problems is None:
                raise
            problems.append(str(error))
            return otherwise

    steps, evaluations, generations = readable(_read_log, run.trainer_log, ({}, {}, {}))
    return RunLog(
        directory=run,
        config=readable(_read_config, run.config, {}),
        steps=[steps[step] for step in sorted(steps)],
        evaluations=[evaluations[step] for step in sorted(evaluations)],
        generations=[generations[step] for step in sorted(generations)],
        plan=readable(read_object, run.plan, {}),
        trained=readable(read_object, run.results("train"), {}),
        evaluated=readable(read_object, run.results("eval"), {}),
        metrics=readable(_read_metrics, run.metrics, []),
    )


def _read_metrics(path: Path) -> list[dict[str, Any]]:
    return [row for row in read_lines(path) if row.get("step") is None]


_Records = dict[int, dict[str, Any]]


def _read_log(path: Path) -> tuple[_Records, _Records, _Records]:
    """Read ``trainer_log.jsonl`` as records of steps, of evaluations and of predictions, each by step."""
    steps: _Records = {}
    evaluations: _Records = {}
    generations: _Records = {}
    for number, record in enumerate(read_lines(path), start=1):
        step = record.get("current_steps")
        if not isinstance(step, int):
            raise RequestError(f"{path}:{number}: current_steps must be an integer, but is {step!r}; {_remedy('line')}")
        # A resumed run repeats the steps after its checkpoint. The last record belongs to the weights that were kept.
        if "loss" in record:
            # json.loads makes new keys for each line: a third of the memory for 100,000 steps.
            steps[step] = {sys.intern(key): value for key, value in record.items()}
        if any(key.startswith("eval_") for key in record):
            evaluations[step] = record
        if any(key.startswith("predict_") for key in record):
            generations[step] = record
    return steps, evaluations, generations


def read_lines(path: Path) -> Iterator[dict[str, Any]]:
    """Read JSON lines with errors that name file and line. A torn last line, as a killed writer leaves it, is skipped.

    Raises:
        RequestError: a line is not a JSON object, or one of its values has another type than it should have.
    """
    number = 0
    try:
        for number, row in enumerate(read_jsonl(path), start=1):
            if not isinstance(row, dict):
                raise RequestError(f"{path}:{number}: not a JSON object; {_remedy('line')}")
            if wrong := fault(path.name, row):
                raise RequestError(f"{path}:{number}: {wrong}; {_remedy('line')}")
            yield row
    except RequestError:  # which is a ValueError, as those of the parser are
        raise
    except UnicodeDecodeError:
        raise RequestError(f"{path}:{_undecodable_line(path)}: invalid UTF-8; {_remedy('line')}") from None
    except _INVALID as error:
        raise RequestError(f"{path}:{number + 1}: invalid JSON ({_reason(error)}); {_remedy('line')}") from None


def read_evaluations(run: RunDirectory) -> list[dict[str, Any]]:
    """Evaluation records of a run in the order of their steps; empty if it has no log.

    Raises:
        RequestError: the log is corrupt.
    """
    _, evaluations, _ = _read_log(run.trainer_log)
    return [evaluations[step] for step in sorted(evaluations)]


def read_object(path: Path) -> dict[str, Any]:
    """Read a JSON object; empty if the file does not exist.

    Raises:
        RequestError: the file holds something else, or a value of another type than it should have.
    """
    if not path.exists():
        return {}
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except UnicodeDecodeError:
        raise RequestError(f"{path}:{_undecodable_line(path)}: invalid UTF-8; {_remedy('file')}") from None
    except _INVALID as error:
        line = getattr(error, "lineno", 1)
        raise RequestError(f"{path}:{line}: invalid JSON ({_reason(error)}); {_remedy('file')}") from None
    if not isinstance(value, dict):
        raise RequestError(f"{path}:1: not a JSON object; {_remedy('file')}")
    if wrong := fault(path.name, value):
        raise RequestError(f"{path}: {wrong}; {_remedy('file')}")
    return value


def _read_config(path: Path) -> dict[str, Any]:
    """Read the config as nested mappings. It is not validated, so that runs of older versions have a report too."""
    line = 1
    try:
        value = yaml.safe_load(path.read_bytes())
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # 2024-99-99 is read as a date
        mark = getattr(error, "problem_mark", None)
        value, line = None, mark.line + 1 if mark else _undecodable_line(path)
    if not isinstance(value, dict):
        raise RequestError(f"{path}:{line}: not a YAML mapping; {_CONFIG_REMEDY}")
    if wrong := fault(path.name, value):
        raise RequestError(f"{path}: {wrong}; {_CONFIG_REMEDY}")
    return value


def _undecodable_line(path: Path) -> int:
    """Number of the first line that is not UTF-8; 1 if there is none."""
    for number, line in enumerate(path.read_bytes().split(b"\n"), start=1):
        try:
            line.decode("utf-8")
        except UnicodeDecodeError:
            return number
    return 1


def _reason(error: Exception) -> str:
    return getattr(error, "msg", None) or one_line(error)


def _remedy(what: str) -> str:
    return f"restore or delete the {what}, then run raysft report again"
