"""Batch inference: prompts through a pool of engines on the cluster, to predictions on disk and their metrics."""

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
    """Predict what follows each prompt, write the predictions in the order of the prompts, and score them.

    Ray must be initialised. Predictions are kept as they come: when this is killed and called again with the same
    model, prompts and settings, only what is missing is generated; a complete ``output`` without
    failed prompts is only scored again.

    Args:
        model: folder of a Hugging Face model, or of a peft adapter whose base is a local folder.
        prompts: Parquet with the columns id (unique), source, prompt, input_ids and label; where its metadata has
            ``end_tokens``, generation stops at these too.
        output: JSON lines to write: ``{"prompt", "predict", "label", "id", "source", "tokens", "stop"}``, and ``error``
            where a prompt could not be completed; its prediction is empty then.
        role: what the model is in this run, for the metric rows.
        progress: say on stderr how far it is.

    Returns:
        The rows of ``metrics.score``, and two of the call that generated: ``runtime``, and ``tokens_per_second`` without the
        start of the engines.

    Raises:
        RequestError: the model, the prompts, a metric, the engine or the size of the pool cannot be, said before anything
            starts.
        RunFailed: an engine failed; what it had predicted stays on disk.
    """
    metrics.check(config)
    check_engine(config)
    output = Path(output)
    table = _read_prompts(Path(prompts))
    journal = PredictionStore(output, fingerprint(config, model, Path(prompts)))
    facts = journal.finished()
    if facts is None:
        check_weights(model_copy(model), model)
        check_suitable(config, model)
        facts = _generate_missing(config, model, table, journal, name=output.stem, shown=progress)
    return [
        *metrics.score(config, list(read_jsonl(output)), role),
        metrics.MetricRow("runtime", None, role, facts["runtime"], unit="seconds", higher_is_better=False),
        metrics.MetricRow(
            "tokens_per_second", None, role, facts["tokens_per_second"], unit="tokens/second", higher_is_better=True
        ),
    ]


def _generate_missing(
    config: Config, model: str, table: pa.Table, journal: PredictionStore, *, name: str, shown: bool
) -> dict[str, Any]:
    """Complete the prompts that the journal does not have, and finish it; gives the facts of this."""
    with contextlib.closing(journal):
        # What failed before is tried again: memory may have run out for what else was there.
        entries = {id: entry for id, entry in journal.open().items() if not entry["error"]}
        missing = without(table, entries)
        use_gpu = config.scaling.use_gpu
        state = GenerationProgress(
            name, total=table.num_rows, done=len(entries), waiting=lambda: engine_pool.free_now(use_gpu), shown=shown
        )
        with state, contextlib.closing(completions(config, model, missing, _ends(table))) as batches:
            for batch in batches:
                journal.append(batch)
                entries.update((entry["id"], entry) for entry in batch)
                state.advance(len(batch), sum(entry["tokens"] for entry in batch), batch[0]["seconds"])
        if entries and all(entry["error"] for entry in entries.values()):
            raise RunFailed(f"generation failed: {next(iter(entries.values()))['error']}")
        failed = [entry for entry in entries.values() if entry["error"]]
        facts = {"runtime": round(state.seconds, 3), "tokens_per_second": round(state.tokens_per_second, 3)}
        journal.finish(_rows(table, entries), facts, len(failed))
    if failed:
        print(f"{name}: {len(failed)} of {table.num_rows} prompts were not completed (generate once more to try them again), "
              f"the first of them: {failed[0]['id']}: {failed[0]['error']}", file=sys.stderr)  # fmt: skip
    cut = sum(1 for entry in entries.values() if entry["cut"])
    if cut:
        print(f"{name}: {cut} of {table.num_rows} prompts lost their beginning, which with generate.max_new_tokens="
              f"{config.generate.max_new_tokens} has no room in the model's positions", file=sys.stderr)  # fmt: skip
    return facts


def _read_prompts(path: Path) -> pa.Table:
    try:
        table = pq.read_table(path)
    except (OSError, pa.ArrowInvalid) as error:
        raise RequestError(f"{path}: the prompts cannot be read as Parquet ({error}); write them anew") from None
    lacking = [column for column in COLUMNS if column not in table.column_names]
    if lacking:
        raise RequestError(f"{path}: the prompts lack the column {lacking[0]!r} (of {table.column_names}); add it")
    if len(set(table["id"].to_pylist())) != table.num_rows:
        raise RequestError(f"{path}: two of {table.num_rows} prompts have the same id; give each its own")
    return table.select(list(COLUMNS))


def _ends(prompts: pa.Table) -> list[int]:
    """Tokens that end an answer to the prompts, as whoever wrote them says."""
    return json.loads((prompts.schema.metadata or {}).get(b"end_tokens", b"[]"))


def _rows(table: pa.Table, entries: dict[str, dict[str, Any]]) -> list[dict[str, Any]]:
    """The predictions as the output has them, in the order of the prompts."""
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
