"""The story of a run on one page: data → train → evaluate → generate → report."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

from raysft.config import Config, load, parse
from raysft.data.shards.prompts import write_prompts
from raysft.errors import RequestError, RunFailed, StorageFailed
from raysft.run.context import RunContext, open_run
from raysft.run.tracking import run_trackers
from raysft.stopping import current
from raysft.storage.retry import retry_for
from raysft.storage.run_directory import GENERATION, RunDirectory, is_complete
from raysft.telemetry.events import Event, GenerationDone, GenerationNotice, TrainingEnded
from raysft.telemetry.ray_metrics import RayMetrics
from raysft.telemetry.train_log import TrainLog, evaluation_line


def run_sft(config: Config | Mapping[str, Any] | str | Path, callbacks: Sequence[Any] | None = None) -> dict[str, Any]:
    """Fine-tune on conversations, from data to report.

    Args:
        config: a config, a mapping in its form, or the path of a YAML file; ``stage`` must be sft.
        callbacks: called in this process with the events of the training; ``raysft.Callback`` documents the methods.

    Returns:
        All results, as in ``all_results.json``.

    Raises:
        RequestError: the request cannot be carried out.
        RunFailed: the run failed.
        RunStopped: it was asked to stop, by Ctrl-C or otherwise, and saved its work; call this again to continue.
    """
    return run(_read_config(config, "sft"), callbacks or ())


def run_pt(config: Config | Mapping[str, Any] | str | Path, callbacks: Sequence[Any] | None = None) -> dict[str, Any]:
    """Continue pre-training on raw text, from data to report; arguments and results are those of ``run_sft``."""
    return run(_read_config(config, "pt"), callbacks or ())


def _read_config(config: Config | Mapping[str, Any] | str | Path, stage: str) -> Config:
    if isinstance(config, str | Path):
        config = load(config)
    elif not isinstance(config, Config):
        config = parse(dict(config))
    if config.stage != stage:
        raise RequestError(
            f"run_{stage} needs stage={stage}, but stage={config.stage}; use run_{config.stage}, or set stage: {stage}"
        )
    return config


def run(
    config: Config,
    callbacks: Sequence[Any] = (),
    allow_changed: bool = False,
    decisions: Any = None,
) -> dict[str, Any]:
    """Train, evaluate, generate and report; stages that are done are skipped.

    Args:
        config: the request.
        callbacks: as ``run_sft`` takes them.
        allow_changed: resume a run that began with other settings, model or data; the change is recorded.
        decisions: the queue of a scheduler, as ``launch.train`` takes it.

    Raises:
        RunStopped: the run was asked to stop before it finished, and saved its work.
    """
    with open_run(config, "run", allow_changed) as context:
        train_model(context, callbacks, decisions)
        current().check("the training is done")
        generate_predictions(context)
        print_report(context.directory)
    return context.directory.read_results("all")


def train_model(context: RunContext, callbacks: Sequence[Any] = (), decisions: Any = None) -> None:
    """Train and evaluate; results go to ``train_results.json`` and ``eval_results.json``."""
    from raysft.train.checkpoint.catalog import remove_temporary

    if context.directory.is_done():
        context.terminal.line(
            f"train: {context.directory.place} is already trained (another run.name starts a new run)"
        )
    else:
        _train(context, callbacks, decisions)
    with suppress(StorageFailed), retry_for(0):
        remove_temporary(context.directory.checkpoints)
    _complete_generations(context)


def _complete_generations(context: RunContext) -> None:
    """Complete predictions of the training that were interrupted after its last step."""
    directory = context.directory
    steps = [int(name) for name in (directory.place / GENERATION).entries() if name.isdigit()]
    left = sorted(step for step in steps if is_complete(directory.step_model(step)))
    if not left or not _write_prompts(context):
        return
    from raysft.run.step_generation import predict_step

    with run_trackers(context) as trackers:
        log = TrainLog(directory.trainer_log, context.terminal, trackers)
        log.reopen()
        for step in left:
            try:
                scores = predict_step(context.config, directory, step)
            except RunFailed as error:
                log(GenerationNotice(step, f"{error}; the run continues without them"))
            else:
                log(GenerationDone(_record(context, step) | scores))
                context.push()
            directory.step_model(step).remove()


def _train(context: RunContext, callbacks: Sequence[Any], decisions: Any) -> None:
    from raysft.train import launch

    with run_trackers(context) as trackers, RayMetrics(context.config.run.name) as metrics:
        directory = context.directory
        train_log = TrainLog(
            directory.trainer_log, context.terminal, [*trackers, *callbacks], stacks=str(directory.stacks)
        )

        def handle(event: Event) -> None:
            metrics(event)
            train_log(event)
            if isinstance(event, TrainingEnded):
                _write_results(context, train_log, event)
            if isinstance(event, GenerationDone):
                # Until the scores are logged and stored, an interrupted run can generate again with this model.
                context.push()
                directory.step_model(event.record["current_steps"]).remove()

        try:
            launch.train(train_job(context), handle, decisions, step_generator(context))
        finally:
            context.terminal.close()


def _write_results(context: RunContext, train_log: TrainLog, end: TrainingEnded) -> None:
    """Write the results of a training that has ended.

    The last predictions may take hours more: a run killed in the meantime must not train again.
    """
    trained, row_plan = end.train, context.prepared.train_rows.row_plan
    if context.config.train.keep_best and "best_step" not in trained:
        metric = context.config.train.best_metric
        context.terminal.line(
            f"train.keep_best: {metric} was never a finite number, so the model of the last step was saved"
        )
    if end.eval:
        context.directory.write_results("eval", {**end.eval, "epoch": trained["epoch"]})
    efficiency = {"packing_efficiency": round(row_plan.packing_efficiency, 6)}
    speed = train_log.results(row_plan.examples_after(int(trained["total_steps"])))
    context.directory.write_results("train", {**trained, **speed, **efficiency, **train_log.timings})


def train_job(context: RunContext) -> Any:
    """Return the ``TrainJob`` that the workers get."""
    from raysft.train.job import TrainJob

    return TrainJob(
        config=context.config,
        model=context.files.model,
        run=context.directory,
        adapter=context.files.adapter,
        reference=context.files.reference.model if context.files.reference else None,
        train_rows=context.prepared.train_rows,
        eval_rows=context.prepared.eval_rows,
        identity=context.identity,
        ends=context.prepared.end_tokens if context.config.stage == "sft" else (),
        evaluations=context.config.cache_directory / "evaluations",
        generation_pauses=context.generation is None or context.generation.pauses,
    )


def step_generator(context: RunContext) -> Any:
    """Return what generates during the training; None if nothing does."""
    plan = context.generation
    if plan is None or not _write_prompts(context):
        return None
    from raysft.run.step_generation import StepGenerator

    return StepGenerator(context.config, context.directory, plan, partial(_record, context))


def _record(context: RunContext, step: int) -> dict[str, Any]:
    """Say where the training stands after a step, as records of the log do."""
    from raysft.train.checkpoint.cursor import Cursor
    from raysft.train.step_metrics import evaluation_record

    row_plan = context.prepared.train_rows.row_plan
    return evaluation_record(row_plan, Cursor(step, row_plan.consumed(step), 0, {}), {})


def _write_prompts(context: RunContext) -> bool:
    """Write the prompts of the evaluation sets; says so and returns False if there are none."""
    config, prepared = context.config, context.prepared
    if write_prompts(prepared.prompts, context.directory.prompts, config.generate.max_examples, prepared.end_tokens):
        return True
    context.terminal.line("generate: skipped, because no example has a prompt (pre-tokenized records have none)")
    return False


def evaluate_model(context: RunContext) -> None:
    """Evaluate the trained model on all evaluation sets; results go to ``eval_results.json``."""
    from raysft.train import launch
    from raysft.train.job import EvaluationJob

    config, model = context.config, context.directory.model.location
    job = EvaluationJob(config, context.directory, model, context.prepared.eval_rows, config.model.runs_code)
    results = launch.evaluate(job, lambda event: None)
    context.directory.write_results("eval", results["eval"])
    context.terminal.line(evaluation_line(results["eval"]))


def generate_predictions(context: RunContext) -> None:
    """Generate with the model before training and with the trained one, and score both."""
    config, directory, prepared = context.config, context.directory, context.prepared
    if not prepared.prompts:
        return
    from raysft.generate.batch_inference import Output, generate
    from raysft.generate.metrics import write_metrics

    if not _write_prompts(context):
        return
    outputs = []
    if config.generate.compare_base:
        model = context.files.adapter or context.files.model
        outputs.append(Output(model, directory.base_predictions, "base", "the model before training"))
    else:
        directory.base_predictions.unlink(missing_ok=True)  # an earlier call may have made them with other settings
    earlier = sorted((directory.path / GENERATION).glob(f"*/{directory.predictions.name}"))
    outputs.append(Output(directory.model.location, directory.predictions, "trained", "the trained model", earlier))
    write_metrics(directory, generate(config, directory.prompts, outputs, notify=context.terminal.line))


def print_report(directory: RunDirectory) -> None:
    """Write plots, model card and page, and print the summary."""
    from raysft.report import report

    print(report(directory))
