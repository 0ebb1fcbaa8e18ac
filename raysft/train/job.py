"""What the workers train: the job that the driver sends to each of them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np

from raysft.config import Config
from raysft.models.adapter_files import adapter_base
from raysft.models.end_of_turn import use_as_eos
from raysft.models.processor import has_processor, load_processor
from raysft.models.tokenizer import load_tokenizer
from raysft.storage.local_cache import model_copy
from raysft.storage.path import StoragePath
from raysft.storage.run_directory import RunDirectory

Batch = dict[str, np.ndarray]
"""Rows of one worker: ``row`` and ``tokens`` [rows], and the arrays of ``step.TENSORS`` [rows, sequence_length]."""

COLLECTIVE_SECONDS = 600
"""How long a worker waits for the others in a collective."""
SPLIT_WORKERS = 64
"""Most workers that share one Ray Data pipeline, where one actor serves them all. With more, each node reads its own rows."""


class RowPlan(Protocol):
    """The rows of each step, known before training starts (``data.rows.row_plan.RowPlan``)."""

    capacity: int
    global_batch_size: int
    step_rows: np.ndarray
    step_tokens: np.ndarray
    step_loss_tokens: np.ndarray
    step_weight: np.ndarray
    step_squares: np.ndarray

    def source_weight(self, step: int, sources: int) -> np.ndarray: ...

    @property
    def rows(self) -> int: ...

    @property
    def steps(self) -> int: ...

    @property
    def examples(self) -> int: ...

    def consumed(self, steps: int) -> int: ...

    def epoch_of(self, rows: int) -> float: ...

    def epochs_after(self, steps: int) -> float: ...


class RowSource(Protocol):
    """Rows to train or evaluate on (``data.rows.packed_dataset.PackedDataset``)."""

    @property
    def sources(self) -> tuple[str, ...]: ...

    @property
    def has_media(self) -> bool: ...

    @property
    def row_plan(self) -> Any: ...

    def content(self) -> dict[str, Any]: ...

    def steps(self, first: int, worker: int, workers: int) -> Iterator[Batch]: ...

    def batches(self, tables: Any, workers: int) -> Iterator[Batch]: ...

    def dataset(self, first: int, workers: int, group: int) -> Any: ...

    def node_shards(self, first: int, nodes: Sequence[str], data_label: str | None, group: int) -> list[Any]: ...

    def execution_options(self, workers: int, group: int) -> Any: ...

    def rows_for_rank(self, step: int, worker: int, workers: int) -> np.ndarray: ...

    def records(self, row: int) -> list[str]: ...


@dataclass(frozen=True)
class TrainJob:
    """Everything that a worker needs to know about a training run."""

    config: Config
    model: str
    """Folder or Hub id of the model to start from."""
    run: RunDirectory
    train_rows: Any
    """``RowSource``."""
    eval_rows: dict[str, Any]
    """Evaluation set → ``RowSource``."""
    adapter: str | None = None
    """Folder of an adapter to continue training."""
    reference: str | None = None
    """Folder or Hub id of ``train.reference_model``, a model or an adapter."""
    identity: dict[str, str] = field(default_factory=dict)
    """Hashes of the model and the data, as in ``Cursor.identity``."""
    ends: tuple[int, ...] = ()
    """Token ids that end an assistant turn, most frequent first, to be named in the trained model's files."""
    evaluations: StoragePath | None = None
    """Folder that caches evaluations of models before training; None to cache none."""
    generation_pauses: bool = True
    """True if the workers wait while the driver generates with the model of a step, leaving their devices to the engines."""

    @property
    def steps(self) -> int:
        """Optimizer steps of the run."""
        return int(self.train_rows.row_plan.steps)

    def processor(self) -> Any:
        """Load the model's processor, if any row has images."""
        return _processor(self.model, self.config.model.runs_code, (self.train_rows, *self.eval_rows.values()))

    def tokenizer(self) -> Any:
        """Load the tokenizer that is written with the model; it has the chat template that the run used, and stops
        where turns were trained to end."""
        tokenizer = load_tokenizer(self.model, self.config.model.runs_code)
        tokenizer.chat_template = self.config.chat_template or tokenizer.chat_template
        use_as_eos(tokenizer, self.ends)
        return tokenizer


@dataclass(frozen=True)
class EvaluationJob:
    """Everything that a worker needs to know about an evaluation without training."""

    config: Config
    run: RunDirectory
    model: str
    """Folder, URI or Hub id of the model or the adapter."""
    eval_rows: dict[str, Any]
    """Evaluation set → ``RowSource``."""
    runs_code: bool = False
    """True if code that comes with the model may run."""

    def processor(self) -> Any:
        """Load the model's processor, if any row has images."""
        return _processor(self.model, self.runs_code, tuple(self.eval_rows.values()))

    @property
    def steps(self) -> int:
        """Batches of the largest set."""
        return max((int(rows.row_plan.steps) for rows in self.eval_rows.values()), default=0)


def _processor(model: str, runs_code: bool, sources: Sequence[Any]) -> Any:
    if not any(rows.has_media for rows in sources):
        return None
    folder = model_copy(model)
    if not has_processor(folder):  # an adapter
        folder = adapter_base(folder) or folder
    return load_processor(folder, runs_code)
