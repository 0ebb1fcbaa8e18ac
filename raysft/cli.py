"""The command ``raysft``: parse, then call. What is heavy is imported inside each verb."""

from __future__ import annotations

import argparse
import errno
import sys
import textwrap
from collections.abc import Callable, Sequence
from pathlib import Path

from raysft import __version__
from raysft.config import Config, documented_fields, load, masked
from raysft.config.resume_effects import Effect, effect_of
from raysft.config.section import known_scheme
from raysft.errors import RequestError, RunFailed, StorageFailed
from raysft.storage.path import StoragePath
from raysft.storage.run_directory import RunDirectory
from raysft.storage.sync import open_read_only


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a verb; the exit code is 0 when it is done, 1 when the run failed, 2 when the request was wrong."""
    parsed = _parse(arguments)
    try:
        parsed.verb(parsed)
    except (RequestError, FileNotFoundError) as error:
        print(f"raysft: error: {masked(str(error))}", file=sys.stderr)
        return 2
    except (RunFailed, StorageFailed) as error:
        print(f"raysft: failed: {masked(str(error))}", file=sys.stderr)
        return 1
    except BrokenPipeError:
        return 0
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        where = f"{error.filename}: " if error.filename else ""
        print(f"raysft: failed: {where}{error.strerror}; free some, and the same command goes on", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("raysft: stopped; the same command goes on from the newest checkpoint", file=sys.stderr)
        return 130
    return 0


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = _parser()
    parsed, rest = parser.parse_known_args(arguments)
    # argparse takes no positional arguments behind an option: show CONFIG --rows 2 key=value.
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
        epilog="exit codes: 0 done, 1 the run failed, 2 the request was wrong",
    )
    parser.add_argument("--version", action="version", version=f"raysft {__version__}")
    verbs = parser.add_subparsers(title="verbs", required=True, metavar="VERB")
    for verb, summary in (
        (_run, "data → train → evaluate → generate → report"),
        (_check, "resolve, validate and plan; no training; exit 2 and one clear line if it cannot run"),
        (_show, "packed rows coloured by loss mask and by example, and the lengths of all examples"),
        (_prepare, "tokenize the data into the cache"),
        (_train, "train and evaluate"),
        (_evaluate, "evaluate the trained model"),
        (_generate, "generate predictions and score them"),
        (_tune, "a sweep: whole runs over the combinations of tune.space"),
    ):
        _with_config(verbs, verb, summary)
    _with_directory(verbs, _report, "plots, model card and summary of a run directory")
    export = _with_directory(verbs, _export, "one Hugging Face model, adapters merged")
    export.add_argument(
        "--output", type=Path, required=True, metavar="DIR", help="folder for the model; must be new or empty"
    )
    return parser


def _with_config(verbs: argparse._SubParsersAction, verb: Callable[[argparse.Namespace], None], summary: str) -> None:
    parser = verbs.add_parser(
        verb.__name__[1:],
        help=summary,
        description=f"{summary[0].upper()}{summary[1:]}.",
        epilog=_config_help(),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("config", metavar="CONFIG", help="YAML file")
    parser.add_argument(
        "overrides", nargs="*", metavar="key=value", help="config keys to set, for example train.epochs=2"
    )
    if verb is _show:
        parser.add_argument(
            "--rows", type=int, default=3, metavar="N", help="how many rows of the training data (default 3)"
        )
        parser.add_argument("--html", type=Path, metavar="FILE", help="write a page for a browser instead")
    if verb in (_run, _train):
        parser.add_argument(
            "--allow-changed",
            action="store_true",
            help="go on with a run that was begun with other settings, where that is possible (see the config keys below): what "
            "changed takes effect at the next step, other data in the next epoch; it is recorded in changes.jsonl",
        )
    parser.set_defaults(verb=verb)


def _with_directory(
    verbs: argparse._SubParsersAction, verb: Callable[[argparse.Namespace], None], summary: str
) -> argparse.ArgumentParser:
    parser = verbs.add_parser(verb.__name__[1:], help=summary, description=f"{summary[0].upper()}{summary[1:]}.")
    parser.add_argument("run_dir", metavar="RUN_DIR", help="run directory: a path or a URI")
    parser.set_defaults(verb=verb)
    return parser


def _config_help() -> str:
    """All config keys with defaults and docstrings."""
    lines = [
        "config keys; in a run that has begun those marked (fixed) cannot change, those marked (--allow-changed) take effect at",
        "the next step or in the next epoch, and all others may change at any time:",
    ]
    notes = {
        Effect.NEVER: "  (fixed)",
        Effect.NOW: "  (--allow-changed: at once)",
        Effect.EPOCH: "  (--allow-changed: from the next epoch)",
        Effect.ALWAYS: "",
    }
    for key, default, docstring in documented_fields():
        lines.append(f"  {key}  [{default}]{notes[effect_of(key)]}")
        lines.extend(textwrap.wrap(docstring, 110, initial_indent="      ", subsequent_indent="      "))
    return "\n".join(lines)


def _load(parsed: argparse.Namespace) -> Config:
    return load(parsed.config, parsed.overrides)


def _run(parsed: argparse.Namespace) -> None:
    config = _load(parsed)
    from raysft.run.pipeline import run

    run(config, allow_changed=parsed.allow_changed)


def _check(parsed: argparse.Namespace) -> None:
    config = _load(parsed)
    from raysft.run.pipeline import check

    check(config)


def _show(parsed: argparse.Namespace) -> None:
    config = _load(parsed)
    if parsed.rows < 1:
        raise RequestError(f"--rows {parsed.rows}: show at least one row")
    from raysft.run.pipeline import show

    show(config, parsed.rows, parsed.html)


def _prepare(parsed: argparse.Namespace) -> None:
    config = _load(parsed)
    from raysft.run.pipeline import prepare_data

    prepare_data(config)


def _train(parsed: argparse.Namespace) -> None:
    config = _load(parsed)
    from raysft.run.pipeline import train

    train(config, allow_changed=parsed.allow_changed)


def _evaluate(parsed: argparse.Namespace) -> None:
    config = _load(parsed)
    from raysft.run.pipeline import evaluate

    evaluate(config)


def _generate(parsed: argparse.Namespace) -> None:
    config = _load(parsed)
    from raysft.run.pipeline import generate

    generate(config)


def _tune(parsed: argparse.Namespace) -> None:
    config = _load(parsed)
    from raysft.tune import tune

    tune(config)


def _report(parsed: argparse.Namespace) -> None:
    from raysft.report import report

    with open_read_only(_place(parsed.run_dir), print, back=True) as directory:
        print(report(directory if directory.remote else RunDirectory(Path(parsed.run_dir))))


def _export(parsed: argparse.Namespace) -> None:
    from raysft.run.pipeline import export

    export(_place(parsed.run_dir), parsed.output)


def _place(run_dir: str) -> StoragePath:
    try:
        return StoragePath.of(known_scheme(run_dir))
    except ValueError as error:
        raise RequestError(f"{run_dir}: {error}") from None


if __name__ == "__main__":
    sys.exit(main())
