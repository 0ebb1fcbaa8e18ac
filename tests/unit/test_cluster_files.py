"""The image agrees with the package, the configs and the examples in ``cluster/``."""

import re
import tomllib

import pytest

from tests.cluster_examples import EXAMPLES, ROOT, objects

DOCKERFILE = (ROOT / "cluster" / "Dockerfile").read_text()
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda path: path.stem)
def test_the_examples_name_the_image_that_the_dockerfile_builds(example):
    cluster = objects(example)["RayJob"]["spec"]["rayClusterSpec"]
    groups = [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]
    images = {group["template"]["spec"]["containers"][0]["image"] for group in groups}
    assert len(images) == 1, "Ray refuses nodes with another version"
    assert images <= set(re.findall(r"-t (\S+)", DOCKERFILE))
    (image,) = images
    assert image.removesuffix("-cpu") == f"REGISTRY/raysft:{PROJECT['version']}"
    assert image.endswith("-cpu") == ("nvidia.com/gpu" not in example.read_text())
    installed = dict(re.findall(r"([a-z0-9-]+)==(\S+)", DOCKERFILE))
    assert installed["ray"] == cluster["rayVersion"]


def test_versions_agree():
    named = re.findall(r"^([a-z-]+)(?:\[.*\])?(.*)$", "\n".join(PROJECT["dependencies"]), re.MULTILINE)
    dependencies = {name: str(pin) for name, pin in named}
    installed = dict(re.findall(r"([a-z0-9-]+)==(\S+)", DOCKERFILE))
    assert f"=={installed['torch']}" == dependencies["torch"]
    assert installed["ray"].startswith(dependencies["ray"].removeprefix("==").removesuffix("*"))
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


def test_the_user_of_the_image_is_the_one_that_pods_run_as():
    from raysft.submit.kubernetes.pod_template import USER

    user = re.search(r"^USER (\S+)$", DOCKERFILE, re.MULTILINE)
    assert user
    assert f"useradd --create-home --uid {USER} {user[1]}\n" in DOCKERFILE
