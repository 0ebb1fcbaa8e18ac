"""Which code a process has imported, and what is said of it when other code is on disk by then."""

import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from raysft.cluster import forkserver
from raysft.train import imported_code

THEN = "torch-2.0.0.dist-info"


@pytest.fixture
def disk(tmp_path, monkeypatch) -> Path:
    """A raysft of two files, and a folder with an installed package, which is all of ``sys.path``."""
    (tmp_path / "raysft" / "train").mkdir(parents=True)
    (tmp_path / "raysft" / "loss.py").write_text("a = 1\n")
    shutil.copy(imported_code.__file__, tmp_path / "raysft" / "train" / "imported_code.py")
    (tmp_path / "site" / THEN).mkdir(parents=True)
    monkeypatch.setattr(sys, "path", [str(tmp_path / "site"), str(tmp_path / "none")])
    return tmp_path


def imported(disk: Path):
    """Import the module from there, as a new process would."""
    spec = importlib.util.spec_from_file_location("imported_now", disk / "raysft" / "train" / "imported_code.py")
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def edit(disk: Path) -> None:
    times = (disk / "raysft" / "loss.py").stat()
    (disk / "raysft" / "loss.py").write_text("a = 2\n")
    os.utime(disk / "raysft" / "loss.py", ns=(times.st_atime_ns, times.st_mtime_ns))  # as some copy programs do


def add(disk: Path) -> None:
    (disk / "raysft" / "train" / "new.py").write_text("")


def install(disk: Path) -> None:
    (disk / "site" / THEN).rename(disk / "site" / "torch-2.0.1.dist-info")


@pytest.mark.parametrize("change", [edit, add, install])
def test_code_that_is_changed_after_the_import_is_not_what_runs(disk, change):
    module = imported(disk)
    before = module.imported_code()
    assert before.packages == [THEN]
    assert module.imported_code() == before
    change(disk)
    assert module.imported_code() is None
    after = imported(disk).imported_code()  # a process that starts now
    assert after is not None
    assert after != before


def test_packages_in_a_folder_that_a_job_adds_belong_to_it(disk, monkeypatch):
    module = imported(disk)
    (disk / "job" / "more-1.dist-info").mkdir(parents=True)
    monkeypatch.setattr(sys, "path", [*sys.path, str(disk / "job")])
    assert module.imported_code().packages == ["more-1.dist-info", THEN]


def test_a_folder_that_cannot_be_read_does_not_end_the_import(disk, monkeypatch):
    def denied(folder):
        raise PermissionError(folder)

    with monkeypatch.context() as patch:
        patch.setattr(os, "listdir", denied)
        module = imported(disk)
    assert module.imported_code() is None


def test_workers_know_the_code_before_they_import_any_library():
    first = forkserver.LIBRARIES[0]
    assert first == imported_code.__name__
    code = f"import sys, {first}; print({{'torch', 'transformers', 'deepspeed', 'numpy', 'ray'}} & set(sys.modules))"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert run.stdout == "set()\n"
