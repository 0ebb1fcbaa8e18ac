"""The report as one HTML page, ``report.html``: it needs no network, no script and no other file."""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import jinja2
import yaml

from raysft.report.card import masked, versions
from raysft.report.charts import loss_charts, small_charts
from raysft.report.comparison import Comparison, compare, unfinished
from raysft.report.headline import interval, verdict
from raysft.report.histograms import histograms
from raysft.report.predictions import read_predictions, visible
from raysft.report.read_run import RunLog, finite, read_lines
from raysft.report.run_facts import generated, planned, went
from raysft.report.sources import reasons, sources
from raysft.storage.json_files import write_atomically

MOST_CHANGES = 50
"""Changes on the way that are listed, the last ones."""


def write_page(log: RunLog, warnings: Sequence[str] = ()) -> None:
    """Write ``report.html``.

    Args:
        log: what the run left.
        warnings: lines that stand below the verdict.

    Raises:
        RunFailed: a file of the run is corrupt.
    """
    rows, predictions = compare(log), read_predictions(log)
    total, why = reasons(log)
    text = _template().render(
        name=log.name,
        what=_what(log),
        state=_state(log),
        faces=verdict(log, rows),
        warnings=[visible(masked(line)) for line in warnings],
        unfinished=unfinished(log),
        loss=loss_charts(log),
        charts=small_charts(log),
        comparisons=_by_source(rows),
        intervals=any(row.after_interval or row.before_interval for row in rows),
        predictions=predictions,
        other_model=bool(log.other_model),
        histograms=histograms(predictions, "predicted" if log.other_model else "after"),
        colours={"after": 0, "predicted": 0, "before": 1, "reference": 2},
        interval=interval,
        sources=sources(log),
        holdout=finite(log.option("data.holdout")) or 0,
        rejected=total,
        reasons=why,
        tables=[("As planned", planned(log)), ("As it went", went(log)), ("Generation", generated(log))],
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


@cache
def _template() -> jinja2.Template:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    environment.filters |= {"percent": lambda value: f"{100 * value:.0f}%"}
    return environment.get_template("page.html.jinja")


def _what(log: RunLog) -> str:
    """What was trained, in a line."""
    if log.other_model:
        return visible(f"{masked(log.other_model)} · predictions of this model as it is, nothing was trained")
    stage = "continued pre-training" if log.option("stage") == "pt" else "supervised fine-tuning"
    finetuning = log.option("model.finetuning", "full")
    rank = log.option("model.lora.rank")
    how = {"full": "all weights", "freeze": "some layers", "lora": f"LoRA adapter, rank {rank}"}.get(
        finetuning, f"{finetuning}"
    )
    return visible(f"{masked(log.option('model.path', '?'))} · {stage} · {how}")


def _state(log: RunLog) -> str:
    """How far the training is, if it is not at its end."""
    if log.other_model:
        return ""
    if not log.steps:
        return "No step of training is logged yet."
    done, total = log.steps[-1]["current_steps"], log.steps[-1].get("total_steps")
    if isinstance(total, int) and done < total and not log.trained:
        return f"The training stands at step {done:,} of {total:,}."
    return ""


def _by_source(rows: list[Comparison]) -> list[tuple[str, list[Comparison]]]:
    """The measures over all sources, then those of each."""
    names = dict.fromkeys(row.source for row in rows)
    return [(name, [row for row in rows if row.source == name]) for name in sorted(names, key=bool)]


def _config(log: RunLog) -> list[tuple[str, str, bool]]:
    """The resolved config as YAML: (section, text, whether there is more of it than one line)."""
    sections = []
    for key, value in log.config.items():
        text = yaml.safe_dump({key: _masked(value)}, sort_keys=False, allow_unicode=True, width=110)
        sections.append((visible(str(key)), visible(text), isinstance(value, dict | list)))
    return sections


def _masked(value: Any) -> Any:
    """A config as it was written before secrets in it were refused may hold some."""
    if isinstance(value, dict):
        return {key: _masked(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_masked(inner) for inner in value]
    return masked(value) if isinstance(value, str) else value


def _changes(log: RunLog) -> list[tuple[int, str, str, str]]:
    """What was changed on the way: (number of the change, key, before, after), the last ones."""
    changes = []
    for number, row in enumerate(read_lines(log.directory.changes), start=1):
        changed = row.get("changed")
        for key, values in (changed if isinstance(changed, dict) else {}).items():
            before, after = values if isinstance(values, list) and len(values) == 2 else (None, values)
            changes.append((number, visible(str(key)), _shown(before), _shown(after)))
    return changes[-MOST_CHANGES:]


def _shown(value: Any) -> str:
    return visible(json.dumps(_masked(value), ensure_ascii=False)[:300])
