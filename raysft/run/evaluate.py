"""Evaluation of any model or adapter (``evaluate.model``): a run directory of results, without training."""

from __future__ import annotations

from raysft.config import Config
from raysft.run.other_model import begin, record
from raysft.run.preflight import preflight
from raysft.stopping import current
from raysft.storage.run_directory import RunDirectory
from raysft.telemetry.train_log import evaluation_line


def evaluate(config: Config) -> RunDirectory:
    """Evaluate ``evaluate.model`` on all evaluation sets; results go to ``eval_results.json``.

    Results of an earlier call stay until there are new ones.

    Returns:
        The run directory, which holds them.

    Raises:
        RequestError: the model, the data or the cluster cannot do it, or the run directory belongs to a training
            or has results of another model or of other settings.
        RunFailed: a worker failed.
        RunStopped: it was asked to stop.
    """
    from raysft.train import launch
    from raysft.train.job import EvaluationJob

    with preflight(config, "evaluate") as ready:
        current().check()
        assert ready.evaluation is not None
        planned, directory, terminal = ready.evaluation, ready.directory, ready.terminal
        what = directory, config, "evaluate", planned.as_dict(), planned.inputs.manifests
        begin(*what)
        for line in planned.lines(config):
            terminal.line(line)
        model = planned.inputs.model
        job = EvaluationJob(config, directory, model.location, planned.inputs.rows, model.runs_code)
        results = launch.evaluate(job, lambda event: None)["eval"]
        # Inside the block, so that the results reach an object store with the other files.
        record(*what)
        directory.write_results("eval", results)
        terminal.line(evaluation_line(results))
    return directory
