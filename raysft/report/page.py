"""The report as one HTML page, ``report.html``, without network access, scripts or other files."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import yaml

from raysft.report.card import adapter_name, versions
from raysft.report.charts import loss_charts, small_charts
from raysft.report.comparison import Comparison, compare, unfinished
from raysft.report.headline import headline, interval_text
from raysft.report.histograms import histograms
from raysft.report.html import template
from raysft.report.predictions import read_predictions
from raysft.report.read_run import RunLog, finite, read_lines
from raysft.report.run_facts import evaluation_facts, generation_facts, plan_facts, training_facts
from raysft.report.sources import reasons, sources
from raysft.report.text import held_out, masked, visible
from raysft.storage.json_files import write_atomically

MAX_CHANGES = 50
"""Number of changed settings that are listed, the last ones."""


def write_page(log: RunLog, warnings: Sequence[str] = ()) -> None:
    """Write ``report.html``.

    Args:
        log: what the run wrote.
        warnings: lines below the headline figures.

    Raises:
        RequestError: a file of the run is corrupt.
    """
    rows, predictions = compare(log), read_predictions(log)
    rejected, rejection_reasons = reasons(log)
    text = template("page").render(
        name=log.name,
        subtitle=_subtitle(log),
        progress=progress(log),
        figures=headline(log),
        warnings=[visible(masked(line)) for line in warnings],
        unfinished=unfinished(log),
        loss=loss_charts(log),
        charts=small_charts(log),
        comparisons=_by_source(rows),
        intervals=any(row.after_interval or row.before_interval for row in rows),
        predictions=predictions,
        other_model=bool(log.other_model),
        histograms=histograms(predictions, "predicted" if log.other_model else "after"),
        colors={"after": 0, "predicted": 0, "before": 1, "reference": 2},
        interval_text=interval_text,
        sources=sources(log),
        holdout=held_out(finite(log.option("data.holdout")) or 0),
        rejected=rejected,
        reasons=rejection_reasons,
        tables=[
            ("Planned", plan_facts(log)),
            ("Measured", training_facts(log)),
            ("Evaluation", evaluation_facts(log)),
            ("Generation", generation_facts(log)),
        ],
        config=_config(log),
        versions=versions(),
        changes=_changes(log),
        files=[
            path.name
            for path in (log.directory.model_card, log.directory.trainer_log, log.directory.predictions)
            if path.is_file()
        ],
    )
    write_atomically(log.directory.page, text)


def _subtitle(log: RunLog) -> str:
    """Model, stage and method on one line."""
    if log.other_model:
        return visible(f"{masked(log.other_model)} · {' and '.join(log.other_work)}, nothing was trained")
    stage = "continued pre-training" if log.option("stage") == "pt" else "supervised fine-tuning"
    rank, block_size = log.option("model.lora.rank"), log.option("model.oft.block_size")
    method = {
        "full": "all weights",
        "freeze": "some layers",
        "lora": f"{adapter_name('lora')} adapter, rank {rank}",
        "oft": f"{adapter_name('oft')} adapter, block size {block_size}",
    }.get(log.finetuning, log.finetuning)
    return visible(f"{masked(log.option('model.path', '?'))} · {stage} · {method}")


def progress(log: RunLog) -> str:
    """How far the training is; empty once it has finished."""
    if log.other_model:
        return ""
    if not log.steps:
        return "No training step has been logged yet."
    done, total = log.steps[-1]["current_steps"], log.steps[-1].get("total_steps")
    if isinstance(total, int) and done < total and not log.trained:
        return f"Training has reached step {done:,} of {total:,}."
    return ""


def _by_source(rows: list[Comparison]) -> list[tuple[str, list[Comparison]]]:
    """Rows grouped by source, those over all sources first."""
    names = dict.fromkeys(row.source for row in rows)
    return [(name, [row for row in rows if row.source == name]) for name in sorted(names, key=bool)]


def _config(log: RunLog) -> list[tuple[str, str, bool]]:
    """The resolved config as YAML: (section, text, True if the section can be folded)."""
    sections = []
    for key, value in log.config.items():
        text = yaml.safe_dump({key: _masked(value)}, sort_keys=False, allow_unicode=True, width=110)
        sections.append((visible(str(key)), visible(text), isinstance(value, dict | list)))
    return sections


def _masked(value: Any) -> Any:
    """A value with all of its texts masked. Configs of older versions may hold secrets."""
    if isinstance(value, dict):
        return {key: _masked(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_masked(inner) for inner in value]
    return masked(value) if isinstance(value, str) else value


def _changes(log: RunLog) -> list[tuple[int, str, str, str]]:
    """Settings that changed when the run was resumed: (number of the change, key, before, after)."""
    changes = []
    for number, row in enumerate(read_lines(log.directory.changes), start=1):
        changed = row.get("changed")
        for key, values in (changed if isinstance(changed, dict) else {}).items():
            before, after = values if isinstance(values, list) and len(values) == 2 else (None, values)
            changes.append((number, visible(str(key)), _json(before), _json(after)))
    return changes[-MAX_CHANGES:]


def _json(value: Any) -> str:
    return visible(json.dumps(_masked(value), ensure_ascii=False)[:300])
