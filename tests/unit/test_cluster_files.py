"""The files in ``cluster/`` agree with the package, the configs and KubeRay's schema."""

import copy
import re
import shlex
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml

from raysft.cli.parser import build_parser
from raysft.cluster.placement import Node
from raysft.config import load
from raysft.run.resources import check_resources

ROOT = Path(__file__).parents[2]
SCHEMA = ROOT.parent / "shared" / "data" / "kuberay" / "ray.io_rayjobs.yaml"
DOCKERFILE = (ROOT / "cluster" / "Dockerfile").read_text()
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


@pytest.fixture(scope="module")
def documents() -> dict[str, Any]:
    return {each["kind"]: each for each in yaml.safe_load_all((ROOT / "cluster" / "rayjob.yaml").read_text())}


@pytest.fixture(scope="module")
def cluster(documents) -> dict[str, Any]:
    return documents["RayJob"]["spec"]["rayClusterSpec"]


@pytest.fixture
def config(documents, monkeypatch):
    """What the entrypoint runs, loaded as the image would."""
    monkeypatch.chdir(ROOT)
    command, *arguments = shlex.split(documents["RayJob"]["spec"]["entrypoint"])
    assert command == "raysft"
    parsed = build_parser().parse_args(arguments)
    assert parsed.verb.__name__ == "_run"
    return load(parsed.config, parsed.overrides)


def pods(cluster) -> list[dict[str, Any]]:
    groups = [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]
    return [group["template"]["spec"] for group in groups]


def strict(schema: Any) -> Any:
    """The schema with fields it does not know refused: Kubernetes would drop a misspelt one without a word."""
    if isinstance(schema, list):
        return [strict(each) for each in schema]
    if not isinstance(schema, dict):
        return schema
    closed = {key: strict(value) for key, value in schema.items()}
    named = isinstance(schema.get("properties"), dict) and schema.get("type") == "object"
    if named and not schema.get("x-kubernetes-preserve-unknown-fields"):
        closed.setdefault("additionalProperties", False)
    return closed


@pytest.mark.skipif(not SCHEMA.exists(), reason="KubeRay's schema is not beside the repository")
def test_the_job_is_valid_under_the_schema_of_kuberay(documents):
    import jsonschema

    versions = yaml.load(SCHEMA.read_text(), Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader))["spec"]["versions"]
    schema = strict(next(each for each in versions if each["name"] == "v1")["schema"]["openAPIV3Schema"])
    validator = jsonschema.Draft7Validator(schema)
    assert [f"{list(e.path)}: {e.message}" for e in validator.iter_errors(documents["RayJob"])] == []

    misspelt = copy.deepcopy(documents["RayJob"])
    misspelt["spec"]["rayClusterSpec"]["headGroupSpec"]["rayStartParam"] = {}
    assert [e.validator for e in validator.iter_errors(misspelt)] == ["additionalProperties"]


def test_the_job_ends_and_leaves_nothing_running(documents):
    job = documents["RayJob"]
    assert job["apiVersion"] == "ray.io/v1"
    spec = job["spec"]
    assert spec["shutdownAfterJobFinishes"] is True
    assert spec["ttlSecondsAfterFinished"] > 0
    assert spec["activeDeadlineSeconds"] > 0
    assert spec["backoffLimit"] >= 0


def test_every_pod_mounts_the_volume_that_the_run_is_stored_on(documents, cluster, config):
    claim = documents["PersistentVolumeClaim"]
    assert claim["spec"]["accessModes"] == ["ReadWriteMany"]
    for pod in pods(cluster):
        volumes = {each["name"]: each["persistentVolumeClaim"]["claimName"] for each in pod["volumes"]}
        mounts = {each["mountPath"]: volumes[each["name"]] for each in pod["containers"][0]["volumeMounts"]}
        mounted = [path for path, name in mounts.items() if name == claim["metadata"]["name"]]
        assert any(config.run_directory.is_relative_to(path) for path in mounted)
        assert any(config.cache_directory.local.is_relative_to(path) for path in mounted)
    assert config.train.save_every_steps, "what is tried again has to go on from a checkpoint"


def test_the_run_fits_the_cluster(cluster, config):
    nodes = [Node(float(cluster["headGroupSpec"]["rayStartParams"]["num-cpus"]))]
    for group in cluster["workerGroupSpecs"]:
        assert group["minReplicas"] <= group["replicas"] <= group["maxReplicas"]
        container = group["template"]["spec"]["containers"][0]
        assert container["resources"]["requests"] == container["resources"]["limits"]
        nodes += [Node(float(container["resources"]["limits"]["cpu"]))] * group["replicas"]
    check_resources(config, nodes)


def test_versions_agree(cluster):
    named = re.findall(r"^([a-z-]+)(?:\[.*\])?(.*)$", "\n".join(PROJECT["dependencies"]), re.MULTILINE)
    dependencies = {name: str(pin) for name, pin in named}
    installed = dict(re.findall(r"([a-z0-9-]+)==(\S+)", DOCKERFILE))
    assert f"=={installed['torch']}" == dependencies["torch"]
    assert installed["ray"] == cluster["rayVersion"]
    assert cluster["rayVersion"].startswith(dependencies["ray"].removeprefix("==").removesuffix("*"))
    images = {pod["containers"][0]["image"] for pod in pods(cluster)}
    assert images == {f"REGISTRY/raysft:{PROJECT['version']}"}
    assert images <= set(re.findall(r"-t (\S+)", DOCKERFILE))
    python = re.search(r"^FROM python:(3\.\d+)-slim$", DOCKERFILE, re.MULTILINE)
    assert python
    assert PROJECT["requires-python"].startswith(f">={python[1]},")


def test_the_image_holds_what_the_quickstart_needs():
    header = (ROOT / "configs" / "quickstart.yaml").read_text()
    packages = re.search(r"pip install --no-deps (.*)", header)
    assert packages
    assert f"pip install --no-deps {packages[1]}\n" in DOCKERFILE
    copied = {path for line in re.findall(r"^COPY (.*)", DOCKERFILE, re.MULTILINE) for path in line.split()[:-1]}
    assert copied == {"pyproject.toml", "README.md", "raysft", "configs"}
