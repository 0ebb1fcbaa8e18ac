"""Batch inference: send prompts through a pool of engines, store the predictions, and score them."""

from __future__ import annotations

import contextlib
import json
import sys
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
from raysft.generate.ray_pipeline import completions, without
from raysft.models.weight_files import check_weights
from raysft.storage.json_files import read_jsonl
from raysft.storage.local_cache import model_copy

COLUMNS = ("id", "source", "prompt", "input_ids", "label")


def generate(
    config: Config,
    *,
    model: str,
    prompts: Path,
    output: Path,
    role: metrics.ModelRole = "trained",
    progress: bool = True,
) -> list[metrics.MetricRow]:
    """Generate a prediction for each prompt, write them in the order of the prompts, and score them.

    Ray must be initialised. Predictions are stored as they arrive: if the process is killed and called again with the same
    model, prompts and settings, it generates only what is missing. A complete ``output`` without failed prompts is only
    scored again.

    Args:
        model: folder of a Hugging Face model, or of a peft adapter whose base is a local folder.
        prompts: Parquet file with the columns id (unique), source, prompt, input_ids and label; generation also stops at the
            ``end_tokens`` of its metadata.
        output: JSON Lines file to write: ``{"prompt", "predict", "label", "id", "source", "tokens", "stop"}``. A prompt that
            failed has an ``error`` and an empty prediction.
        role: the part that the model plays in this run, for the metric rows.
        progress: report progress on stderr.

    Returns:
        The rows of ``metrics.score``, and two rows about the call that generated: ``runtime``, and ``tokens_per_second``
        without the start of the engines.

    Raises:
        RequestError: the model, the prompts, a metric, the engine or the pool size is invalid; raised before anything starts.
        RunFailed: an engine failed; its predictions so far stay on disk.
    """
    metrics.check(config)
    check_engine(config)
    output = Path(output)
    table = _read_prompts(Path(prompts))
    store = PredictionStore(output, fingerprint(config, model, Path(prompts)))
    facts = store.finished()
    if facts is None:
        check_weights(model_copy(model), model)
        check_suitable(config, model)
        facts = _generate_missing(config, model, table, store, name=output.stem, shown=progress)
    return [
        *metrics.score(config, list(read_jsonl(output)), role),
        metrics.MetricRow("runtime", None, role, facts["runtime"], unit="seconds", higher_is_better=False),
        metrics.MetricRow(
            "tokens_per_second", None, role, facts["tokens_per_second"], unit="tokens/second", higher_is_better=True
        ),
    ]


def _generate_missing(
    config: Config, model: str, table: pa.Table, store: PredictionStore, *, name: str, shown: bool
) -> dict[str, Any]:
    """Generate the predictions that the store lacks, and finish it; returns the runtime and the speed."""
    with contextlib.closing(store):
        # Retry what failed before: memory may have run out for another reason.
        entries = {id: entry for id, entry in store.open().items() if not entry["error"]}
        missing = without(table, entries)
        use_gpu = config.scaling.use_gpu
        state = GenerationProgress(
            name, total=table.num_rows, done=len(entries), waiting=lambda: engine_pool.free_now(use_gpu), shown=shown
        )
        with state, contextlib.closing(completions(config, model, missing, _end_tokens(table))) as batches:
            for batch in batches:
                store.append(batch)
                entries.update((entry["id"], entry) for entry in batch)
                state.advance(len(batch), sum(entry["tokens"] for entry in batch), batch[0]["seconds"])
        if entries and all(entry["error"] for entry in entries.values()):
            raise RunFailed(f"generation failed: {next(iter(entries.values()))['error']}")
        failed = [entry for entry in entries.values() if entry["error"]]
        facts = {"runtime": round(state.seconds, 3), "tokens_per_second": round(state.tokens_per_second, 3)}
        store.finish(_rows(table, entries), facts, len(failed))
    if failed:
        print(f"{name}: {len(failed)} of {table.num_rows} prompts failed, the first of them {failed[0]['id']}: "
              f"{failed[0]['error']}; generate again to retry them", file=sys.stderr)  # fmt: skip
    cut = sum(1 for entry in entries.values() if entry["cut"])
    if cut:
        print(f"{name}: {cut} of {table.num_rows} prompts lost their beginning, because they exceed the model's "
              f"positions with generate.max_new_tokens={config.generate.max_new_tokens}; lower it", file=sys.stderr)  # fmt: skip
    return facts


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
