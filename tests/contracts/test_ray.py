"""Ray and Ray Data: addresses, tokens, the head's answer, drained nodes, a split's coordinator, counts of tasks, ids of forks."""

from __future__ import annotations

import dataclasses
import importlib.util
import inspect
import subprocess
import sys
from pathlib import Path

import pytest
import ray
import ray.actor
import ray.data
from ray._private import grpc_utils, ray_constants, services, worker
from ray._private.authentication import authentication_token_setup
from ray._private.node import Node
from ray._private.resource_and_label_spec import ResourceAndLabelSpec
from ray._private.runtime_env import constants as runtime_env_constants
from ray._private.runtime_env.context import RuntimeEnvContext
from ray._private.state import GlobalState, state
from ray._private.workers import setup_worker
from ray.core.generated import gcs_pb2, gcs_service_pb2, gcs_service_pb2_grpc
from ray.data._internal.execution.interfaces.op_runtime_metrics import OpRuntimeMetrics
from ray.data._internal.execution.streaming_executor import StreamingExecutor
from ray.data._internal.iterator import stream_split_iterator

from raysft.cluster import forkserver, ray_internals
from tests.contracts.contract import Contract

RAY = Contract("ray", "raysft/cluster/ray_internals.py")


def test_addresses_are_found_as_ray_init_finds_them():
    RAY.positional(RAY.name(services, "canonicalize_bootstrap_address"), 1)
    RAY.positional(RAY.name(services, "extract_ip_port"), 1)
    assert services.canonicalize_bootstrap_address("10.0.0.7:6379") == "10.0.0.7:6379"


def test_the_resources_of_this_machine_are_found_as_ray_finds_them():
    RAY.parameters(ResourceAndLabelSpec.resolve, ["is_head", "node_ip_address"])
    found = ResourceAndLabelSpec().resolve(is_head=True, node_ip_address="127.0.0.1")
    assert RAY.name(found, "num_cpus") >= 1
    assert RAY.name(found, "num_gpus") >= 0


def test_tokens_are_loaded_as_ray_init_loads_them():
    discover = RAY.name(authentication_token_setup, "maybe_enable_token_auth_if_token_available")
    RAY.parameters(discover, ["warn_if_disabled"])
    ensure = RAY.name(authentication_token_setup, "ensure_token_if_auth_enabled")
    RAY.parameters(ensure, ["create_token_if_missing"])


def test_a_head_tells_its_version():
    RAY.positional(RAY.name(grpc_utils, "init_grpc_channel"), 2)
    RAY.name(ray_constants, "GLOBAL_GRPC_OPTIONS")
    RAY.name(gcs_service_pb2_grpc, "NodeInfoGcsServiceStub")
    RAY.source(gcs_service_pb2_grpc.NodeInfoGcsServiceStub, "self.CheckAlive =", "CheckAlive(")
    RAY.name(gcs_service_pb2, "CheckAliveRequest")
    reply = RAY.name(gcs_service_pb2, "CheckAliveReply", "CheckAlive(")
    assert "ray_version" in reply.DESCRIPTOR.fields_by_name, f"look at {RAY.line('ray_version')}"


def test_nodes_that_are_drained_are_known_by_their_ids():
    assert isinstance(state, GlobalState)
    RAY.positional(RAY.name(GlobalState, "get_draining_nodes"), 1)
    assert "Dict[str" in str(inspect.signature(GlobalState.get_draining_nodes).return_annotation)


def test_advice_on_processes_is_not_printed_and_all_else_is(capsys):
    RAY.parameters(RAY.name(worker, "print_to_stdstream"), ["data", "ignore_prefix"])
    RAY.source(worker.listen_error_messages, "print_to_stdstream(", "print_to_stdstream")
    raylet = (Path(ray.__file__).parent / "core" / "src" / "ray" / "raylet" / "raylet").read_bytes()
    assert f"%s {ray_internals.ADVICE}".encode() in raylet, f"look at {RAY.line('ADVICE')}"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(worker, "print_to_stdstream", worker.print_to_stdstream)
        for _ in range(2):
            ray_internals.drop_advice_on_processes()
        for line in (f"WARNING: 19 PYTHON {ray_internals.ADVICE}: 1ab2", "The node with node id: 1ab2 is dead"):
            worker.print_to_stdstream({"lines": [line], "pid": "raylet", "is_err": False}, ignore_prefix=False)
    shown = capsys.readouterr().out
    assert "is dead" in shown
    assert "WARNING" not in shown


def test_a_split_has_the_actor_that_runs_its_pipeline():
    RAY.source(stream_split_iterator.StreamSplitDataIterator, "self._coord_actor =", "_coord_actor")
    RAY.name(ray.data.Dataset, "streaming_split")


def test_a_pipeline_counts_its_tasks_and_blocks():
    RAY.source(StreamingExecutor, "self._topology", "_topology")
    counted = [field.name for field in dataclasses.fields(OpRuntimeMetrics)]
    for name in ("num_tasks_submitted", "num_tasks_finished", "num_task_outputs_generated"):
        assert name in counted, name


def test_a_head_without_services_starts_the_others_and_has_them_later():
    for name in ray_internals.SERVICES:
        RAY.name(Node, name, name)
        RAY.source(Node, f"self.{name}(", name)
    services = [getattr(Node, name) for name in ray_internals.SERVICES]
    with ray_internals.head_without_services():
        assert not any(getattr(Node, name) in services for name in ray_internals.SERVICES)
    assert [getattr(Node, name) for name in ray_internals.SERVICES] == services


def test_forked_workers_draw_ids_of_their_own():
    """Ray's core draws ids from a generator that a fork would share, had it been used before."""
    script = """
import os, ray
from raysft.cluster import forkserver, ray_internals
ray_internals.draw_actor_ids_from_system()
for name in forkserver.MODULES:
    __import__(name)
for _ in range(2):
    if os.fork() == 0:
        print("id", ray.ObjectID.from_random().hex(), flush=True)
        os._exit(0)
    os.wait()
"""
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, timeout=120)
    ids = [
        line.removeprefix("id ") for line in run.stdout.splitlines() if line.startswith("id ")
    ]  # DeepSpeed prints, too
    assert len(ids) == len(set(ids)) == 2, run.stdout


def test_workers_import_more_while_they_work():
    """Modules by their names, of which Ray does without one."""
    missing = [
        name for name in ray_internals.WORKER_MODULES if importlib.util.find_spec(name.partition(".")[0]) is None
    ]
    assert set(missing) <= {"starlette.datastructures"}
    for name in set(ray_internals.WORKER_MODULES) - set(missing):
        assert importlib.util.find_spec(name), f"{name}: look at {RAY.line(name)}"


def test_a_head_tells_its_nodes():
    RAY.source(gcs_service_pb2_grpc.NodeInfoGcsServiceStub, "self.GetAllNodeInfo =", "GetAllNodeInfo(")
    RAY.name(gcs_service_pb2, "GetAllNodeInfoRequest")
    reply = RAY.name(gcs_service_pb2, "GetAllNodeInfoReply", "GetAllNodeInfo(")
    assert "node_info_list" in reply.DESCRIPTOR.fields_by_name
    assert {"state", "resources_total"} <= set(RAY.name(gcs_pb2, "GcsNodeInfo").DESCRIPTOR.fields_by_name)
    assert gcs_pb2.GcsNodeInfo.ALIVE != gcs_pb2.GcsNodeInfo.DEAD  # pyright: ignore[reportAttributeAccessIssue]


def test_a_job_is_known_by_its_environment():
    RAY.name(runtime_env_constants, "RAY_JOB_CONFIG_JSON_ENV_VAR")
    RAY.source(worker.init, "RAY_JOB_CONFIG_JSON_ENV_VAR", "RAY_JOB_CONFIG_JSON_ENV_VAR")


def test_workers_are_started_by_a_file_whose_name_is_a_constant():
    RAY.name(ray_constants, "SETUP_WORKER_FILENAME")
    RAY.source(Node.__init__, "ray_constants.SETUP_WORKER_FILENAME", "SETUP_WORKER_FILENAME")
    assert Path(setup_worker.__file__) == Path(forkserver._setup_worker())
    for argument in (forkserver.LANGUAGE, forkserver.CONTEXT):
        RAY.source(setup_worker, argument.rstrip("="), argument)
    RAY.parameters(RuntimeEnvContext, ["command_prefix", "env_vars", "py_executable", "override_worker_entrypoint"])
    RAY.name(ray.actor, "ActorClassID")
    assert ray.JobID.nil().hex() == forkserver.NO_JOB
