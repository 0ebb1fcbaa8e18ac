"""The nouns that stages hand to each other, and the layout of a run directory."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from raysft.copies import working_copy
from raysft.storage import Place

IGNORED = -100
"""Label of a token that is not trained on."""

MODEL_MARKS = ("adapter_config.json", "config.json")
"""What a model's folder holds one of, once it is whole."""


def is_whole(model: Place) -> bool:
    """Whether a model's folder is there as it was written."""
    return any((model / mark).exists() for mark in MODEL_MARKS)


Record = dict[str, Any]
"""One record of a data file, as read."""


class RunFailed(RuntimeError):
    """The request was right and the run failed all the same. The command exits with code 1."""


@dataclass(frozen=True)
class Message:
    """One turn of a conversation."""

    role: Literal["system", "user", "assistant", "tool"]
    content: str
    tool_calls: tuple[dict[str, Any], ...] = ()
    """Functions that the assistant calls, as ``{"type": "function", "function": {"name": …, "arguments": {…}}}``."""
    train: bool = True
    """Whether what the assistant wrote here may be trained on."""
    extra: dict[str, Any] = field(default_factory=dict)
    """The turn's other keys, any of which a chat template may read: ``name``, ``tool_call_id``, ``reasoning_content`` …"""
    given: dict[str, Any] | None = None
    """The turn as its record has it, where it is in the form that chat templates know and says more than role and content."""


@dataclass(frozen=True)
class Example:
    """One unpacked example as every format becomes it: a conversation, a text, or token ids."""

    source: str
    """Name of the source."""
    record: str
    """Where it stands: ``file:line`` or ``file:[index]``."""
    messages: tuple[Message, ...] = ()
    tools: tuple[dict[str, Any], ...] = ()
    """Functions that the assistant may call, as JSON schemas."""
    text: str = ""
    prompt: int | None = None
    """Characters of ``text`` that are a prompt; None for a text without one."""
    ids: tuple[int, ...] = ()
    """Token ids, where the data is tokenized already."""
    labels: tuple[int, ...] = ()
    """Labels of ``ids``."""
    weight: float = 1.0
    """What each of its trained tokens counts in the loss."""


@dataclass(frozen=True)
class Rejected:
    """A record that cannot be used."""

    source: str
    record: str
    reason: str


@dataclass(frozen=True)
class StepRecord:
    """One optimizer step, as logged and printed; the keys are those of LLaMA-Factory's ``trainer_log.jsonl`` and more."""

    current_steps: int
    total_steps: int
    loss: float
    """Mean loss of the step's trained tokens, natural logarithm."""
    lr: float
    grad_norm: float
    epoch: float
    percentage: float
    elapsed_time: str
    remaining_time: str
    throughput: float
    """Tokens per second over all workers, without padding."""
    total_tokens: int
    """Tokens without padding consumed so far."""
    trained_tokens: int
    """Trained tokens of this step: what its loss is divided by."""
    useful: float
    """Share of the step's row space that holds tokens and not padding."""
    rows: int
    """The cursor: rows consumed so far, over all workers."""
    step_seconds: float
    data_wait_seconds: float
    memory_gib: float
    """Peak memory of rank 0's device, or resident memory of its process without GPU."""
    memory_total_gib: float
    trained_throughput: float = 0.0
    """Trained tokens per second over all workers: what the training is for."""
    throughput_per_device: float = 0.0
    """Tokens per second of one worker's device, without padding."""
    trained_throughput_per_device: float = 0.0
    """Trained tokens per second of one worker's device."""
    mfu: float | None = None
    """Model FLOPs utilisation: share of the devices' 16-bit peak that the model's own operations use; None without GPU."""
    source_losses: dict[str, float] = field(default_factory=dict)
    """Mean loss of each source's trained tokens in this step, where there are several sources."""

    def line(self) -> str:
        """The step as one line for people.

        >>> StepRecord(120, 1000, 1.83421, 1.9e-05, 0.71, 0.1, 12.0, "0:10", "1:13", 41234.0, 9, 5, 0.961, 3840,
        ...            2.0, 0.0, 61.2, 80.0).line()
        'step 120/1000 | loss 1.8342 | lr 1.9e-05 | grad 0.71 | 41.2k tok/s | 96.1% useful | mem 61/80 GiB'
        """
        speed = f"{self.throughput / 1000:.1f}k" if self.throughput >= 1000 else f"{self.throughput:.0f}"
        return (
            f"step {self.current_steps}/{self.total_steps} | loss {self.loss:.4f} | lr {self.lr:.1e} | "
            f"grad {self.grad_norm:.2f} | {speed} tok/s | {100 * self.useful:.1f}% useful | "
            + (f"{100 * self.mfu:.0f}% mfu | " if self.mfu is not None else "")
            + f"mem {self.memory_gib:.0f}/{self.memory_total_gib:.0f} GiB"
        )


@dataclass(frozen=True)
class Evaluation:
    """Loss and accuracy of one evaluation set at one moment of the training."""

    name: str
    step: int
    loss: float
    """Mean loss of the trained tokens, natural logarithm."""
    accuracy: float
    """Share of trained tokens that are the most probable one."""
    tokens: int
    """Trained tokens that the two are means over."""

    @property
    def perplexity(self) -> float:
        """exp(loss); infinite where that overflows."""
        try:
            return math.exp(self.loss)
        except OverflowError:
            return math.inf


def evaluation_results(evaluations: list[Evaluation]) -> dict[str, float]:
    """Evaluations as flat results: ``eval_loss``, ``eval_perplexity``, ``eval_accuracy`` over all sets, token-weighted, and
    with more than one set ``eval_{name}_loss`` and so on for each.

    >>> evaluation_results([Evaluation("a", 3, 1.0, 0.5, 30), Evaluation("b", 3, 2.0, 0.1, 10)])["eval_loss"]
    1.25
    """
    total = sum(evaluation.tokens for evaluation in evaluations)
    if not total:
        return {}
    mean = Evaluation(
        name="",
        step=evaluations[0].step,
        loss=sum(e.loss * e.tokens for e in evaluations) / total,
        accuracy=sum(e.accuracy * e.tokens for e in evaluations) / total,
        tokens=total,
    )
    results: dict[str, float] = {}
    for evaluation in [mean, *(evaluations if len(evaluations) > 1 else [])]:
        prefix = f"eval_{evaluation.name}_" if evaluation.name else "eval_"
        results[prefix + "loss"] = evaluation.loss
        results[prefix + "perplexity"] = evaluation.perplexity
        results[prefix + "accuracy"] = evaluation.accuracy
        results[prefix + "tokens"] = evaluation.tokens
    return results


@dataclass(frozen=True)
class RunDirectory:
    """The files of a run, by the names that LLaMA-Factory's users know."""

    path: Path
    """Where the small ones are read and written: the folder itself, or the working copy of one elsewhere."""
    remote: Place | None = None
    """The folder itself where it is in an object store."""

    @classmethod
    def of(cls, place: Place) -> RunDirectory:
        """The run directory at a place."""
        return cls(place.local) if place.local else cls(working_copy(place), place)

    @property
    def place(self) -> Place:
        """The folder itself, with checkpoints and model."""
        return self.remote or Place.of(self.path)

    @property
    def config(self) -> Path:
        """The resolved config."""
        return self.path / "config.yaml"

    @property
    def plan(self) -> Path:
        """Rows, steps, tokens, padding and resources, as planned before the start."""
        return self.path / "plan.json"

    @property
    def trainer_log(self) -> Path:
        """One record for each step (``StepRecord``) and each evaluation."""
        return self.path / "trainer_log.jsonl"

    @property
    def trainer_state(self) -> Path:
        """The log history in Hugging Face's form."""
        return self.path / "trainer_state.json"

    @property
    def changes(self) -> Path:
        """What the run went on with although it was begun with something else, each time."""
        return self.path / "changes.jsonl"

    @property
    def rejected(self) -> Path:
        """Records that could not be used."""
        return self.path / "rejected.jsonl"

    @property
    def prompts(self) -> Path:
        """Prompts and references of the evaluation sets, tokenized."""
        return self.path / "prompts.parquet"

    @property
    def predictions(self) -> Path:
        """``{"prompt", "predict", "label", "id", "source"}`` a line, of the trained model."""
        return self.path / "generated_predictions.jsonl"

    @property
    def base_predictions(self) -> Path:
        """The same of the model before training."""
        return self.path / "generated_predictions_base.jsonl"

    @property
    def checkpoints(self) -> Place:
        """Checkpoints to resume from."""
        return self.place / "checkpoints"

    @property
    def model(self) -> Place:
        """The trained model or adapter, loads with transformers or peft."""
        return self.place / "model"

    @property
    def best(self) -> Place:
        """The model of the best evaluation so far, while the training goes on."""
        return self.place / ".best"

    def is_trained(self) -> bool:
        """Whether there is a trained model."""
        return is_whole(self.model)

    def is_done(self) -> bool:
        """Whether the training came to its end, with its model and its results written."""
        return self.results("train").exists() and self.is_trained()

    @property
    def model_card(self) -> Path:
        """The model card."""
        return self.path / "README.md"

    @property
    def page(self) -> Path:
        """The report as one HTML page."""
        return self.path / "report.html"

    def results(self, stage: Literal["train", "eval", "predict", "all"]) -> Path:
        """``train_results.json`` and its like."""
        return self.path / f"{stage}_results.json"

    def read_results(self, stage: Literal["train", "eval", "predict", "all"]) -> dict[str, Any]:
        """The results of a stage; empty where it has not run."""
        path = self.results(stage)
        return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}

    def write_results(self, stage: Literal["train", "eval", "predict"], results: Mapping[str, Any]) -> None:
        """Write a stage's results and the union of all stages' (``all_results.json``)."""
        write_json(self.results(stage), results)
        whole: dict[str, Any] = {}
        for each in ("train", "eval", "predict"):
            whole.update(self.read_results(each))
        write_json(self.results("all"), whole)


def write_atomically(path: Path, text: str) -> None:
    """Write a text file so that a reader sees the old one or the new one, never a part."""
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(f".{path.name}.{os.getpid()}")
    # Half a character, as bad data holds it, is written as the escape that JSON has for it.
    draft.write_text(text, encoding="utf-8", errors="backslashreplace")
    draft.replace(path)


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """Write JSON with indent 4 and sorted keys, atomically."""
    write_atomically(path, json.dumps(value, indent=4, sort_keys=True, ensure_ascii=False) + "\n")


def append_json(path: Path, value: Mapping[str, Any]) -> None:
    """Add one JSON object as a line."""
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(value, ensure_ascii=False) + "\n")


def write_jsonl(path: Path, rows: list[dict[str, Any]]) -> None:
    """Write one JSON object a line, atomically, not ASCII-escaped."""
    write_atomically(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def read_jsonl(path: Path) -> Iterator[dict[str, Any]]:
    """Read one JSON object a line; a torn last line, as a killed writer leaves it, is passed over."""
    if not path.exists():
        return
    with path.open(encoding="utf-8") as file:
        for line in file:
            if line.endswith("\n"):
                yield json.loads(line)


def flat(record: Any) -> dict[str, Any]:
    """A dataclass as a JSON object."""
    return asdict(record)
