"""The verbs of the command line other than ``run`` and ``tune``."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from raysft.cluster.connect import cluster
from raysft.config import Config
from raysft.errors import RequestError
from raysft.run.context import open_run
from raysft.run.evaluate import evaluate as evaluate_other
from raysft.run.inputs import read_inputs
from raysft.run.ownership import ensure_writable
from raysft.run.pipeline import evaluate_model, generate_predictions, print_report, train_model
from raysft.run.plan import Plan
from raysft.run.predict import predict, prediction_lines
from raysft.run.preflight import preflight
from raysft.telemetry.terminal import Terminal


def check(config: Config) -> Plan | None:
    """Print what the verb that a config asks for would do. Model and data are opened and checked; only the cache is written to.

    Returns:
        The plan of a training; None for an evaluation or predictions without one.

    Raises:
        RequestError: it could not run.
    """
    with preflight(config, "check") as ready:
        verb, plan = "", None
        if ready.evaluation:
            lines, verb = ready.evaluation.lines(config), "evaluate"
        elif ready.prompts:
            lines, verb = prediction_lines(config, ready.prompts, ready.nodes), "generate"
        else:
            plan = ready.runs[0].plan
            lines = plan.lines()
    for line in lines:
        ready.terminal.line(line)
    ready.terminal.line(f"run directory: {config.run_place}" + (f", for raysft {verb}" if verb else ""))
    return plan


def show(config: Config, rows: int, page: Path | None = None) -> None:
    """Print the first packed rows of the training data and the lengths of its examples, or write them as an HTML page."""
    from raysft.data.preview import LengthSummary, decode_rows, print_rows, write_page

    ensure_writable(config)
    with cluster(config, deferred=True):
        _, model, _, prepared = read_inputs(config, Terminal().line)
    shown = list(decode_rows(prepared.train_rows, model, rows, config.model.runs_code))
    lengths = LengthSummary.of(prepared.train_rows, prepared.train)
    if page is None:
        print_rows(shown, lengths)
        return
    try:
        write_page(shown, lengths, page)
    except OSError as error:
        raise RequestError(f"--html {page}: cannot be written ({error.strerror}); choose another file") from None
    Terminal().line(f"written: {page}")


def prepare_data(config: Config) -> None:
    """Tokenize the data into the cache, and plan."""
    with open_run(config, "prepare") as context:
        for manifest in (*context.prepared.train, *context.prepared.eval):
            context.terminal.line(f"{'reused' if manifest.reused else 'written'}: {manifest.directory}")


def train(config: Config, callbacks: Sequence[Any] = (), allow_changed: bool = False) -> None:
    """Train and evaluate."""
    with open_run(config, "train", allow_changed) as context:
        train_model(context, callbacks)


def evaluate(config: Config) -> None:
    """Evaluate the trained model, or ``evaluate.model``, in a separate job."""
    if config.evaluate.model is not None:
        print_report(evaluate_other(config))
        return
    with open_run(config, "evaluate") as context:
        evaluate_model(context)


def generate(config: Config) -> None:
    """Generate predictions and score them, with the trained model or with ``generate.model``."""
    if config.generate.model is not None:
        print_report(predict(config))
        return
    with open_run(config, "generate") as context:
        generate_predictions(context)
        print_report(context.directory)
