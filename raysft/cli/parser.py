"""The verbs of the command line with their options and help."""

from __future__ import annotations

import argparse
import re
from collections.abc import Sequence
from pathlib import Path

from raysft import __version__
from raysft.cli import verbs
from raysft.config.reference import reference
from raysft.storage.path import StoragePath

EXIT_CODES = "exit codes: 0 done, 1 the run failed, 2 invalid request, 75 stopped early (run it again), 130 interrupted"
RUN_DIR = "run directory: a path or a URI"
JOB = "job name, as printed by raysft submit"
DASHBOARD = "URL of the cluster's Ray dashboard, http://HOST:8265 or https://HOST"
ALLOW_CHANGED = (
    "resume a run that was started with different settings, if those can change (see below); new settings apply from the next "
    "step, new data from the next epoch, and changes.jsonl records them"
)
RAYJOB = (
    "for use in a RayJob, which KubeRay restarts whenever it fails: if a restart would not help (exit code 2, or 75 after a "
    "time limit or raysft stop), stop the job through its cluster's dashboard at this URL"
)
DTYPES = ("float32", "bfloat16", "float16")
PROGRESS = "Progress goes to standard output. Errors are one line on standard error and say how to fix the problem."


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Parse the arguments of a command; ``verb`` is the function to call with them."""
    parser = build_parser()
    parsed, rest = parser.parse_known_args(arguments)
    # argparse does not accept positional arguments after an option: show CONFIG --rows 2 key=value.
    overrides = [argument for argument in rest if "=" in argument and not argument.startswith("-")]
    if overrides != rest or (overrides and "overrides" not in parsed):
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    if overrides:
        parsed.overrides += overrides
    return parsed


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of all verbs and their options."""
    parser = argparse.ArgumentParser(
        prog="raysft",
        description="Fine-tune and continue pre-training language models on Ray clusters, from one YAML file.",
        epilog=f"{PROGRESS}\n{EXIT_CODES}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"raysft {__version__}")
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")
    _add_stages(commands)
    _add_report(commands)
    _add_export(commands)
    _add_cluster_verbs(commands)
    keys = _add_verb(commands, verbs.config, "print all config keys with defaults and documentation")
    keys.add_argument(
        "prefix", nargs="?", default="", metavar="PREFIX", help="a section or key, for example train or model.lora"
    )
    _add_convert(commands)
    return parser


def _add_stages(commands: argparse._SubParsersAction) -> None:
    """Add the verbs that do what a config asks for, in whole or in part."""
    run = _add_config_verb(
        commands, verbs.run, "prepare data, train, evaluate, generate and report; resume where an earlier run stopped"
    )
    _add_config_verb(
        commands,
        verbs.check,
        "validate the config, open model and data, and print the plan and its resources, without training",
    )
    show = _add_config_verb(
        commands, verbs.show, "print packed rows, colored by loss mask and example, and the lengths of all examples"
    )
    show.add_argument(
        "--rows", type=int, default=3, metavar="N", help="number of rows of the training data to show (default 3)"
    )
    show.add_argument("--html", type=_local, metavar="FILE", help="write an HTML page instead")
    _add_config_verb(commands, verbs.prepare, "tokenize the data into the cache")
    train = _add_config_verb(commands, verbs.train, "train and evaluate")
    evaluate = _add_config_verb(
        commands,
        verbs.evaluate,
        "evaluate the trained model, or any other model with evaluate.model=PATH and a separate run.name",
    )
    generate = _add_config_verb(commands, verbs.generate, "generate predictions and score them")
    tune = _add_config_verb(commands, verbs.tune, "run a sweep: try the values in tune.space, each in a complete run")
    for resumable in (run, train):
        resumable.add_argument("--allow-changed", action="store_true", help=ALLOW_CHANGED)
    for submitted in (run, tune, evaluate, generate):
        submitted.add_argument("--rayjob", metavar="URL", help=RAYJOB)


def _add_report(commands: argparse._SubParsersAction) -> None:
    report = _add_verb(
        commands,
        verbs.report,
        "write the report, plots and model card of a run, the page of a sweep, or a page that compares several runs",
    )
    report.add_argument(
        "run_dirs", nargs="+", metavar="RUN_DIR", help=f"{RUN_DIR}; with several, the first is the baseline"
    )
    report.add_argument(
        "--output",
        type=_local,
        metavar="FILE",
        help=f"page to write when comparing several runs (default {verbs.COMPARISON})",
    )


def _add_convert(commands: argparse._SubParsersAction) -> None:
    convert = _add_verb(
        commands,
        verbs.convert,
        "print a LLaMA-Factory config as a raysft config, with comments where meanings differ; all commands also accept "
        "LLaMA-Factory configs directly",
    )
    convert.add_argument("file", metavar="FILE", help="YAML file for llamafactory-cli train (stages sft and pt)")
    convert.add_argument(
        "overrides", nargs="*", metavar="key=value", default=[], help="raysft or LLaMA-Factory keys to set"
    )
    convert.add_argument(
        "--output", type=_local, metavar="NEW_FILE", help="file to write instead of standard output; must not exist"
    )


def _add_export(commands: argparse._SubParsersAction) -> None:
    export = _add_verb(
        commands,
        verbs.export,
        "export a model for transformers and peft, with adapters merged, to a folder or the Hugging Face Hub",
    )
    export.add_argument(
        "source",
        metavar="RUN_DIR|RUN_DIR/checkpoints/STEP|MODEL",
        help="a run directory, for its trained model; one of its checkpoints, for the model after that step; any other model "
        "or adapter: a folder, a URI, a GGUF file or a Hub id; or a YAML file for llamafactory-cli export",
    )
    export.set_defaults(parser=export)
    export.add_argument(
        "--output", type=_local, metavar="DIR", help="folder to write the model into; must be new or empty"
    )
    export.add_argument(
        "--adapters",
        nargs="+",
        metavar="ADAPTER",
        default=[],
        help="adapters to merge into the model, in this order: folders, URIs, Hub ids, runs or their checkpoints",
    )
    export.add_argument(
        "--no-merge",
        action="store_true",
        help="write the adapter unmerged, without its base model; there must be only one",
    )
    export.add_argument(
        "--dtype",
        choices=DTYPES,
        help="data type of the weights; default: that used in training, or the model's own if it was not trained by a run. "
        "Adapters are merged in float32 and rounded once",
    )
    export.add_argument(
        "--shard-size",
        type=_size,
        metavar="SIZE",
        help="maximum size of a weight file, for example 2GB; default: 5GB, but a model that needs no changes keeps its files",
    )
    export.add_argument(
        "--trust-remote-code",
        action="store_true",
        help="allow code that comes with the model or an adapter to run when adapters are merged; read the code first",
    )
    export.add_argument(
        "--push",
        metavar="ORG/NAME",
        help="upload the model with its card, in one commit, to this Hub repository, which is created if it does not exist; "
        "needs HF_TOKEN or hf auth login",
    )
    export.add_argument("--private", action="store_true", help="make the repository that --push creates private")


def _local(text: str) -> Path:
    """Read the path of a file or folder on this machine, as a config has it.

    >>> _local("file:///data/my%20model"), _local("~/model") == Path.home() / "model"
    (PosixPath('/data/my model'), True)
    """
    if not text:
        raise argparse.ArgumentTypeError("is empty; give a path")
    if "://" in text and not text.startswith("file://"):
        raise argparse.ArgumentTypeError(
            f"{StoragePath.of(text)} is not on this machine; use a local path, and copy the result there afterwards"
        )
    return Path(StoragePath.of(text).location) if text.startswith(("file://", "~")) else Path(text)


def _size(text: str) -> str:
    """Check a size as transformers and the hub write it: a number and KB, MB, GB or TB.

    >>> _size("5GB"), _size("1.5 mb")
    ('5GB', '1.5MB')
    """
    found = re.fullmatch(r"(\d+(?:\.\d+)?) *([KMGT]B)", text.strip().upper())
    if not found or not float(found[1]):
        raise argparse.ArgumentTypeError(f"{text!r} is not a size; use a number with KB, MB, GB or TB, for example 5GB")
    return found[1] + found[2]


def _add_cluster_verbs(commands: argparse._SubParsersAction) -> None:
    submit = _add_config_verb(
        commands, verbs.submit, "run a config as a job on a cluster; running the same command again attaches to the job"
    )
    submit.add_argument(
        "--to",
        required=True,
        metavar="WHERE",
        help=f"{DASHBOARD}; or {verbs.KUBERNETES}, which uses KubeRay and kubectl",
    )
    submit.add_argument(
        "--render",
        metavar="FILE",
        help=f"with --to {verbs.KUBERNETES}: only write the manifests (-: to standard output)",
    )
    submit.add_argument(
        "--follow",
        action=argparse.BooleanOptionalAction,
        help="stream the job's output until it ends, and exit with its exit code (default in a terminal); Ctrl-C leaves the "
        "job running, pressing it twice stops the job",
    )
    submit.add_argument("--allow-changed", action="store_true", help=ALLOW_CHANGED)
    follow = _add_verb(commands, verbs.follow, "stream a job's output until it ends, and exit with its exit code")
    follow.add_argument("job", metavar="JOB", help=JOB)
    follow.add_argument("--to", required=True, metavar="URL", help=DASHBOARD)
    status = _add_verb(commands, verbs.status, "show the progress of a job or run, and what to do next")
    status.add_argument("job_or_run_dir", metavar="JOB_OR_RUN_DIR", help=f"{JOB}; or {RUN_DIR}")
    status.add_argument("--to", metavar="URL", help=f"{DASHBOARD}; for jobs only")
    stop = _add_verb(
        commands, verbs.stop, "stop a job or run after it has saved a checkpoint, and wait until it has ended"
    )
    stop.add_argument("job_or_run_dir", metavar="JOB_OR_RUN_DIR", help=f"{JOB}; or {RUN_DIR}")
    stop.add_argument("--to", metavar="URL", help=f"{DASHBOARD}; for jobs only")


def _add_verb(
    commands: argparse._SubParsersAction, verb: verbs.Verb, summary: str, keys: str = ""
) -> argparse.ArgumentParser:
    parser = commands.add_parser(
        verb.__name__,
        help=summary,
        description=f"{summary[0].upper()}{summary[1:]}.",
        epilog=f"{PROGRESS}\n{EXIT_CODES}\n\n{keys}".rstrip(),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.set_defaults(verb=verb)
    return parser


def _add_config_verb(commands: argparse._SubParsersAction, verb: verbs.Verb, summary: str) -> argparse.ArgumentParser:
    parser = _add_verb(commands, verb, summary, f"config keys\n\n{reference(sections=verbs.SECTIONS_OF[verb])}")
    parser.add_argument("config", metavar="CONFIG", help="raysft or LLaMA-Factory YAML file")
    parser.add_argument(
        "overrides", nargs="*", metavar="key=value", default=[], help="config keys to set, such as train.epochs=2"
    )
    return parser
