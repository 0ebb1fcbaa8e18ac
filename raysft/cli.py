"""The command ``raysft``: parse the arguments, then call. Verbs import heavy libraries only when they run."""

from __future__ import annotations

import argparse
import contextlib
import errno
import io
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from raysft import __version__
from raysft.config import Config, load, masked
from raysft.config.reference import SECTIONS, reference
from raysft.config.section import known_scheme
from raysft.errors import RequestError, RunFailed, StorageFailed
from raysft.storage.path import StoragePath
from raysft.storage.run_directory import RunDirectory
from raysft.storage.sync import open_read_only

TRAINING = ("stage", "run", "model", "data", "train", "scaling")
EXIT_CODES = "exit codes: 0 done, 1 the run failed, 2 the request was wrong, 130 interrupted"
FAULTS_OF_PATHS = {errno.EACCES, errno.EPERM, errno.EROFS, errno.EISDIR, errno.ENOTDIR, errno.ENAMETOOLONG, errno.ELOOP}
"""Errors of the operating system that the user can correct; a file that raysft itself misses is a bug."""
RUN_DIR = "run directory: a path or a URI"
COMPARISON = "comparison.html"
PROGRESS = "Progress goes to standard output. An error is one line on standard error that names the remedy."


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a verb and return the exit code: 0 done, 1 the run failed, 2 the request was wrong, 130 interrupted."""
    if sys.stdout is None:  # closed by who called (>&-)
        sys.stdout = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # a terminal without × or … must not end a run
    parsed = _parse(arguments)
    try:
        parsed.verb(parsed)
    except RequestError as error:
        print(f"raysft: error: {masked(str(error))}", file=sys.stderr)
        return 2
    except (RunFailed, StorageFailed) as error:
        print(f"raysft: failed: {masked(str(error))}", file=sys.stderr)
        return 1
    except BrokenPipeError:
        return 0
    except OSError as error:
        print(f"raysft: failed: {_describe(error)}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        resumed = " to resume from the newest checkpoint" if parsed.verb in (_run, _train, _tune) else ""
        print(f"raysft: interrupted; run the same command again{resumed}", file=sys.stderr)
        return 130
    return 0


def _describe(error: OSError) -> str:
    """Describe an error of the operating system in one line; raise it again if the user cannot do anything about it."""
    where = f"{error.filename}: " if error.filename else ""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return f"{where}{error.strerror}; free some space, then run the same command again to resume"
    if where and error.errno in FAULTS_OF_PATHS:
        return f"{where}{error.strerror}; correct the path or its permissions, then run the same command again"
    raise error


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = _parser()
    parsed, rest = parser.parse_known_args(arguments)
    # argparse does not accept positional arguments after an option: show CONFIG --rows 2 key=value.
    overrides = [argument for argument in rest if "=" in argument and not argument.startswith("-")]
    if overrides != rest or (overrides and "overrides" not in parsed):
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    if overrides:
        parsed.overrides += overrides
    return parsed


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="raysft",
        description="Fine-tune and continue pre-training language models on Ray clusters, from one YAML file.",
        epilog=f"{PROGRESS}\n{EXIT_CODES}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"raysft {__version__}")
    verbs = parser.add_subparsers(title="verbs", required=True, metavar="VERB")
    run = _add_config_verb(
        verbs, _run, "prepare data, train, evaluate, generate and report; resume where an earlier run stopped"
    )
    _add_config_verb(
        verbs,
        _check,
        "validate the config, open model and data, and print the plan and its resources, without training",
    )
    show = _add_config_verb(
        verbs, _show, "print packed rows, colored by loss mask and example, and the lengths of all examples"
    )
    _add_config_verb(verbs, _prepare, "tokenize the data into the cache")
    train = _add_config_verb(verbs, _train, "train and evaluate")
    _add_config_verb(verbs, _evaluate, "evaluate the trained model")
    _add_config_verb(verbs, _generate, "generate predictions and score them")
    _add_config_verb(verbs, _tune, "sweep: try the values of tune.space, each in a whole run")
    report = _add_verb(
        verbs,
        _report,
        "write the report, plots and model card of a run directory, the page of a sweep, or a page that compares several runs",
    )
    report.add_argument(
        "run_dirs", nargs="+", metavar="RUN_DIR", help=f"{RUN_DIR}; of several, the first is compared with"
    )
    report.add_argument(
        "--output", type=Path, metavar="FILE", help=f"page that compares several runs (default {COMPARISON})"
    )
    export = _add_verb(verbs, _export, "write one Hugging Face model, with adapters merged")
    export.add_argument("run_dir", metavar="RUN_DIR", help=RUN_DIR)
    keys = _add_verb(verbs, _config, "print all config keys with defaults and documentation")
    for resumable in (run, train):
        resumable.add_argument(
            "--allow-changed",
            action="store_true",
            help="resume a run that started with other settings, if they can change (see below); the new settings apply from the "
            "next step, other data from the next epoch, and changes.jsonl records them",
        )
    show.add_argument(
        "--rows", type=int, default=3, metavar="N", help="number of rows of the training data to show (default 3)"
    )
    show.add_argument("--html", type=Path, metavar="FILE", help="write an HTML page instead")
    export.add_argument(
        "--output", type=Path, required=True, metavar="DIR", help="folder for the model; must be new or empty"
    )
    keys.add_argument(
        "prefix", nargs="?", default="", metavar="PREFIX", help="a section or key, for example train or model.lora"
    )
    return parser


def _add_verb(
    verbs: argparse._SubParsersAction, verb: Callable[[argparse.Namespace], None], summary: str, keys: str = ""
) -> argparse.ArgumentParser:
    parser = verbs.add_parser(
        verb.__name__[1:],
        help=summary,
        description=f"{summary[0].upper()}{summary[1:]}.",
        epilog=f"{PROGRESS}\n{EXIT_CODES}\n\n{keys}".rstrip(),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.set_defaults(verb=verb)
    return parser


def _add_config_verb(
    verbs: argparse._SubParsersAction, verb: Callable[[argparse.Namespace], None], summary: str
) -> argparse.ArgumentParser:
    parser = _add_verb(verbs, verb, summary, f"config keys\n\n{reference(sections=VERB_SECTIONS[verb])}")
    parser.add_argument("config", metavar="CONFIG", help="YAML file")
    parser.add_argument(
        "overrides", nargs="*", metavar="key=value", default=[], help="config keys to set, such as train.epochs=2"
    )
    return parser


def _load(parsed: argparse.Namespace) -> Config:
    return load(parsed.config, parsed.overrides)


def _load_for_workers(parsed: argparse.Namespace) -> Config:
    """Load a config, and let the libraries of the workers be imported while this process imports its own."""
    config = _load(parsed)
    from raysft.cluster.connect import prepare_workers

    prepare_workers(config)
    return config


def _run(parsed: argparse.Namespace) -> None:
    config = _load_for_workers(parsed)
    from raysft.run.pipeline import run

    run(config, allow_changed=parsed.allow_changed)


def _check(parsed: argparse.Namespace) -> None:
    config = _load(parsed)
    from raysft.run.verbs import check

    check(config)


def _show(parsed: argparse.Namespace) -> None:
    config = _load(parsed)
    if parsed.rows < 1:
        raise RequestError(f"--rows {parsed.rows}: must be at least 1; use a positive number")
    from raysft.run.verbs import show

    show(config, parsed.rows, parsed.html)


def _prepare(parsed: argparse.Namespace) -> None:
    config = _load(parsed)
    from raysft.run.verbs import prepare_data

    prepare_data(config)


def _train(parsed: argparse.Namespace) -> None:
    config = _load_for_workers(parsed)
    from raysft.run.verbs import train

    train(config, allow_changed=parsed.allow_changed)


def _evaluate(parsed: argparse.Namespace) -> None:
    config = _load_for_workers(parsed)
    from raysft.run.verbs import evaluate

    evaluate(config)


def _generate(parsed: argparse.Namespace) -> None:
    config = _load_for_workers(parsed)
    from raysft.run.verbs import generate

    generate(config)


def _tune(parsed: argparse.Namespace) -> None:
    config = _load_for_workers(parsed)
    from raysft.tune import tune

    tune(config)


def _report(parsed: argparse.Namespace) -> None:
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
        from raysft.report import report

        print(report(_opened(stack, run_dir, back=True)))


def _opened(stack: contextlib.ExitStack, run_dir: str, back: bool = False) -> RunDirectory:
    directory = stack.enter_context(open_read_only(_run_path(run_dir), print, back))
    return directory if directory.remote else RunDirectory(Path(run_dir))


def _compare(runs: list[RunDirectory], output: Path) -> None:
    if output.is_dir():
        raise RequestError(f"--output {output}: a folder; name a file, for example {output / COMPARISON}")
    from raysft.generate.metrics.paired import paired_intervals
    from raysft.report.runs_page import compare_runs

    print(compare_runs(runs, output, paired_intervals, print))


def _export(parsed: argparse.Namespace) -> None:
    from raysft.run.verbs import export

    export(_run_path(parsed.run_dir), parsed.output)


def _config(parsed: argparse.Namespace) -> None:
    print(reference(parsed.prefix))


VERB_SECTIONS: dict[Callable[[argparse.Namespace], None], tuple[str, ...]] = {
    _run: (*TRAINING, "generate"),
    _check: (*TRAINING, "generate"),
    _show: ("stage", "run", "model", "data", "scaling"),
    _prepare: ("stage", "run", "model", "data", "scaling"),
    _train: TRAINING,
    _evaluate: TRAINING,
    _generate: ("stage", "run", "model", "data", "scaling", "generate"),
    _tune: SECTIONS,
}
"""Sections of the config that each verb uses, for its help."""


def _run_path(run_dir: str) -> StoragePath:
    try:
        return StoragePath.of(known_scheme(run_dir))
    except ValueError as error:
        raise RequestError(f"{run_dir}: {error}") from None


if __name__ == "__main__":
    sys.exit(main())
