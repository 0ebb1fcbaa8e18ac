"""Batch inference: send prompts through a pool of engines, store the predictions, and score them."""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from raysft.config import Config
from raysft.errors import RequestError, RunFailed
from raysft.generate import engine_pool, metrics
from raysft.generate.engines import check_engine, check_suitable
from raysft.generate.prediction_store import PredictionStore, fingerprint
from raysft.generate.progress import GenerationProgress
from raysft.generate.ray_pipeline import ModelPrompts, completions, without
from raysft.models.weight_files import check_weights
from raysft.storage.json_files import read_jsonl
from raysft.storage.local_cache import model_copy

COLUMNS = ("id", "source", "prompt", "input_ids", "label")


@dataclass(frozen=True)
class Output:
    """What one model predicts, and where it is written."""

    model: str
    """Folder of a Hugging Face model, or of a peft adapter whose base is a local folder."""
    path: Path
    """JSON Lines file: ``{"prompt", "predict", "label", "id", "source", "tokens", "stop"}``. A prompt that failed has an
    ``error`` and an empty prediction."""
    role: metrics.ModelRole = "trained"
    """The part that the model plays in this run, for the metric rows."""
    described: str = "the model"


def generate(
    config: Config,
    prompts: Path,
    outputs: Sequence[Output],
    *,
    progress: bool = True,
    notify: Callable[[str], None] = lambda line: None,
) -> list[metrics.MetricRow]:
    """Generate a prediction for each prompt with each model, write them in the order of the prompts, and score them.

    Ray must be initialised. One pool of engines serves all outputs, one after the other. Predictions are stored as they arrive:
    if the process is killed and called again with the same models, prompts and settings, it generates only what is missing. A
    complete output without failed prompts is only scored again.

    Args:
        prompts: Parquet file with the columns id (unique), source, prompt, input_ids and label; generation also stops at the
            ``end_tokens`` of its metadata.
        outputs: in the order in which they are generated, each with a file of its own.
        progress: report progress on stderr.
        notify: gets a line when it is an output's turn.

    Returns:
        For each output, the rows of ``metrics.score`` and two about its generation. ``runtime`` is the time until its last
        prediction: of the first output since the call, with the start of the engines; of another since the output before was
        complete, or since its own first batch began if that was earlier. ``tokens_per_second`` is that from the start of its
        first batch to the end of its last.

    Raises:
        RequestError: a model, the prompts, a metric, the engine or the pool size is invalid; raised before anything starts.
        RunFailed: an engine failed; the predictions so far stay on disk.
    """
    metrics.check(config)
    check_engine(config)
    table = _read_prompts(Path(prompts))
    predictions = [_Predictions(config, output, Path(prompts), table, shown=progress) for output in outputs]
    for each in predictions:
        if each.facts is None:
            check_weights(model_copy(each.output.model), each.output.model)
            check_suitable(config, each.output.model)
    _generate_missing(config, table, predictions, notify)
    return [row for each in predictions for row in each.score()]


def _generate_missing(
    config: Config, table: pa.Table, predictions: Sequence[_Predictions], notify: Callable[[str], None]
) -> None:
    """Generate what the outputs lack, and finish each as soon as it is complete."""
    unfinished = [each for each in predictions if each.facts is None]
    with contextlib.ExitStack() as stack:
        asked = [ModelPrompts(each.output.model, stack.enter_context(each).missing()) for each in unfinished]
        batches = stack.enter_context(contextlib.closing(completions(config, asked, _end_tokens(table))))
        for each in predictions:
            notify(f"generating with {each.output.described}")
            if each not in unfinished:
                continue
            with each.progress:
                if not each.is_complete:
                    for index, batch in batches:
                        # Engines may be at the next output while the last batches of this one are on their way.
                        unfinished[index].add(batch)
                        if each.is_complete:
                            break
                each.finish()
            each.warn()


class _Predictions:
    """The predictions of one output, while they are generated; a context that keeps its file open.

    Attributes:
        facts: runtime and speed of the call that wrote the output; None until it is complete.
    """

    def __init__(self, config: Config, output: Output, prompts: Path, table: pa.Table, *, shown: bool) -> None:
        self._config, self.output, self._table, self._shown = config, output, table, shown
        self._store = PredictionStore(output.path, fingerprint(config, output.model, prompts))
        self._entries: dict[str, dict[str, Any]] = {}
        self.facts = self._store.finished()

    def __enter__(self) -> _Predictions:
        # Retry what failed before: memory may have run out for another reason.
        self._entries = {id: entry for id, entry in self._store.open().items() if not entry["error"]}
        use_gpu = self._config.scaling.use_gpu
        self.progress = GenerationProgress(
            self.output.path.stem,
            total=self._table.num_rows,
            done=len(self._entries),
            waiting=lambda: engine_pool.free_now(use_gpu),
            shown=self._shown,
        )
        return self

    def __exit__(self, *_: object) -> None:
        self._store.close()

    def missing(self) -> pa.Table:
        """Return the prompts without a prediction."""
        return without(self._table, self._entries)

    @property
    def is_complete(self) -> bool:
        return len(self._entries) == self._table.num_rows

    def add(self, batch: list[dict[str, Any]]) -> None:
        """Store a batch of predictions, and write the output if they are the last.

        Raises:
            RunFailed: all prompts failed.
        """
        self._store.append(batch)
        self._entries.update((entry["id"], entry) for entry in batch)
        self.progress.advance(len(batch), sum(entry["tokens"] for entry in batch), batch[0]["seconds"])
        if self.is_complete:
            self.finish()

    def finish(self) -> None:
        """Write the output, unless it is written already.

        Raises:
            RunFailed: all prompts failed.
        """
        if self.facts is not None:
            return
        entries = self._entries
        if entries and all(entry["error"] for entry in entries.values()):
            raise RunFailed(f"generation failed: {next(iter(entries.values()))['error']}")
        facts = {
            "runtime": round(self.progress.seconds, 3),
            "tokens_per_second": round(self.progress.tokens_per_second, 3),
        }
        failed = sum(1 for entry in entries.values() if entry["error"])
        self._store.finish(_rows(self._table, entries), facts, failed)
        self.facts = facts

    def warn(self) -> None:
        """Say on stderr which prompts failed or were cut."""
        name, total = self.output.path.stem, self._table.num_rows
        failed = [entry for entry in self._entries.values() if entry["error"]]
        if failed:
            print(f"{name}: {len(failed)} of {total} prompts failed, the first of them {failed[0]['id']}: "
                  f"{failed[0]['error']}; generate again to retry them", file=sys.stderr)  # fmt: skip
        cut = sum(1 for entry in self._entries.values() if entry["cut"])
        if cut:
            print(f"{name}: {cut} of {total} prompts lost their beginning, because they exceed the model's positions "
                  f"with generate.max_new_tokens={self._config.generate.max_new_tokens}; lower it", file=sys.stderr)  # fmt: skip

    def score(self) -> list[metrics.MetricRow]:
        """Score a complete output."""
        assert self.facts is not None
        role, facts = self.output.role, self.facts
        speed = facts["tokens_per_second"]
        return [
            *metrics.score(self._config, list(read_jsonl(self.output.path)), role),
            metrics.MetricRow("runtime", None, role, facts["runtime"], unit="seconds", higher_is_better=False),
            metrics.MetricRow("tokens_per_second", None, role, speed, unit="tokens/second", higher_is_better=True),
        ]


def _read_prompts(path: Path) -> pa.Table:
    try:
        table = pq.read_table(path)
    except (OSError, pa.ArrowInvalid) as error:
        raise RequestError(f"{path}: the prompts cannot be read as Parquet ({error}); write them again") from None
    missing = [column for column in COLUMNS if column not in table.column_names]
    if missing:
        raise RequestError(f"{path}: the prompts lack the column {missing[0]!r} (of {table.column_names}); add it")
    if len(set(table["id"].to_pylist())) != table.num_rows:
        raise RequestError(f"{path}: two of {table.num_rows} prompts have the same id; make the ids unique")
    return table.select(list(COLUMNS))


def _end_tokens(prompts: pa.Table) -> list[int]:
    """Read the tokens that end an answer from the metadata of the prompts."""
    return json.loads((prompts.schema.metadata or {}).get(b"end_tokens", b"[]"))


def _rows(table: pa.Table, entries: dict[str, dict[str, Any]]) -> list[dict[str, Any]]:
    """Put the predictions in the order of the prompts, with the columns of the output."""
    columns = (table[column].to_pylist() for column in ("prompt", "label", "id", "source"))
    return [
        {
            "prompt": prompt,
            "predict": entries[id]["predict"],
            "label": label,
            "id": id,
            "source": source,
            **{key: entries[id][key] for key in ("tokens", "stop", "error") if entries[id][key]},
        }
        for prompt, label, id, source in zip(*columns, strict=True)
    ]
