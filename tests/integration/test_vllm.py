"""The pipeline around vLLM on a real local cluster of Ray; its GPU is a number, and vLLM itself is what lacks."""

from __future__ import annotations

import importlib.util

import pyarrow as pa
import pytest
import ray

from raysft.cluster import workers
from raysft.cluster.ray_internals import head_without_services
from raysft.config import parse, with_overrides
from raysft.errors import RequestError, RunFailed
from raysft.generate.prompts import ModelPrompts, Prompts
from raysft.generate.ray_pipeline import completions
from tests.tiny import tiny_model

pytestmark = pytest.mark.skipif(importlib.util.find_spec("vllm") is not None, reason="vLLM is installed")


@pytest.fixture(scope="module", autouse=True)
def _ray():
    """A cluster with a GPU in place of the other tests' cluster without one."""
    ray.shutdown()
    workers.stop()
    workers.start(use_gpu=False)
    quiet = {"include_dashboard": False, "logging_level": "error", "log_to_driver": False}
    with head_without_services(), workers.forked_workers(joins=False) as options:
        ray.init(address="local", num_cpus=2, num_gpus=1, **quiet, **options)
    yield
    ray.shutdown()
    workers.stop()


def test_an_engine_that_does_not_start_fails_the_run_in_one_line(tmp_path, capfd):
    model = str(tiny_model(tmp_path / "model"))
    data = {"train": [{"name": "a", "path": "a"}]}
    settings = {"engine": "vllm", "batch_size": 2, "max_new_tokens": 8}
    config = parse({"model": {"path": model}, "data": data, "scaling": {"use_gpu": True}, "generate": settings})
    prompts = pa.table({"id": list("abc"), "input_ids": pa.array([[5, 6], [7], [8]], pa.list_(pa.int32()))})
    asked = [ModelPrompts.all(model, Prompts.of(prompts))]
    capfd.readouterr()
    with pytest.raises(RunFailed, match=r"^generation failed: ImportError: vLLM is not installed") as failed:
        list(completions(config, asked))
    assert "\n" not in str(failed.value)
    assert capfd.readouterr().err == ""
    with pytest.raises(RequestError, match=r"gpus_per_engine=2 needs 2 GPUs on one node, but no node has that many"):
        list(completions(with_overrides(config, {"generate.gpus_per_engine": 2}), asked))
