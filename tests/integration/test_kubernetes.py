"""The documents of a job, played on this machine: each pod is a Ray node that starts with what the document says."""

import json
import shlex
import signal
from pathlib import Path
from typing import Any

import yaml

from raysft.config import load
from raysft.submit.kubernetes import render
from raysft.submit.shown_log import own_exit_code
from tests.clusters import started
from tests.tiny import SENTENCES, tiny_model

CONFIG = """
run: {{storage: {folder}/runs, seed: 1}}
model: {{path: {folder}/base, finetuning: lora}}
data:
  train: [{{name: chat, path: {folder}/chat.jsonl}}]
  holdout: 0.2
  sequence_length: 128
train: {{max_steps: 2, global_batch_size: 2}}
scaling: {{threads_per_worker: 1}}
generate: {{enabled: false}}
cluster:
  image: raysft
  volume: {{claim: shared, mount_path: {folder}}}
  workers: {{cpus: 1, memory: 2Gi}}
  data_workers: {{replicas: 1, cpus: 1, memory: 2Gi}}
"""
JOB_SECONDS = 600
"""A limit, not an expectation: several times what a busy machine of 2 cores needs."""
IDLE_SECONDS = 120
"""A pod without work takes 3 seconds to leave, and must not take the 300 that it may."""


def prepare(folder: Path) -> Path:
    """Write a tiny model, conversations, and a config that names them; the folder is the pods' volume."""
    tiny_model(folder / "base")
    words = " ".join(SENTENCES).split()
    with (folder / "chat.jsonl").open("w") as file:
        for index in range(40):
            texts = (" ".join(words[index % 40 :][:4]), " ".join(words[index * 7 % 40 :][:5]))
            turns = [{"role": role, "content": text} for role, text in zip(("user", "assistant"), texts, strict=True)]
            file.write(json.dumps({"messages": turns}) + "\n")
    (folder / "tiny.yaml").write_text(CONFIG.format(folder=folder))
    return folder / "tiny.yaml"


def node(group: dict[str, Any]) -> tuple[int, dict[str, str], dict[str, str]]:
    """CPUs, environment and further options of `ray start` for a group's pods."""
    options = dict(group["rayStartParams"])
    variables = {one["name"]: one["value"] for one in group["template"]["spec"]["containers"][0]["env"]}
    return int(options.pop("num-cpus")), variables, options


def test_the_pods_of_a_job_run_its_config(tmp_path):
    rendered = list(yaml.safe_load_all(render(load(prepare(tmp_path)))))
    objects = {one["kind"]: one for one in rendered}
    spec = objects["RayJob"]["spec"]
    mounted = tmp_path / "etc"
    mounted.mkdir()
    (mounted / "config.yaml").write_text(objects["ConfigMap"]["data"]["config.yaml"])
    words = spec["entrypoint"].replace("/etc/raysft", str(mounted))
    assert words.startswith("exec raysft run ")

    with started(tmp_path, []) as cluster:
        cpus, variables, options = node(spec["rayClusterSpec"]["headGroupSpec"])
        cluster.start(cpus, variables, **options)
        for group in spec["rayClusterSpec"]["workerGroupSpecs"]:
            for _ in range(group["replicas"]):
                cpus, variables, options = node(group)
                cluster.start(cpus, variables, **options)
        entrypoint = shlex.split(words.replace("http://127.0.0.1:8265", cluster.dashboard))
        (mounted / "wrong.yaml").write_text("train: {epochs: 0}\n")
        wrong = [word.replace("config.yaml", "wrong.yaml") for word in entrypoint]
        _, refusal = cluster.submit(*wrong, seconds=JOB_SECONDS)
        code, output = cluster.submit(*entrypoint, seconds=JOB_SECONDS)
        assert code == 0, output
        worker = cluster.nodes[1]
        worker.send_signal(signal.SIGTERM)
        worker.wait(timeout=IDLE_SECONDS)
        jobs = {one["entrypoint"]: one for one in cluster.jobs()}
        refused_log = cluster.log(jobs[shlex.join(wrong)]["submission_id"])

    run = tmp_path / "runs" / "tiny"
    assert (run / "model" / "adapter_model.safetensors").exists()
    plan = json.loads((run / "plan.json").read_text())
    assert plan["cluster_cpus"] == 2, "a worker's and a data pod's; the head offers none"
    assert jobs[shlex.join(entrypoint)]["status"] == "SUCCEEDED"
    assert jobs[shlex.join(wrong)]["status"] == "STOPPED", "KubeRay would start one again that has failed"
    assert own_exit_code(refused_log) == 2, refusal
    assert load(run / "config.yaml").cluster == load(tmp_path / "tiny.yaml").cluster
