"""The command: light to start, complete in its help, and clear about what was wrong."""

from __future__ import annotations

import errno
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path
from types import ModuleType

import pytest

import raysft as raysft_package
from raysft import __version__
from raysft.__main__ import program
from raysft.cli import main
from raysft.config import Config, documented_fields, load
from raysft.config.reference import SECTIONS
from raysft.errors import RequestError, RunFailed, RunStopped
from raysft.run import pipeline, verbs
from tests.messages import holds

HEAVY = ("torch", "ray", "deepspeed", "transformers", "peft", "datasets", "pyarrow", "matplotlib")
WITH_CONFIG = ("run", "check", "show", "prepare", "train", "evaluate", "generate", "tune")
WITH_DIRECTORY = ("report", "export")
WITH_CLUSTER = ("submit", "follow", "status", "stop")
CONFIG = "model: {path: m}\ndata:\n  train: [{name: a, path: a.json}]\n"


@pytest.fixture
def config(tmp_path, monkeypatch) -> str:
    monkeypatch.chdir(tmp_path)
    Path("c.yaml").write_text(CONFIG)
    return "c.yaml"


def python(code: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=cwd, timeout=60, check=False
    )


def helped(capsys, *arguments: str) -> str:
    with pytest.raises(SystemExit) as caught:
        main([*arguments, "--help"])
    assert caught.value.code == 0
    return capsys.readouterr().out


def test_the_package_and_its_help_load_nothing_heavy(tmp_path):
    code = f"""
import sys
import raysft
raysft.Callback, raysft.Config, raysft.RequestError, raysft.RunFailed, raysft.load_config
from raysft.cli import main
for arguments in (["--help"], ["run", "--help"], ["--version"], ["run", "none.yaml"], ["config"], ["config", "tran"],
                  ["submit", "--help"], ["submit", "none.yaml", "--to", "http://x"], ["status", "none"],
                  ["status", "."], ["stop", "."]):
    try:
        main(arguments)
    except SystemExit:
        pass
    print("heavy:", arguments, [name for name in {HEAVY} if name in sys.modules])
"""
    lines = [line for line in python(code, tmp_path).stdout.splitlines() if line.startswith("heavy:")]
    assert [line.rpartition("[")[2] for line in lines] == ["]"] * 11


def test_the_public_names_are_found_on_the_package_though_it_loads_them_late():
    import raysft

    assert set(raysft.__all__) <= set(dir(raysft))
    assert all(getattr(raysft, name) for name in raysft.__all__)
    assert raysft.load_config is load
    assert raysft.Config is Config

    assert raysft.run_sft is pipeline.run_sft
    assert raysft.run_pt is pipeline.run_pt
    with pytest.raises(AttributeError, match="module 'raysft' has no attribute 'run_sf'"):
        raysft.run_sf  # noqa: B018


def test_the_package_brings_its_licence_its_types_and_every_file_that_is_not_python():
    root = Path(raysft_package.__file__).parent
    project = tomllib.loads((root.parent / "pyproject.toml").read_text())
    patterns = project["tool"]["setuptools"]["package-data"]["raysft"]
    packed = {path for pattern in patterns for path in root.glob(pattern)}
    files = {path for path in root.rglob("*") if path.is_file() and path.suffix not in (".py", ".pyc", ".md")}
    assert root / "py.typed" in packed
    assert packed == files
    for name in project["project"]["license-files"]:
        assert "Apache License" in (root.parent / name).read_text()


@pytest.mark.parametrize("arguments", [["run", "c.yaml", "train.epoch=2"], ["check", "c.yaml", "train.epoch=2"]])
def test_a_wrong_config_is_one_line_and_exit_code_2(tmp_path, arguments):
    (tmp_path / "c.yaml").write_text(CONFIG)
    outcome = python(f"import sys; from raysft.cli import main; sys.exit(main({arguments}))", tmp_path)
    assert outcome.returncode == 2
    assert outcome.stderr == "raysft: error: command line: unknown key train.epoch; did you mean train.epochs?\n"
    assert outcome.stdout == ""
    assert [path.name for path in tmp_path.iterdir()] == ["c.yaml"]


PROGRAM = """
import atexit
import raysft.cli
from raysft.__main__ import program

class Kept:
    def __del__(self):
        print("freed")

def main():
    atexit.register(print, "handled")
    print("done")
    return 3

kept = Kept()
raysft.cli.main = main
program()
"""


def test_ctrl_c_while_the_program_is_imported_shows_no_stack_trace(monkeypatch):
    class Interrupted(ModuleType):
        def __getattr__(self, name: str) -> None:
            raise KeyboardInterrupt

    monkeypatch.setitem(sys.modules, "raysft.cli", Interrupted("raysft.cli"))
    monkeypatch.setattr("atexit.register", lambda *_: None)
    with pytest.raises(SystemExit) as ended:
        program()
    assert ended.value.code == 130


def test_the_program_ends_with_the_commands_exit_code_and_all_exit_handlers_and_frees_nothing(tmp_path):
    outcome = python(PROGRAM, tmp_path)
    assert (outcome.returncode, outcome.stdout, outcome.stderr) == (3, "done\nhandled\n", "")
    # What is a bug ends as it does in every program.
    outcome = python(PROGRAM.replace("return 3", "raise KeyError(3)"), tmp_path)
    assert (outcome.returncode, outcome.stdout) == (1, "done\nhandled\nfreed\n")
    assert outcome.stderr.endswith("KeyError: 3\n")


@pytest.mark.parametrize("verb", WITH_CONFIG)
def test_every_verb_refuses_a_missing_config(tmp_path, monkeypatch, capsys, verb):
    monkeypatch.chdir(tmp_path)
    assert main([verb, "none.yaml"]) == 2
    assert holds(capsys.readouterr().err.rstrip("\n"), "raysft: error: none.yaml: … not found … path of a YAML file")


@pytest.mark.parametrize("verb", WITH_DIRECTORY)
def test_every_verb_refuses_a_missing_run_directory(tmp_path, capsys, verb):
    options = ["--output", str(tmp_path / "out")] if verb == "export" else []
    assert main([verb, str(tmp_path / "none"), *options]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"raysft: error: {tmp_path}/none: ")
    assert error.count("\n") == 1


@pytest.mark.parametrize(
    ("raised", "code", "line"),
    [
        (RequestError("wrong"), 2, "raysft: error: wrong\n"),
        (RunFailed("broke"), 1, "raysft: failed: broke\n"),
        (RunStopped("stopped: SIGTERM"), 75, "raysft: stopped: SIGTERM; run the same command again to resume\n"),
        (
            KeyboardInterrupt(),
            130,
            "raysft: interrupted; run the same command again to resume from the newest checkpoint\n",
        ),
        (
            OSError(errno.ENOSPC, "No space left on device", "/x"),
            1,
            "raysft: failed: /x: No space left on device; free some space, then run the same command again to resume\n",
        ),
        (
            OSError(errno.EROFS, "Read-only file system", "/x"),
            1,
            "raysft: failed: /x: Read-only file system; correct the path or its permissions, then run the same command again\n",
        ),
        (None, 0, ""),
    ],
)
def test_exit_codes_tell_a_wrong_request_from_a_failed_run(config, monkeypatch, capsys, raised, code, line):
    def outcome(config, **options):
        if raised:
            raise raised

    monkeypatch.setattr(pipeline, "run", outcome)
    assert main(["run", config]) == code
    assert capsys.readouterr().err == line


def test_only_a_verb_that_trains_resumes_after_an_interruption(config, monkeypatch, capsys):
    def interrupted(config):
        raise KeyboardInterrupt

    monkeypatch.setattr(verbs, "check", interrupted)
    assert main(["check", config]) == 130
    assert capsys.readouterr().err == "raysft: interrupted; run the same command again\n"


def test_a_folder_in_place_of_a_file_is_named_in_one_line(tmp_path, capsys):
    (tmp_path / "config.yaml").write_text(CONFIG)
    (tmp_path / "plan.json").mkdir()
    assert main(["report", str(tmp_path)]) == 1
    assert holds(capsys.readouterr().err.rstrip("\n"), f"raysft: failed: {tmp_path}/plan.json: Is a directory; … path")


def test_a_run_whose_config_cannot_be_read_is_named_in_one_line(tmp_path, capsys):
    (tmp_path / "config.yaml").write_text("run: {name: 2024-99-99}\n")
    assert main(["report", str(tmp_path)]) == 2
    error = capsys.readouterr().err.rstrip("\n")
    assert holds(error, f"raysft: error: {tmp_path}/config.yaml:1: not a YAML mapping; restore the config")


def test_names_too_long_for_a_folder_are_refused(config, capsys):
    assert main(["check", config, f"run.name={'a' * 151}"]) == 2
    assert holds(capsys.readouterr().err.rstrip("\n"), "raysft: error: command line: run.name='aaa … 150 characters")
    assert main(["report", "a" * 300]) == 2
    assert holds(
        capsys.readouterr().err.rstrip("\n"), "raysft: error: aaa … at most 255, but this one has 300; shorten it"
    )


def test_a_terminal_that_lacks_characters_gets_question_marks(tmp_path):
    code = "from raysft.cli import main; main(['config', 'train.neftune_alpha'])"
    environment = {**os.environ, "PYTHONIOENCODING": "ascii"}
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=True)
    assert "NEFTune: add uniform noise of ? alpha" in shown.stdout


def test_a_command_whose_output_is_closed_runs_all_the_same():
    code = "from raysft.cli import *; from raysft.telemetry.terminal import *; main(['config']); Terminal().line('x')"
    command = f'"{sys.executable}" -c "{code}" >&-'
    ran = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=False)
    assert (ran.returncode, ran.stderr) == (0, "")


def test_an_export_that_fails_leaves_no_half_model(tmp_path, monkeypatch, capsys):
    def full(folder, output, *form):
        (output / "config.json").write_text("")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("raysft.models.merging.merge", full)
    (tmp_path / "config.yaml").write_text(CONFIG)
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").touch()
    for _ in range(2):
        assert main(["export", str(tmp_path), "--output", str(tmp_path / "out")]) == 1
        assert "free some space, then run the same command again" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_file_that_raysft_itself_misses_is_a_bug_with_its_traceback(config, tmp_path):
    code = f"""
import sys
import raysft.run.pipeline as pipeline
from raysft.cli import main
def run(config, **options):
    open("missing.bin")
pipeline.run = run
sys.exit(main(["run", "{config}"]))
"""
    outcome = python(code, tmp_path)
    assert outcome.returncode == 1
    assert "Traceback" in outcome.stderr
    assert "in run\n" in outcome.stderr
    assert outcome.stderr.splitlines()[-1] == "FileNotFoundError: [Errno 2] No such file or directory: 'missing.bin'"


@pytest.mark.parametrize(
    "arguments",
    [
        ["show", "c.yaml", "train.epochs=2", "--rows", "2"],
        ["show", "c.yaml", "--rows", "2", "train.epochs=2"],
        ["show", "--rows", "2", "c.yaml", "train.epochs=2"],
    ],
)
def test_overrides_may_stand_before_and_after_options(config, monkeypatch, arguments):
    seen = []
    monkeypatch.setattr(verbs, "show", lambda config, rows, page: seen.append((config.train.epochs, rows)))
    assert main(arguments) == 0
    assert seen == [(2, 2)]


def test_show_needs_at_least_one_row(config, capsys):
    assert main(["show", config, "--rows", "0"]) == 2
    assert holds(capsys.readouterr().err.rstrip("\n"), "raysft: error: --rows 0: … at least 1")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "raysft: error: the following arguments are required: COMMAND"),
        (["check"], "raysft check: error: the following arguments are required: CONFIG\n"),
        (["rnu", "c.yaml"], "raysft: error: argument COMMAND: invalid choice: 'rnu' (choose from "),
        (["run", "c.yaml", "--fast"], "raysft: error: unrecognized arguments: --fast"),
        (["export", "a", "train.epochs=2", "--output", "b"], "raysft: error: unrecognized arguments: train.epochs=2"),
        (["submit", "c.yaml"], "raysft submit: error: the following arguments are required: --to"),
        (["follow", "j"], "raysft follow: error: the following arguments are required: --to"),
    ],
)
def test_a_wrong_command_line_is_exit_code_2(capsys, arguments, message):
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    assert caught.value.code == 2
    assert capsys.readouterr().err.splitlines(keepends=True)[-1].startswith(message)


def test_help_names_every_verb_and_the_exit_codes(capsys):
    text = helped(capsys)
    listed = [line.split()[0] for line in text.splitlines() if line.startswith("    ") and line.split()]
    assert {*WITH_CONFIG, *WITH_DIRECTORY, *WITH_CLUSTER, "config", "convert"} <= set(listed)
    assert (
        "exit codes: 0 done, 1 the run failed, 2 invalid request, 75 stopped early (run it again), 130 interrupted"
        in text
    )


def keys(text: str) -> list[str]:
    return re.findall(r"^  ([a-z][\w.\[\]]+)  \[", text, re.MULTILINE)


@pytest.mark.parametrize(
    ("verb", "missing"),
    [
        ("run", {"evaluate", "tune", "cluster"}),
        ("check", {"evaluate", "tune", "cluster"}),
        ("show", {"evaluate", "train", "generate", "tune", "cluster"}),
        ("prepare", {"evaluate", "train", "generate", "tune", "cluster"}),
        ("train", {"evaluate", "generate", "tune", "cluster"}),
        ("evaluate", {"generate", "tune", "cluster"}),
        ("generate", {"evaluate", "train", "tune", "cluster"}),
        ("tune", {"evaluate", "cluster"}),
        ("submit", set()),
    ],
)
def test_help_of_a_verb_shows_the_keys_of_the_sections_that_it_uses(capsys, verb, missing):
    used = [key for key, _, _ in documented_fields() if key.partition(".")[0] not in missing]
    assert keys(helped(capsys, verb)) == used


def test_the_reference_has_every_key_with_its_default_and_docstring_by_section(capsys):
    assert main(["config"]) == 0
    text = capsys.readouterr().out
    words = "".join(text.split())  # lines break at hyphens too
    assert keys(text) == [key for key, _, _ in documented_fields()]
    for key, default, docstring in documented_fields():
        assert f"\n  {key}  [{default}]" in text
        assert "".join(docstring.replace("``", "`").split()) in words
    assert [line.partition(":")[0] for line in text.splitlines() if re.match(r"[a-z]+: ", line)] == list(SECTIONS[1:])


@pytest.mark.parametrize(
    ("prefix", "first", "last"),
    [
        ("train", "train.epochs", "train.tracking.group"),
        ("model.lora", "model.lora.rank", "model.lora.loraplus_ratio"),
        ("data.train.0", "data.train[].name", "data.train[].max_examples"),
        ("data.eval[].path", "data.train[].path", "data.train[].path"),
        ("stage", "stage", "stage"),
        ("train.loss", "train.loss", "train.loss"),
    ],
)
def test_the_reference_of_a_section_or_key_shows_only_that(capsys, prefix, first, last):
    assert main(["config", prefix]) == 0
    shown = keys(capsys.readouterr().out)
    assert (shown[0], shown[-1]) == (first, last)


@pytest.mark.parametrize(
    ("prefix", "suggestion"),
    [
        ("train.lora", "did you mean model.lora?"),
        ("trian", "did you mean train?"),
        ("trian.epochs", "did you mean train.epochs?"),
        ("data.train.0.pth", "did you mean data.train.0.path?"),
        ("train.rows_per_step", "it is now called train.global_batch_size"),
        ("xyz.q", "known keys: stage, run, model, data, train, scaling, evaluate, generate, tune, cluster"),
    ],
)
def test_a_reference_of_an_unknown_key_suggests_a_known_one(capsys, prefix, suggestion):
    assert main(["config", prefix]) == 2
    assert capsys.readouterr().err == f"raysft: error: unknown key {prefix}; {suggestion}\n"


@pytest.mark.parametrize("verb", WITH_DIRECTORY)
def test_help_of_a_verb_on_a_run_directory_says_what_it_takes(capsys, verb):
    assert "RUN_DIR" in helped(capsys, verb)


def test_the_version_is_that_of_the_package(capsys):
    with pytest.raises(SystemExit):
        main(["--version"])
    assert capsys.readouterr().out == f"raysft {__version__}\n"


def test_help_says_of_each_key_whether_it_can_change_when_a_run_resumes(capsys):
    lines = helped(capsys, "run").splitlines()
    for start in (
        "  generate.top_p  [0.7]",
        "  train.epochs  [1]  (next step)",
        "  data.mask_history  [false]  (next epoch)",
        "  model.lora.rank  [8]  (fixed)",
        "  (next step)   can change with --allow-changed, from the next step on",
    ):
        assert start in lines
