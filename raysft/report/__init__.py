"""Reports: plots, a model card, an HTML page and a summary, made from the files of a run."""

from __future__ import annotations

from raysft.storage.json_files import write_atomically, write_json
from raysft.storage.run_directory import RunDirectory


def report(run: RunDirectory) -> str:
    """Write ``trainer_state.json``, the plots, the model card and ``report.html`` into a run directory.

    It reads nothing but the directory, and may be repeated at any time, also while the run is in progress. A run that only
    generates with another model gets no model card. The run directory of a sweep gets ``sweep.html`` alone.

    Returns:
        The summary for the terminal: results before and after training, warnings, samples and files. It is colored if
        stdout is a terminal, and plain text of at most 100 columns otherwise.

    Raises:
        RequestError: ``run.path`` is not a run directory, or one of its files is corrupt; the message names it and the line.
    """
    # Here, since commands that only read a run directory import its reader from this package, and not matplotlib.
    from raysft.report.card import model_card
    from raysft.report.page import write_page
    from raysft.report.plots import draw
    from raysft.report.read_run import read_run
    from raysft.report.summary import summary
    from raysft.report.sweep_page import report_sweep
    from raysft.report.trainer_state import trainer_state
    from raysft.report.warnings import warnings

    if run.trials.exists():
        return report_sweep(run)
    log = read_run(run)
    if log.steps or log.evaluations:
        write_json(run.trainer_state, trainer_state(log))
    plots = draw(log)
    if not log.other_model:
        write_atomically(run.model_card, model_card(log, plots))
    lines = warnings(log)
    write_page(log, lines)
    return summary(log, lines)
