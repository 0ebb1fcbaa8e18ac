"""What each verb of the command line does: load the config, then call. Heavy libraries are imported only when a verb runs."""

from __future__ import annotations

import argparse
import contextlib
import sys
from collections.abc import Callable
from pathlib import Path

from raysft.config import Config, convert_file, export_arguments, load
from raysft.config.reference import SECTIONS, reference
from raysft.config.section import known_scheme
from raysft.config.verb import verb_of
from raysft.errors import RequestError
from raysft.storage.path import StoragePath
from raysft.storage.run_directory import RunDirectory
from raysft.storage.sync import open_read_only

Verb = Callable[[argparse.Namespace], int | None]
"""Does what a command asks for; returns the exit code, None for 0."""
TRAINING = ("stage", "run", "model", "data", "train", "scaling")
KUBERNETES = "kubernetes"
"""Where ``raysft submit`` sends a config in place of the URL of a dashboard."""
COMPARISON = "comparison.html"
"""Default page of ``raysft report`` for several runs."""


def _load(parsed: argparse.Namespace) -> Config:
    return load(parsed.config, parsed.overrides)


def _load_for_workers(parsed: argparse.Namespace) -> Config:
    """Load a config, and let the libraries of the workers be imported while this process imports its own."""
    config = _load(parsed)
    from raysft.cluster.connect import prepare_workers

    prepare_workers(config)
    return config


def run(parsed: argparse.Namespace) -> None:
    config = _load_for_workers(parsed)
    from raysft.run import pipeline

    pipeline.run(config, allow_changed=parsed.allow_changed)


def check(parsed: argparse.Namespace) -> None:
    config = _load(parsed)
    from raysft.run import verbs

    verbs.check(config)


def show(parsed: argparse.Namespace) -> None:
    config = _load(parsed)
    if parsed.rows < 1:
        raise RequestError(f"--rows {parsed.rows}: must be at least 1; use a positive number")
    from raysft.run import verbs

    verbs.show(config, parsed.rows, parsed.html)


def prepare(parsed: argparse.Namespace) -> None:
    config = _load(parsed)
    from raysft.run import verbs

    verbs.prepare_data(config)


def train(parsed: argparse.Namespace) -> None:
    config = _load_for_workers(parsed)
    from raysft.run import verbs

    verbs.train(config, allow_changed=parsed.allow_changed)


def evaluate(parsed: argparse.Namespace) -> None:
    config = _load_for_workers(parsed)
    from raysft.run import verbs

    verbs.evaluate(config)


def generate(parsed: argparse.Namespace) -> None:
    config = _load_for_workers(parsed)
    from raysft.run import verbs

    verbs.generate(config)


def tune(parsed: argparse.Namespace) -> None:
    config = _load_for_workers(parsed)
    from raysft.tune import sweep

    sweep.tune(config)


def report(parsed: argparse.Namespace) -> None:
    with contextlib.ExitStack() as stack:
        if len(parsed.run_dirs) > 1:
            runs = [_opened(stack, run_dir) for run_dir in parsed.run_dirs]
            _compare(runs, parsed.output or Path(COMPARISON))
            return
        run_dir = parsed.run_dirs[0]
        if parsed.output:
            raise RequestError(
                f"--output {parsed.output}: the report of one run is written into {run_dir}; name a second run, or remove --output"
            )
        from raysft import report as reports

        print(reports.report(_opened(stack, run_dir, back=True)))


def _opened(stack: contextlib.ExitStack, run_dir: str, back: bool = False) -> RunDirectory:
    directory = stack.enter_context(open_read_only(_run_path(run_dir), print, back))
    return directory if directory.remote else RunDirectory(Path(run_dir))


def _compare(runs: list[RunDirectory], output: Path) -> None:
    if output.is_dir():
        raise RequestError(f"--output {output}: a folder; name a file, for example {output / COMPARISON}")
    from raysft.generate.metrics.paired import paired_intervals
    from raysft.report.runs_page import compare_runs

    print(compare_runs(runs, output, paired_intervals, print))


def export(parsed: argparse.Namespace) -> None:
    if parsed.source.endswith((".yaml", ".yml")) and not Path(parsed.source).is_dir():
        parsed = _from_file(parsed)
    if parsed.output is None and parsed.push is None:
        raise RequestError(
            "export needs --output or --push to know where to write; add --output DIR, --push ORG/NAME, or both"
        )
    if parsed.private and parsed.push is None:
        raise RequestError(
            "--private applies to the Hub repository that --push creates, but --push is missing; add --push ORG/NAME, or "
            "remove it"
        )
    if parsed.shard_size is not None and parsed.no_merge:
        raise RequestError(
            "--shard-size applies to whole models, but --no-merge writes an adapter, which is a single file; remove one of "
            "them"
        )
    from raysft.run.export import Form, Push, export

    push = Push(parsed.push, parsed.private) if parsed.push is not None else None
    form = Form(parsed.dtype, parsed.shard_size, tuple(parsed.adapters), not parsed.no_merge, parsed.trust_remote_code)
    export(parsed.source, parsed.output, push, form)


def _from_file(parsed: argparse.Namespace) -> argparse.Namespace:
    """Return what a file for ``llamafactory-cli export`` asks for; options of the command have precedence."""
    asked = parsed.parser.parse_args(export_arguments(parsed.source))
    for name, value in vars(parsed).items():
        if name != "source" and value != parsed.parser.get_default(name):
            setattr(asked, name, value)
    return asked


def config(parsed: argparse.Namespace) -> None:
    print(reference(parsed.prefix))


def convert(parsed: argparse.Namespace) -> None:
    text, refusal = convert_file(parsed.file, parsed.overrides)
    if parsed.output is None:
        _write_utf8(text)
    else:
        _write_file(parsed.output, text, "--output", mode="x")
    if refusal is not None:
        raise refusal


def submit(parsed: argparse.Namespace) -> int:
    config = _load(parsed)
    following = sys.stdout.isatty() if parsed.follow is None else parsed.follow
    if parsed.to == KUBERNETES:
        return _submit_to_kubernetes(parsed, config, following)
    if parsed.render is not None:
        raise RequestError(
            f"--render {parsed.render}: writes Kubernetes manifests; use --to {KUBERNETES}, or remove it"
        )
    from raysft.submit import submission

    folder = Path(parsed.config).absolute().parent
    return submission.submit(config, parsed.to, folder, following, parsed.allow_changed, _say)


def _submit_to_kubernetes(parsed: argparse.Namespace, config: Config, following: bool) -> int:
    if parsed.follow and parsed.render is not None:
        raise RequestError(
            f"--render {parsed.render}: only writes manifests, so there is no job to --follow; remove one of them"
        )
    if parsed.allow_changed:
        raise RequestError(
            f"--allow-changed: --to {KUBERNETES} does not support this option; remove it, or use another run.name"
        )
    from raysft.run.verb_checks import check_verb
    from raysft.submit import kubernetes

    check_verb(config, verb_of(config))
    if parsed.render is None:
        _check_pods(config)
        name = kubernetes.submit(config, _say)
        if following:
            return _follow_on_kubernetes(config, name)
        _say(f"check on it: {kubernetes.kubectl_command(config, f'get rayjob {name}')}")
    elif parsed.render == "-":
        _write_utf8(kubernetes.render(config))
    else:
        _write_file(parsed.render, kubernetes.render(config), "--render")
    return 0


def _follow_on_kubernetes(config: Config, name: str) -> int:
    from raysft.submit import kubernetes
    from raysft.submit.follow_run import go_on_from_files
    from raysft.submit.following import Lost
    from raysft.submit.kubernetes.kubectl import namespace_option
    from raysft.submit.shown_log import ShownLog, show

    log = ShownLog(show)
    try:
        return kubernetes.follow_to_end(name, namespace_option(config.cluster.namespace), _say, log)
    except Lost as lost:
        return go_on_from_files(config.run_place, lost, log.tail, _say)


def _check_pods(config: Config) -> None:
    """Refuse a training or an evaluation that its pods cannot hold."""
    from raysft.run.pods import check_evaluation_pods, check_pods
    from raysft.submit import kubernetes
    from raysft.submit.kubernetes.sizes import nodes_of, worker_pods

    kubernetes.render(config)  # refuses what no pods could do
    check = {"run": check_pods, "evaluate": check_evaluation_pods}.get(verb_of(config))
    if check:
        check(config, nodes_of(config, worker_pods(config).fewest), _say)


def follow(parsed: argparse.Namespace) -> int:
    from raysft.submit import submission

    return submission.follow_job(parsed.to, parsed.job, _say)


def status(parsed: argparse.Namespace) -> None:
    if parsed.to is not None:
        from raysft.submit import submission

        submission.job_status(parsed.to, parsed.job_or_run_dir, _say)
        return
    place = _existing_run(parsed.job_or_run_dir)
    from raysft.submit.run_status import print_run_status

    print_run_status(place, _say)


def stop(parsed: argparse.Namespace) -> None:
    if parsed.to is not None:
        from raysft.submit import submission

        submission.stop_job(parsed.to, parsed.job_or_run_dir, _say)
        return
    place = _existing_run(parsed.job_or_run_dir)
    from raysft.submit.stop_run import stop_run

    stop_run(place, _say)


def _existing_run(run_dir: str) -> StoragePath:
    place = _run_path(run_dir)
    if place.local and not place.local.is_dir():
        raise RequestError(
            f"{run_dir}: no such run directory; correct the path, or for a job, add --to http://HOST:8265 with its cluster's "
            "address"
        )
    return place


def _write_utf8(text: str) -> None:
    """Write text for other programs, regardless of the terminal's encoding."""
    sys.stdout.flush()
    sys.stdout.buffer.write(text.encode())
    sys.stdout.buffer.flush()


def _write_file(file: str, text: str, option: str, mode: str = "w") -> None:
    try:
        with open(file, mode, encoding="utf-8") as opened:
            opened.write(text)
    except OSError as error:
        raise RequestError(f"{option} {file}: cannot be written ({error.strerror}); choose another file") from None


def _say(line: str) -> None:
    print(line, flush=True)


SECTIONS_OF: dict[Verb, tuple[str, ...]] = {
    run: (*TRAINING, "generate"),
    check: (*TRAINING, "generate"),
    show: ("stage", "run", "model", "data", "scaling"),
    prepare: ("stage", "run", "model", "data", "scaling"),
    train: TRAINING,
    evaluate: (*TRAINING, "evaluate"),
    generate: ("stage", "run", "model", "data", "scaling", "generate"),
    tune: (*TRAINING, "generate", "tune"),
    submit: SECTIONS,
}
"""Sections of the config that each verb uses, for its help."""


def _run_path(run_dir: str) -> StoragePath:
    try:
        return StoragePath.of(known_scheme(run_dir))
    except ValueError as error:
        raise RequestError(f"{run_dir}: {error}") from None
