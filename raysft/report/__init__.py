"""A run directory becomes metrics, plots, a model card, a page, and the summary that a run ends with."""

from __future__ import annotations

from raysft.report.card import model_card
from raysft.report.page import write_page
from raysft.report.plots import draw
from raysft.report.read_run import read_run
from raysft.report.summary import summary
from raysft.report.trainer_state import trainer_state
from raysft.report.warnings import warnings
from raysft.storage.json_files import write_atomically, write_json
from raysft.storage.run_directory import RunDirectory

__all__ = ["report"]


def report(run: RunDirectory) -> str:
    """Write ``trainer_state.json``, the plots, the model card and ``report.html`` from what a run left in its directory.

    Where only predictions of another model are, there is no model that a card would be of.

    It needs nothing but the directory, and may be repeated at any time, also while the run goes on.

    Returns:
        The summary for the terminal: before and after, samples, and which file holds what. Coloured if stdout is a
        terminal, plain text of at most 100 columns otherwise.

    Raises:
        RequestError: ``run.path`` is no run directory.
        RunFailed: a file of the run is corrupt; the message names it and the line.
    """
    log = read_run(run)
    if log.steps or log.evaluations:
        write_json(run.trainer_state, trainer_state(log))
    plots = draw(log)
    if not log.other_model:
        write_atomically(run.model_card, model_card(log, plots))
    lines = warnings(log)
    write_page(log, lines)
    return summary(log, lines)
