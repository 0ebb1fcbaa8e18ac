"""Private names of tracker libraries, and the names that they refuse, as raysft knows them before it starts."""

from __future__ import annotations

import inspect

import pytest

from raysft.config.conflicts_tracking import MLFLOW_TAG, PROJECTS, RESERVED
from tests.contracts.contract import Contract

TRACKIO = Contract("trackio", "raysft/telemetry/trackio_internals.py")

NAMES = ("a", "a b", "a.b_c-d+e", "a/b", "a:b", "a%b", "答", "x" * 100, "x" * 101, "x" * 129)


def accepts(check, *given: str) -> bool:
    try:
        check(*given)
    except Exception:
        return False
    return True


@pytest.mark.parametrize("name", NAMES)
def test_projects_of_wandb_and_swanlab_are_refused_by_their_libraries(name):
    import wandb

    assert accepts(lambda project: wandb.Settings(project=project), name) == bool(PROJECTS["wandb"][0].fullmatch(name))
    swanlab = pytest.importorskip("swanlab")
    given = swanlab.Settings.Project
    assert accepts(lambda project: given(name=project), name) == bool(PROJECTS["swanlab"][0].fullmatch(name))


@pytest.mark.parametrize("key", ["a", "a b", "a/b.c:d-e_f", "a=b", "a,b", "a?b", "x" * 251])
def test_keys_of_tags_are_refused_by_mlflow(key):
    from mlflow.utils import validation

    assert accepts(validation._validate_tag, key, "1") == bool(MLFLOW_TAG.fullmatch(key))


@pytest.mark.parametrize(
    "name", ["a", "registry-a", "a_system", "my_artifacts", "my_artifact_versions", "_system", "runs"]
)
def test_projects_of_trackio_are_refused_by_it(name):
    pytest.importorskip("trackio")
    from trackio.sqlite_storage import SQLiteStorage

    assert accepts(SQLiteStorage.validate_project_name, name) != bool(RESERVED.fullmatch(name))
    known = {f"_{table}" for table in ("system", "configs", "traces", *SQLiteStorage._ARTIFACT_PARQUET_TABLES)}
    assert all(RESERVED.fullmatch(f"a{end}") for end in known)


def test_what_goes_on_with_a_run_of_trackio_exists():
    pytest.importorskip("trackio")
    from trackio import Run
    from trackio.remote_client import RemoteClient
    from trackio.sqlite_storage import SQLiteStorage

    assert {"project", "name", "run_id"} <= inspect.signature(Run.__init__).parameters.keys()
    assert '"run_id": self.id' in inspect.getsource(Run), "metrics are of the run whose id this is when they are logged"
    assert "run_id" in inspect.signature(SQLiteStorage.get_logs).parameters
    assert {"hf_token", "write_token"} <= inspect.signature(RemoteClient.__init__).parameters.keys()
    TRACKIO.name(Run, "_hf_token_for_remote")
    TRACKIO.source(Run, "self._write_token", "_write_token")
