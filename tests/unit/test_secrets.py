"""Secrets in a config are refused, and repeated nowhere."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from raysft.cli import main
from raysft.config import Config, load, masked, parse, refuse_secrets, with_overrides
from raysft.data.sources.registry import resolve_source
from raysft.storage.run_directory import RunDirectory
from raysft.telemetry.tracker_writers import TensorBoard
from raysft.train.deepspeed_config import deepspeed_settings
from tests import messages

CONFIG = "model: {path: m}\ndata:\n  train:\n    - name: a\n      path: a.json\n"
SECRETS = (
    "s3://KEYID:HIDDEN@bucket/a.jsonl",
    "s3://KEYID:HID/DEN@HIDDEN@bucket/a.jsonl",
    "https://HIDDEN:@host/a.jsonl",
    "redis://:HIDDEN@host",
    "s3://bucket/a.jsonl?region=eu&access_key=HIDDEN&secret_key=HIDDEN",
    "https://host/a.jsonl?sig=HIDDEN",
    "https://host/a.jsonl?X-Amz-Credential=HIDDEN&X-Amz-Signature=HIDDEN",
    "https://host/a.jsonl?token=HIDDEN",
    "AccountName=a;AccountKey=HIDDEN==;EndpointSuffix=core.windows.net",
    "s3://AKIAHIDDENHIDDENHIDD@bucket/a.jsonl",
    "hf_HIDDENHIDDENHIDDENHIDDENHIDDENHIDD",
    "ghp_HIDDENHIDDENHIDDENHIDDENHIDDENHIDDEN",
    "sk-HIDDENHIDDENHIDDENHIDDEN",
    "sk-proj-HIDDEN_HIDDEN-HIDDEN-HIDDEN",
    "-----BEGIN RSA PRIVATE KEY-----\nHIDDEN",
)
PLAIN = (
    "s3://bucket/a@b/c.jsonl",
    "s3://bucket/a:b@c.jsonl",
    "s3://bucket/data-?.jsonl?region=eu-west-1&scheme=http&endpoint_override=localhost:9000",
    "hdfs://me@namenode/data",
    "hdfs://namenode:8020/a@b",
    "hdfs://me@namenode:8020/data",
    "abfs://container@account.dfs.core.windows.net/data",
    "hf://datasets/org/name@~parquet/default/train",
    "data/file@2x.json",
    "home/user@host/token=3/*.jsonl",
    "sk-learn-and-other-documentation",
    "hf_datasets/a.jsonl",
    "package:name/data/*.yml",
    "C:/data@home",
)


@pytest.fixture(autouse=True)
def _here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("c.yaml").write_text(CONFIG)


@pytest.mark.parametrize("verb", ["run", "check"])
@pytest.mark.parametrize("secret", SECRETS)
def test_a_secret_is_refused_in_one_line_that_does_not_hold_it(tmp_path, capsys, secret, verb):
    Path("c.yaml").write_text(CONFIG.replace("a.json", json.dumps(secret)))
    assert main([verb, "c.yaml"]) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("raysft: error: c.yaml:5: data.train.0.path contains ")
    assert "remove it" in captured.err
    assert captured.err.count("\n") == 1
    assert "HIDDEN" not in captured.err + captured.out
    assert [path.name for path in tmp_path.iterdir()] == ["c.yaml"]


@pytest.mark.parametrize("path", PLAIN)
def test_paths_without_secrets_pass(path):
    assert load("c.yaml", [f"data.train.0.path={json.dumps(path)}"]).data.train[0].path == path
    assert masked(path) == path


@pytest.mark.parametrize(
    ("override", "key"),
    [
        ("run.storage=s3://KEYID:HIDDEN@bucket/runs", "run.storage"),
        ("model.path=https://me:HIDDEN@host/m", "model.path"),
        ("scaling.address=ray://me:HIDDEN@host:10001", "scaling.address"),
        ("generate.metrics=[https://me:HIDDEN@host/metric.py]", "generate.metrics.0"),
        ("train.deepspeed={comet: {api_key: HIDDEN}}", "train.deepspeed.comet.api_key"),
        ("train.deepspeed={flops_profiler: {output_file: s3://KEYID:HIDDEN@b/c}}", "train.deepspeed.flops_profiler"),
        ("data.template_options={password: HIDDEN}", "data.template_options.password"),
        ("tune.space={data.train.0.path: ['s3://KEYID:HIDDEN@b/c']}", "tune.space.data.train.0.path.0"),
        ("data.train.0.path=[a.json, 's3://KEYID:HIDDEN@b/c']", "data.train.0.path.1"),
        ("train.wandb_api_key=HIDDEN", "train.wandb_api_key"),
        ("'s3://KEYID:HIDDEN@b/c'=3", ""),
    ],
)
def test_secrets_are_found_wherever_they_stand(capsys, override, key):
    assert main(["check", "c.yaml", override]) == 2
    captured = capsys.readouterr().err
    assert captured.startswith("raysft: error: ")
    assert key in captured
    assert captured.count("\n") == 1
    assert "HIDDEN" not in captured


def test_a_broken_override_is_told_without_its_secret(capsys):
    assert main(["check", "c.yaml", "data.train.0.path=[s3://KEYID:HIDDEN@b/c"]) == 2
    captured = capsys.readouterr().err
    assert "not valid YAML" in captured
    assert "HIDDEN" not in captured


def test_ordinary_keys_are_no_secrets():
    options = {"bos_token": "<s>", "token": "<s>", "secretary": "a", "max_new_tokens": 3, "key": "a", "password": ""}
    assert load("c.yaml", [f"data.template_options={json.dumps(options)}"]).data.template_options == options


def test_a_mapping_that_holds_itself_is_passed_over():
    endless: dict = {"a": []}
    endless["a"].append(endless)
    refuse_secrets(endless, lambda place: "x")


def refusal(call) -> str:
    message = messages.refusal(call)
    assert "HIDDEN" not in message
    return message


def config(**data) -> Config:
    return parse({"model": {"path": "m"}, "data": {"train": [{"name": "a", "path": "a.json"}], **data}})


def test_a_secret_from_python_is_refused():
    assert "contains a password in a URI" in refusal(lambda: config(registry="s3://KEYID:HIDDEN@b/c"))
    assert "contains a password in a URI" in refusal(
        lambda: with_overrides(config(), {"model.path": "s3://K:HIDDEN@b/c"})
    )


def test_a_secret_in_a_registry_is_refused():
    Path("dataset_info.json").write_text(json.dumps({"a": {"cloud_file_name": "s3://KEYID:HIDDEN@b/c.json"}}))
    named = config(registry="dataset_info.json", train=[{"name": "a"}])
    assert "dataset_info.json: dataset 'a': path contains a password" in refusal(
        lambda: resolve_source(named, named.data.train[0])
    )


def test_a_secret_in_deepspeeds_file_is_refused():
    Path("ds.json").write_text(json.dumps({"comet": {"enabled": True, "api_key": "HIDDEN"}}))
    named = with_overrides(config(), {"train.deepspeed": "ds.json"})
    assert "train.deepspeed=ds.json: comet.api_key contains a secret" in refusal(lambda: deepspeed_settings(named, 1))


def test_a_tracker_that_fails_is_told_without_its_servers_password(tmp_path, monkeypatch):
    """MLflow's errors repeat the address of its server, which may hold a password that the environment gave."""
    from types import SimpleNamespace

    from raysft.run.tracking import run_trackers

    def fails(self, *_):
        raise OSError("https://me:HIDDEN@host/api/2.0 does not respond")

    lines: list[str] = []
    context: Any = SimpleNamespace(
        config=config(),
        directory=RunDirectory(tmp_path),
        terminal=SimpleNamespace(line=lines.append),
    )
    monkeypatch.setattr(TensorBoard, "write", fails)
    with run_trackers(context) as (tracker,):
        tracker.on_evaluate({"current_steps": 1, "eval_loss": 1.0})
    assert len(lines) == 1
    assert "https://***@host" in lines[0]
    monkeypatch.setattr(TensorBoard, "__init__", fails)
    assert "https://***@host" in refusal(run_trackers(context).__enter__)
