"""The command: light to start, complete in its help, and clear about what was wrong."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from raysft import __version__
from raysft.cli import main
from raysft.config import documented_fields
from raysft.errors import RequestError, RunFailed
from raysft.run import pipeline

HEAVY = ("torch", "ray", "deepspeed", "transformers", "peft", "datasets", "pyarrow")
WITH_CONFIG = ("run", "check", "show", "prepare", "train", "evaluate", "generate", "tune")
WITH_DIRECTORY = ("report", "export")
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
from raysft.cli import main
for arguments in (["--help"], ["run", "--help"], ["--version"], ["run", "none.yaml"]):
    try:
        main(arguments)
    except SystemExit:
        pass
    print("heavy:", arguments, [name for name in {HEAVY} if name in sys.modules])
"""
    lines = [line for line in python(code, tmp_path).stdout.splitlines() if line.startswith("heavy:")]
    assert [line.rpartition("[")[2] for line in lines] == ["]"] * 4


def test_the_flows_are_found_on_the_package_though_it_loads_them_late():
    import raysft

    assert raysft.run_sft is pipeline.run_sft
    assert raysft.run_pt is pipeline.run_pt
    with pytest.raises(AttributeError, match="module 'raysft' has no attribute 'run_sf'"):
        raysft.run_sf  # noqa: B018


@pytest.mark.parametrize("arguments", [["run", "c.yaml", "train.epoch=2"], ["check", "c.yaml", "train.epoch=2"]])
def test_a_wrong_config_is_one_line_and_exit_code_2(tmp_path, arguments):
    (tmp_path / "c.yaml").write_text(CONFIG)
    outcome = python(f"import sys; from raysft.cli import main; sys.exit(main({arguments}))", tmp_path)
    assert outcome.returncode == 2
    assert outcome.stderr == "raysft: error: command line: unknown key train.epoch; did you mean train.epochs?\n"
    assert outcome.stdout == ""
    assert [path.name for path in tmp_path.iterdir()] == ["c.yaml"]


@pytest.mark.parametrize("verb", WITH_CONFIG)
def test_every_verb_refuses_a_missing_config(tmp_path, monkeypatch, capsys, verb):
    monkeypatch.chdir(tmp_path)
    assert main([verb, "none.yaml"]) == 2
    assert capsys.readouterr().err == (
        "raysft: error: none.yaml: there is no such config file; give the path of a YAML file\n"
    )


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
        (KeyboardInterrupt(), 130, "raysft: stopped; the same command goes on from the newest checkpoint\n"),
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
    monkeypatch.setattr(pipeline, "show", lambda config, rows, page: seen.append((config.train.epochs, rows)))
    assert main(arguments) == 0
    assert seen == [(2, 2)]


def test_show_wants_a_row_at_least(config, capsys):
    assert main(["show", config, "--rows", "0"]) == 2
    assert capsys.readouterr().err == "raysft: error: --rows 0: show at least one row\n"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "raysft: error: the following arguments are required: VERB"),
        (["rnu", "c.yaml"], "raysft: error: argument VERB: invalid choice: 'rnu' (choose from "),
        (["run", "c.yaml", "--fast"], "raysft: error: unrecognized arguments: --fast"),
        (["report", "runs/a", "train.epochs=2"], "raysft: error: unrecognized arguments: train.epochs=2"),
        (["export", "runs/a"], "raysft export: error: the following arguments are required: --output"),
    ],
)
def test_a_wrong_command_line_is_exit_code_2(capsys, arguments, message):
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    assert caught.value.code == 2
    assert capsys.readouterr().err.splitlines()[-1].startswith(message)


def test_help_names_every_verb_and_the_exit_codes(capsys):
    text = helped(capsys)
    listed = [line.split()[0] for line in text.splitlines() if line.startswith("    ") and line.split()]
    assert set(WITH_CONFIG + WITH_DIRECTORY) <= set(listed)
    assert "exit codes: 0 done, 1 the run failed, 2 the request was wrong" in text


@pytest.mark.parametrize("verb", WITH_CONFIG)
def test_help_of_a_verb_names_every_key_with_its_default_and_docstring(capsys, verb):
    text = helped(capsys, verb)
    words = "".join(text.split())  # lines break at hyphens too
    for key, default, docstring in documented_fields():
        assert f"\n  {key}  [{default}]" in text
        assert "".join(docstring.split()) in words


@pytest.mark.parametrize("verb", WITH_DIRECTORY)
def test_help_of_a_verb_on_a_run_directory_says_what_it_takes(capsys, verb):
    assert "RUN_DIR" in helped(capsys, verb)


def test_the_version_is_that_of_the_package(capsys):
    with pytest.raises(SystemExit):
        main(["--version"])
    assert capsys.readouterr().out == f"raysft {__version__}\n"


def test_help_says_of_each_key_whether_it_may_change_in_a_run_that_has_begun(capsys):
    lines = helped(capsys, "train").splitlines()
    for start in (
        "  generate.top_p  [0.7]",
        "  train.epochs  [1]  (--allow-changed: at once)",
        "  model.lora.rank  [8]  (fixed)",
    ):
        assert start in lines
