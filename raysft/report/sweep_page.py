"""A sweep on one page, ``sweep.html``, and as a few lines for the terminal."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

from raysft.report.curves import number_text
from raysft.report.headline import Figure
from raysft.report.html import template
from raysft.report.importance import CITATION, importances
from raysft.report.lineage import events, lineage
from raysft.report.parallel import parallel
from raysft.report.read_run import finite
from raysft.report.run_facts import duration
from raysft.report.sweep import STATES, Configuration, Sweep, Trial, read_sweep
from raysft.report.sweep_charts import drawn, learning_curves, objective_charts, pareto, setting_text, slices
from raysft.report.text import masked, shortened, visible
from raysft.storage.json_files import write_atomically
from raysft.storage.run_directory import RunDirectory

PAGE = "sweep.html"
SCHEDULERS = {"asha": "ASHA", "median": "median stopping", "pbt": "population-based training"}
SHOWN_ROWS = 30
"""Number of trials in the table that is not folded."""


def write_sweep_page(directory: RunDirectory) -> Path:
    """Write ``sweep.html`` into the run directory of a sweep. It may be repeated at any time, also while the sweep runs.

    Returns:
        The page.

    Raises:
        RequestError: the folder is not a run directory, or ``config.yaml`` or ``trials.jsonl`` is corrupt.
    """
    return _write(read_sweep(directory))


def report_sweep(directory: RunDirectory) -> str:
    """Write ``sweep.html`` and return a summary for the terminal; raises as ``write_sweep_page``."""
    sweep = read_sweep(directory)
    _write(sweep)
    lines = [f"{sweep.log.name}: {', '.join([f'{len(sweep.trials):,} trials', *_states(sweep)])}"]
    if sweep.configurations:
        best = sweep.configurations[0]
        lines.append(f"best: {measured(sweep, best)} | {_settings(best.values)} | {best.trials[0].name}")
    lines += [f"- {visible(problem)}" for problem in sweep.problems]
    return "\n".join([*lines, f"page: {directory.place / PAGE}"])


def _write(sweep: Sweep) -> Path:
    configurations = drawn(sweep)
    curves = learning_curves(sweep)
    shares, reason = importances(sweep)
    sections = {
        "objective": objective_charts(sweep, configurations),
        "front": pareto(sweep, configurations),
        "slices": slices(sweep, configurations),
        "parallel": parallel(sweep, configurations),
        "lineage": lineage(sweep),
    }
    text = template("sweep").render(
        name=sweep.log.name,
        subtitle=_subtitle(sweep),
        figures=_figures(sweep),
        notes=[visible(masked(problem)) for problem in sweep.problems],
        verdict=_verdict(sweep),
        best=[(visible(key), setting_text(value, 100)) for key, value in _best_values(sweep)],
        space=_space(sweep),
        metrics=[visible(metric) for metric, _ in sweep.objectives],
        curves=curves,
        has_front=bool(sweep.results.get("front")),
        omitted=len(sweep.configurations) - len(configurations),
        beyond=sum(chart.beyond for chart in sections["objective"][:1]),
        shares=[(visible(key), share) for key, share in shares],
        no_shares=reason,
        citation=CITATION,
        events=events(sweep),
        keys=[visible(key) for key in sweep.keys],
        rows=[_row(sweep, trial) for trial in _ordered(sweep)],
        stopped=any(trial.state == "stopped" for trial in sweep.trials),
        seeds=any(one.spreads for one in configurations),
        reasons=any(trial.reason for trial in sweep.trials),
        shown_rows=SHOWN_ROWS,
        **sections,
    )
    path = sweep.log.directory.path / PAGE
    write_atomically(path, text)
    return path


def measured(sweep: Sweep, one: Configuration) -> str:
    """The objectives of a configuration as text, with the spread of its seeds."""
    parts = []
    for place, (metric, _) in enumerate(sweep.objectives):
        spread = f" ± {number_text(one.spreads[place])} over {len(one.trials)} seeds" if one.spreads else ""
        parts.append(f"{metric} {number_text(one.means[place])}{spread}")
    return visible(", ".join(parts))


def _subtitle(sweep: Sweep) -> str:
    option = sweep.log.option
    count = len({trial.configuration for trial in sweep.trials})
    search = f"{str(option('tune.search', 'grid')).replace('optuna', 'Optuna')} search"
    scheduler = option("tune.scheduler", "none")
    name = scheduler.get("name") if isinstance(scheduler, dict) else scheduler
    goal = ", ".join(f"{'lowest' if lowest else 'highest'} {metric}" for metric, lowest in sweep.objectives)
    parts = [
        f"Sweep of {masked(option('model.path', '?'))}",
        search if name in (None, "none") else f"{search} with {SCHEDULERS.get(str(name), name)}",
        f"{count:,} configuration{'s' * (count != 1)}"
        + (f", up to {sweep.repeats} seeds each" if sweep.repeats > 1 else ""),
        f"best: {goal}",
    ]
    return visible(" · ".join(parts))


def _states(sweep: Sweep) -> list[str]:
    counts = Counter(trial.state for trial in sweep.trials)
    return [
        f"{counts[state]:,} {visible(state)}"
        for state in (*STATES, *sorted(counts.keys() - set(STATES)))
        if counts[state]
    ]


def _figures(sweep: Sweep) -> list[Figure]:
    """Best results, and numbers of trials by state."""
    figures = []
    if sweep.configurations:
        best = sweep.configurations[0]
        for place, (metric, _) in enumerate(sweep.objectives):
            spread = (
                f"± {number_text(best.spreads[place])} over {len(best.trials)} seeds" if best.spreads else "one seed"
            )
            figures.append(
                Figure(
                    visible(f"{metric} of the same" if place else f"best {metric}"),
                    "",
                    number_text(best.means[place]),
                    spread,
                )
            )
    figures.append(Figure("trials", "", f"{len(sweep.trials):,}", ", ".join(_states(sweep))))
    seconds = sum(trial.seconds or 0 for trial in sweep.trials)
    if seconds:
        figures.append(Figure("trial time in total", "", duration(seconds)))
    return figures


def _verdict(sweep: Sweep) -> str:
    """What the sweep has found out about its best two configurations; empty if it has not."""
    if len(sweep.configurations) < 2:
        return ""
    if len(sweep.objectives) > 1:
        front = sweep.results.get("front")
        if not isinstance(front, list):
            return ""
        stand = "configurations are" if len(front) > 1 else "configuration is"
        return f"{len(front):,} {stand} on the Pareto front; best.yaml has the one with the best {visible(sweep.objectives[0][0])}."
    told_apart = sweep.results.get("told_apart")
    second = f"the second best ({measured(sweep, sweep.configurations[1])})"
    if isinstance(told_apart, bool):
        return f"The best can{'' if told_apart else 'not'} be told apart from {second} (Welch's t-test at 5 %)."
    if sweep.repeats > 1:
        return ""
    return f"With one seed each, the best may be better than {second} by chance alone; tune.repeats would tell."


def _best_values(sweep: Sweep) -> list[tuple[str, Any]]:
    return list(sweep.configurations[0].values.items()) if sweep.configurations else []


def _settings(values: dict[str, Any]) -> str:
    return visible(", ".join(f"{key}={setting_text(value, 100)}" for key, value in values.items()))


def _space(sweep: Sweep) -> list[tuple[str, str]]:
    return [(visible(str(key)), _range(value)) for key, value in sweep.space.items()]


def _range(values: Any) -> str:
    """Values of a key in ``tune.space`` as people write them.

    >>> _range({"loguniform": [1e-5, 0.01]}), _range(["adamw", "lion"])
    ('loguniform 1e-05 to 0.01', 'adamw, lion')
    """
    kind = ""
    if isinstance(values, dict) and len(values) == 1:
        ((kind, values),) = values.items()
    if not isinstance(values, list):
        return setting_text(values, 200)
    texts = [setting_text(value, 100) for value in values]
    if kind in ("", "choice") or len(texts) < 2:
        return visible(shortened(", ".join(texts), 200))
    return f"{kind} {texts[0]} to {texts[1]}" + (f" in steps of {texts[2]}" if len(texts) > 2 else "")


def _ordered(sweep: Sweep) -> list[Trial]:
    """All trials: those with results by their rank, then the others by their number."""
    ranked = [trial for one in sweep.configurations for trial in one.trials]
    names = {trial.name for trial in ranked}
    return [*ranked, *(trial for trial in sweep.trials if trial.name not in names)]


def _row(sweep: Sweep, trial: Trial) -> dict[str, Any]:
    """One trial in the table."""
    results = [finite(trial.metrics.get(metric)) for metric, _ in sweep.objectives]
    run = sweep.place(trial)
    # A name is part of a link, so a record must not lead out of the folder of trials.
    linked = "/" not in trial.name and (run.place / run.page.name).exists()
    return {
        "number": trial.number,
        "name": visible(trial.name),
        "link": f"trials/{trial.name}/{run.page.name}" if linked else "",
        "state": visible(trial.state),
        "values": [setting_text(trial.values[key]) if key in trial.values else "–" for key in sweep.keys],
        "seed": "–" if trial.seed is None else trial.seed,
        "results": ["–" if value is None else number_text(value) for value in results],
        "step": "–" if trial.step is None else f"{trial.step:,}",
        "time": "–" if trial.seconds is None else duration(trial.seconds),
        "reason": visible(masked(shortened(trial.reason, 300))),
    }
