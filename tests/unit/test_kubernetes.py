"""The documents of a job on Kubernetes: valid, equal to the examples in ``cluster/``, and right for the config."""

from __future__ import annotations

import copy
import io
import json
import re
import shlex
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
import pytest
import yaml

from raysft.cli import main
from raysft.config import Config, load, with_overrides
from raysft.config.verb import verb_of
from raysft.submit.kubernetes import documents, render
from raysft.submit.kubernetes.names import config_text, job_name
from raysft.submit.kubernetes.pod_template import ENVIRONMENT
from raysft.telemetry.dashboard import alerts, dashboard
from raysft.train.cpu_worker import KEEP_MEMORY
from tests import messages
from tests.cluster_examples import ALL_OPTIONS, EXAMPLES, ROOT, command, comment, config_of, expected, objects

SCHEMA = ROOT.parent / "shared" / "data" / "kuberay" / "ray.io_rayjobs.yaml"
KUBERNETES = ("1.30", "1.37")
STAY = ("PersistentVolumeClaim", "Dashboard", "PrometheusRule")
"""Kinds that other jobs use, too."""
WHOLE = pytest.mark.parametrize("path", [*EXAMPLES, ALL_OPTIONS], ids=lambda path: path.stem)
Job = dict[str, Any]


def config(*overrides: str) -> Config:
    """LoRA on one GPU with a bucket, and overrides."""
    given = (
        "run.storage=s3://bucket/runs",
        "cluster.image=raysft:1",
        "cluster.workers={cpus: 8, memory: 64Gi, gpus: 1}",
    )
    return load(ROOT / "configs" / "lora.yaml", [*given, *overrides])


def job(given: Config) -> Job:
    return next(one for one in documents(given) if one["kind"] == "RayJob")


def templates(job: Job) -> dict[str, Job]:
    cluster = job["spec"]["rayClusterSpec"]
    workers = {group["groupName"]: group["template"] for group in cluster["workerGroupSpecs"]}
    return {"head": cluster["headGroupSpec"]["template"], **workers}


def environment(template: Job) -> dict[str, str]:
    return {one["name"]: one["value"] for one in template["spec"]["containers"][0]["env"]}


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


@pytest.fixture(scope="module")
def ray_job_schema() -> Any:
    if not SCHEMA.exists():
        pytest.skip("KubeRay's schema is not beside the repository")
    versions = yaml.load(SCHEMA.read_text(), Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader))["spec"]["versions"]
    schema = next(each for each in versions if each["name"] == "v1")["schema"]["openAPIV3Schema"]
    return jsonschema.Draft7Validator(strict(schema))


@WHOLE
def test_an_example_is_what_the_renderer_gives(path):
    assert path.read_text() == expected(path), "python -m tests.cluster_examples writes the examples anew"


@WHOLE
def test_the_command_of_an_example_writes_it(path, tmp_path, monkeypatch):
    program, *words = command(path)
    file = words.index("--render") + 1
    assert (program, ROOT / words[file]) == ("raysft", path)
    words[file] = str(tmp_path / "rendered.yaml")
    monkeypatch.chdir(ROOT)
    assert main(words) == 0
    assert path.read_text() == f"{comment(path)}\n\n{(tmp_path / 'rendered.yaml').read_text()}"


@WHOLE
def test_the_pods_load_the_config_that_was_submitted(path, tmp_path):
    (tmp_path / "config.yaml").write_text(objects(path)["ConfigMap"]["data"]["config.yaml"])
    assert load(tmp_path / "config.yaml") == config_of(path)


def test_a_run_keeps_its_name_when_its_file_has_another(tmp_path):
    given = config("run.name=run")
    (tmp_path / "config.yaml").write_text(config_text(given))
    assert load(tmp_path / "config.yaml").run.name == "run"


@WHOLE
@pytest.mark.parametrize("version", KUBERNETES)
def test_the_objects_are_valid_in_kubernetes(path, version):
    found = objects(path)
    core = [one for kind, one in found.items() if kind not in ("RayJob", "PodMonitor", "PrometheusRule")]
    pods = [{"apiVersion": "v1", "kind": "Pod", **template} for template in templates(found["RayJob"]).values()]
    for one in core + pods:
        assert kubernetes_validate.validate(one, version, strict=True) == version


def test_a_misspelt_field_of_a_pod_is_found():
    pod = {"apiVersion": "v1", "kind": "Pod", **copy.deepcopy(templates(job(config()))["head"])}
    pod["spec"]["containers"][0]["volumeMount"] = []
    with pytest.raises(kubernetes_validate.ValidationError, match="volumeMount"):
        kubernetes_validate.validate(pod, KUBERNETES[-1], strict=True)


@WHOLE
def test_the_job_is_valid_for_kuberay(path, ray_job_schema):
    found = objects(path)["RayJob"]
    assert [f"{list(error.path)}: {error.message}" for error in ray_job_schema.iter_errors(found)] == []


def test_a_misspelt_field_of_a_job_is_found(ray_job_schema):
    misspelt = copy.deepcopy(job(config()))
    misspelt["spec"]["rayClusterSpec"]["headGroupSpec"]["rayStartParam"] = {}
    assert [error.validator for error in ray_job_schema.iter_errors(misspelt)] == ["additionalProperties"]


@WHOLE
def test_the_job_keeps_the_rules_that_kuberay_checks_beside_its_schema(path):
    """As ``ValidateRayJobSpec`` of KubeRay 1.7 has them."""
    found = objects(path)["RayJob"]
    spec, cluster = found["spec"], found["spec"]["rayClusterSpec"]
    assert re.fullmatch(r"[a-z]([-a-z0-9]{0,45}[a-z0-9])?", found["metadata"]["name"])
    rules = spec.get("deletionStrategy", {}).get("deletionRules", [])
    assert bool(rules) != spec.get("shutdownAfterJobFinishes", False)
    assert spec.get("shutdownAfterJobFinishes") or "ttlSecondsAfterFinished" not in spec
    assert spec.get("shutdownAfterJobFinishes") or "kueue.x-k8s.io/queue-name" not in found["metadata"]["labels"]
    assert spec.get("activeDeadlineSeconds", 1) > 0
    if cluster.get("enableInTreeAutoscaling"):
        assert "DeleteWorkers" not in {rule["policy"] for rule in rules}
        assert "kueue.x-k8s.io/queue-name" not in found["metadata"]["labels"]
        assert not any("restartPolicy" in template["spec"] for template in templates(found).values())
    for status in ("SUCCEEDED", "FAILED"):
        after = {
            rule["policy"]: rule["condition"]["ttlSeconds"]
            for rule in rules
            if rule["condition"].get("jobStatus") == status
        }
        assert not rules or after["DeleteWorkers"] <= after["DeleteCluster"]
    assert cluster["authOptions"] == {"mode": "token"}
    assert tuple(map(int, cluster["rayVersion"].split("."))) >= (2, 52, 0)


PODS = {
    "quickstart": ("run", 2, 2, 0),
    "one-gpu": ("run", 1, 1, 0),
    "several-nodes": ("run", 2, 2, 0),
    "spot": ("run", 2, 8, 0),
    "data-nodes": ("run", 1, 1, 4),
    "sweep": ("tune", 1, 1, 0),
    "generate": ("generate", 1, 1, 0),
    "kueue": ("run", 2, 2, 0),
}
"""Verb, fewest and most worker pods, and pods for data, as the headers of the examples say."""


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_an_example_has_the_pods_that_its_config_needs(path):
    verb, fewest, most, data = PODS[path.stem]
    spec = objects(path)["RayJob"]["spec"]
    assert spec["entrypoint"] == f"exec raysft {verb} /etc/raysft/config.yaml --rayjob http://127.0.0.1:8265"
    groups = {group["groupName"]: group for group in spec["rayClusterSpec"]["workerGroupSpecs"]}
    workers = groups["workers"]
    # KubeRay starts the job when all replicas run, so that more than the fewest could delay it for ever.
    assert [workers[key] for key in ("replicas", "minReplicas", "maxReplicas")] == [fewest, fewest, most]
    assert (fewest < most) == spec["rayClusterSpec"].get("enableInTreeAutoscaling", False)
    assert groups.get("data", {"replicas": 0})["replicas"] == data


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_the_workers_of_an_example_find_room(path):
    """Place the workers one by one, as Ray would, and then half a CPU for data."""
    given, spec = config_of(path), objects(path)["RayJob"]["spec"]["rayClusterSpec"]
    if verb_of(given) == "generate":
        pytest.skip("engines reserve GPUs alone")
    free = []
    for group in spec["workerGroupSpecs"]:
        started = group["rayStartParams"]
        limits = group["template"]["spec"]["containers"][0]["resources"]["limits"]
        assert int(started["num-cpus"]) <= int(limits["cpu"])
        assert started.get("num-gpus") == limits.get("nvidia.com/gpu")
        free += [[float(started["num-cpus"]), int(started.get("num-gpus", 0))] for _ in range(group["maxReplicas"])]
    for _ in range(given.scaling.most_workers):
        node = next(one for one in free if one[0] >= given.scaling.cpus_per_worker and one[1] >= given.scaling.use_gpu)
        node[0] -= given.scaling.cpus_per_worker
        node[1] -= given.scaling.use_gpu
    assert max(cpus for cpus, _ in free) >= 0.5
    idle = sum(gpus for _, gpus in free)
    assert idle == 0 or verb_of(given) == "tune"


@WHOLE
def test_a_pod_has_time_for_a_checkpoint(path):
    for template in templates(objects(path)["RayJob"]).values():
        given = environment(template)
        drain, stop = (
            int(given[name]) for name in ("RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S", "RAY_JOB_STOP_WAIT_TIME_S")
        )
        grace = template["spec"]["terminationGracePeriodSeconds"]
        assert stop < drain <= grace - 20, "Ray needs 20 seconds between the end of a drain and its own"
        assert drain >= 300


@WHOLE
def test_the_head_runs_no_worker_and_is_kept(path):
    found = objects(path)
    cluster = found["RayJob"]["spec"]["rayClusterSpec"]
    head = cluster["headGroupSpec"]
    assert head["rayStartParams"]["num-cpus"] == "0"
    assert not any(name.endswith("gpu") for name in head["template"]["spec"]["containers"][0]["resources"]["limits"])
    assert head["template"]["metadata"]["annotations"]["cluster-autoscaler.kubernetes.io/safe-to-evict"] == "false"
    budget = found["PodDisruptionBudget"]["spec"]
    chosen = budget["selector"]["matchLabels"]
    for role, template in templates(found["RayJob"]).items():
        labels = {**template["metadata"]["labels"], "ray.io/node-type": "head" if role == "head" else "worker"}
        assert (chosen.items() <= labels.items()) == (role == "head")
    assert budget["minAvailable"] == 1


@WHOLE
def test_every_pod_sees_the_storage_and_the_head_the_config(path):
    found, given = objects(path), config_of(path)
    for role, template in templates(found["RayJob"]).items():
        spec = template["spec"]
        volumes = {one["name"]: one for one in spec.get("volumes", [])}
        mounts = {one["mountPath"]: volumes[one["name"]] for one in spec["containers"][0].get("volumeMounts", [])}
        assert ("/etc/raysft" in mounts) == (role == "head")
        if role == "head":
            assert mounts["/etc/raysft"]["configMap"]["name"] == found["ConfigMap"]["metadata"]["name"]
        if "://" not in given.run.storage:
            (folder,) = (one for one in mounts if Path(given.run.storage).is_relative_to(one))
            claim = mounts[folder]["persistentVolumeClaim"]["claimName"]
            assert claim == found.get("PersistentVolumeClaim", {"metadata": {"name": "shared"}})["metadata"]["name"]


@WHOLE
def test_a_pod_has_no_more_rights_than_it_needs(path):
    given = config_of(path)
    for role, template in templates(objects(path)["RayJob"]).items():
        spec, container = template["spec"], template["spec"]["containers"][0]
        assert container["resources"]["requests"] == container["resources"]["limits"]
        assert spec["securityContext"]["runAsNonRoot"] is True
        assert spec["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
        assert spec["securityContext"]["fsGroupChangePolicy"] == "OnRootMismatch"
        assert container["securityContext"]["capabilities"]["drop"] == ["ALL"]
        added = container["securityContext"]["capabilities"].get("add", [])
        assert (
            ("SYS_PTRACE" in added) == given.cluster.debug == container["securityContext"]["allowPrivilegeEscalation"]
        )
        assert ("IPC_LOCK" in added) == (role == "workers" and "rdma/hca" in given.cluster.workers.resources)
        assert spec["automountServiceAccountToken"] == (role == "head" and path.stem == "spot")


@WHOLE
def test_what_belongs_to_a_job_is_deleted_with_it_but_its_storage_and_what_jobs_share_stay(path):
    name = objects(path)["RayJob"]["metadata"]["name"]
    for kind, one in objects(path).items():
        assert one["metadata"]["labels"].get("raysft.io/job") == (None if kind in STAY else name)
    delete = next(line for line in path.read_text().splitlines() if line.startswith("# kubectl delete"))
    kinds = delete.split()[3].split(",")
    assert sorted(kinds) == sorted(kind.lower() for kind in objects(path) if kind not in STAY)
    assert f"-l raysft.io/job={name}" in delete


@WHOLE
def test_the_commands_of_an_example_name_its_namespace(path):
    namespace = objects(path)["RayJob"]["metadata"].get("namespace")
    commands = [line for line in path.read_text().splitlines() if re.match("# kubectl (get|delete)", line)]
    assert [shlex.split(line)[-2:] == ["--namespace", namespace] for line in commands] == [bool(namespace)] * 2


def test_jobs_share_a_dashboard_and_alerts():
    found = objects(ALL_OPTIONS)
    assert json.loads(found["Dashboard"]["data"]["raysft.json"]) == dashboard()
    assert found["PrometheusRule"]["spec"] == alerts()
    assert (
        found["PrometheusRule"]["metadata"]["labels"]["release"] == found["PodMonitor"]["metadata"]["labels"]["release"]
    )


def test_only_workers_on_cpus_keep_their_memory():
    quickstart = templates(objects(ROOT / "cluster" / "quickstart.yaml")["RayJob"])
    assert KEEP_MEMORY.items() <= environment(quickstart["workers"]).items()
    assert not KEEP_MEMORY.keys() & environment(quickstart["head"]).keys()
    assert not KEEP_MEMORY.keys() & environment(templates(job(config()))["workers"]).keys()


def test_ray_reads_the_variables_that_pods_have():
    import ray

    files = (
        "_private/ray_constants.py",
        "dashboard/modules/job/job_supervisor.py",
        "train/v2/_internal/constants.py",
    )
    sources = "".join((Path(ray.__file__).parent / file).read_text() for file in files)
    assert all(f'"{name}"' in sources for name in ENVIRONMENT if name.startswith("RAY_"))


@pytest.mark.parametrize("name", ["x" * 150, "7B_run", "9", "a--b", "A.B_c-", "0._-"])
def test_every_name_of_a_run_makes_a_name_for_kubernetes(name):
    found = job_name(config(f"run.name={name}"))
    assert re.fullmatch(r"[a-z]([-a-z0-9]{0,45}[a-z0-9])?", found)


def test_a_name_belongs_to_one_config():
    first = job_name(config())
    assert job_name(config()) == first
    assert len({first, job_name(config("train.epochs=3")), job_name(config("cluster.workers.memory=65Gi"))}) == 3
    long = [job_name(config(f"run.name={'x' * 100}{end}")) for end in "ab"]
    assert long[0] != long[1]


def test_kueue_gets_all_elastic_workers_at_once():
    given = config("scaling.num_workers=[2, 8]", "cluster.queue=team", "cluster.topology=rack")
    found = job(given)
    cluster = found["spec"]["rayClusterSpec"]
    group = cluster["workerGroupSpecs"][0]
    assert [group[key] for key in ("replicas", "minReplicas", "maxReplicas")] == [8, 8, 8]
    assert "enableInTreeAutoscaling" not in cluster
    assert "preRunningDeadlineSeconds" not in found["spec"], "a job may wait in a queue for long"
    annotations = group["template"]["metadata"]["annotations"]
    assert annotations == {"kueue.x-k8s.io/podset-preferred-topology": "rack"}
    assert "affinity" not in group["template"]["spec"]


def test_a_disk_of_one_node_keeps_head_and_worker_together():
    found = templates(objects(ROOT / "cluster" / "one-gpu.yaml")["RayJob"])
    (term,) = found["workers"]["spec"]["affinity"]["podAffinity"]["requiredDuringSchedulingIgnoredDuringExecution"]
    assert term["topologyKey"] == "kubernetes.io/hostname"
    chosen = term["labelSelector"]["matchLabels"]
    assert chosen.items() <= {**found["head"]["metadata"]["labels"], "ray.io/node-type": "head"}.items()
    assert found["head"]["spec"]["tolerations"] == found["workers"]["spec"]["tolerations"]


def test_the_head_grows_with_the_number_of_pods():
    def memory(workers: int) -> int:
        found = job(config(f"scaling.num_workers={workers}"))
        limit = templates(found)["head"]["spec"]["containers"][0]["resources"]["limits"]["memory"]
        return int(limit.removesuffix("Mi"))

    assert memory(1) == 6 * 1024 + 256
    assert memory(1000) >= 64 * 1024


REFUSALS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "no image": (("cluster.image=null",), ("cluster.image is not set", "Dockerfile")),
    "a GPU under the head": (("cluster.head.gpus=1",), ("cluster.head", "idle", "cluster.workers.gpus")),
    "a fraction of a CPU": (("cluster.workers.cpus=3.5",), ("cluster.workers.cpus=3.5", "whole number", "3 or 4")),
    "memory without a unit": (("cluster.workers.memory='64'",), ("cluster.workers.memory='64'", "unit", "64Gi")),
    "workers that leave GPUs idle": (
        ("cluster.workers.gpus=8", "scaling.num_workers=12"),
        ("scaling.num_workers=12", "cluster.workers.gpus=8", "8 or 16 workers", "cluster.workers.gpus=6"),
    ),
    "elastic workers that leave GPUs idle": (
        ("cluster.workers.gpus=4", "scaling.num_workers=[2, 8]"),
        ("scaling.num_workers=[2, 8]", "cluster.workers.gpus=4", "use 4 workers"),
    ),
    "replicas that do not make the workers": (
        ("cluster.workers.gpus=8", "cluster.workers.cpus=16", "cluster.workers.replicas=3", "scaling.num_workers=16"),
        ("cluster.workers.replicas=3", "8 GPUs", "scaling.num_workers=16", "needs 2"),
    ),
    "no GPUs": (("cluster.workers.gpus=0",), ("scaling.use_gpu=true", "cluster.workers.gpus=0")),
    "GPUs that nothing uses": (
        ("scaling.use_gpu=false",),
        ("cluster.workers.gpus=1", "scaling.use_gpu=false", "remove gpus"),
    ),
    "too few CPUs beside the GPUs": (
        ("cluster.workers.cpus=1",),
        ("scaling.cpus_per_worker=1", "data tasks", "use scaling.cpus_per_worker=0.5"),
    ),
    "a worker larger than a pod": (
        ("scaling.use_gpu=false", "cluster.workers={cpus: 2}", "scaling.cpus_per_worker=4"),
        ("scaling.cpus_per_worker=4", "cluster.workers.cpus=2", "use cluster.workers.cpus=5"),
    ),
    "a disk of one node for several": (
        ("scaling.num_workers=2", "cluster.volume={claim: disk, access_mode: ReadWriteOnce}"),
        ("ReadWriteOnce", "2 pods", "ReadWriteMany"),
    ),
    "storage inside the pods": (
        ("run.storage=runs",),
        ("run.storage=runs", "lost with the pods", "cluster.volume.claim"),
    ),
    "storage beside the volume": (
        ("run.storage=/data/runs", "cluster.volume.claim=disk"),
        ("run.storage=/data/runs", "cluster.volume.mount_path=/mnt/raysft"),
    ),
    "storage that another folder's name begins with": (
        ("run.storage=/mnt/raysft2/runs", "cluster.volume.claim=disk"),
        ("run.storage=/mnt/raysft2/runs", "cluster.volume.mount_path=/mnt/raysft"),
    ),
    "a cache inside the pods": (("data.cache=/tmp/cache",), ("data.cache=/tmp/cache", "lost with the pods")),
    "data of this machine": (
        ("data.train.0.path=data/train.jsonl",),
        ("data.train.0.path=data/train.jsonl", "cluster.image_folders", "s3://"),
    ),
    "data of this machine in a list": (
        ("data.train.0.path=[s3://bucket/a.jsonl, /home/me/b.jsonl]",),
        ("data.train.0.path=/home/me/b.jsonl", "cluster.image_folders"),
    ),
    "a model of this machine": (("model.path=./model",), ("model.path=./model", "Hugging Face Hub")),
    "a template of this machine": (
        ("model.chat_template=templates/own",),
        ("model.chat_template=templates/own", "a path below"),
    ),
    "a volume without a name": (("cluster.volume.size=50Gi",), ("cluster.volume.size=50Gi", "cluster.volume.claim")),
    "a cluster that is not started": (
        ("scaling.address=10.0.0.1:6379",),
        ("scaling.address=10.0.0.1:6379", "remove it"),
    ),
    "a sweep of unknown size": (
        ("tune.space={train.epochs: [1, 2]}",),
        ("cluster.workers.replicas", "tune.max_concurrent", "set one of them"),
    ),
    "a queue that releases workers": (
        ("cluster.queue=team", "cluster.release_workers=true"),
        ("cluster.release_workers=true", "cluster.queue=team"),
    ),
    "elastic workers that are released": (
        ("scaling.num_workers=[1, 2]", "cluster.release_workers=true"),
        ("cluster.release_workers=true", "[1, 2]", "release_workers=false"),
    ),
    "engines larger than a pod": (
        ("generate.gpus_per_engine=2",),
        ("generate.gpus_per_engine=2", "cluster.workers.gpus=1"),
    ),
    "engines that leave GPUs idle": (
        ("generate.model=org/model", "generate.gpus_per_engine=2", "cluster.workers.gpus=3"),
        ("generate.gpus_per_engine=2", "cluster.workers.gpus=3", "multiple of 2"),
    ),
    "more engines than pods": (
        ("generate.model=org/model", "generate.num_actors=3", "cluster.workers.replicas=2"),
        ("generate.num_actors=3", "needs 3 pods", "cluster.workers.replicas=2"),
    ),
    "a name that Kubernetes does not allow": (("cluster.queue=Team_A",), ("cluster.queue='Team_A'", "lower-case")),
    "infinitely many CPUs": (("cluster.workers.cpus=.inf",), ("cluster.workers.cpus=inf", "integer")),
    "a namespace with a dot": (("cluster.namespace=a.b",), ("cluster.namespace='a.b'", "lower-case")),
    "a queue that is too long for a label": ((f"cluster.queue={'q' * 64}",), ("cluster.queue='qqq", "63")),
    "a claim with two dots": (("cluster.volume.claim=a..b",), ("cluster.volume.claim='a..b'", "lower-case")),
    "a release with a space": (("cluster.prometheus=a b",), ("cluster.prometheus='a b'", "label")),
    "a topology that is no label": (("cluster.topology=a/b/c",), ("cluster.topology='a/b/c'", "zone")),
    "an image with a scheme": (("cluster.image=docker://a",), ("cluster.image='docker://a'", "name of an image")),
    "a variable with a space": (("cluster.environment={A B: c}",), ("cluster.environment", "'A B'", "variable")),
    "a variable that no process has": (
        ('cluster.environment={A: "b\\0"}',),
        ("cluster.environment.A", "remove them"),
    ),
    "CPUs among the devices": (
        ("cluster.workers.resources={cpu: 64}",),
        ("cluster.workers.resources", "'cpu'", "their own keys"),
    ),
    "GPUs twice": (
        ("cluster.workers.resources={nvidia.com/gpu: 4}",),
        ("cluster.workers", "nvidia.com/gpu", "remove it"),
    ),
    "a node that no label selects": (
        ("cluster.workers.node_selector={pool: a b}",),
        ("cluster.workers.node_selector.pool='a b'", "label"),
    ),
    "a misspelt toleration": (
        ("cluster.workers.tolerations=[{key: a, operater: Exists}]",),
        ("cluster.workers.tolerations.0", "operater", "operator"),
    ),
    "a toleration with a number": (
        ("cluster.head.tolerations=[{key: a, value: 1}]",),
        ("cluster.head.tolerations.0", "value", "quotes"),
    ),
    "a toleration of no effect": (
        ("cluster.head.tolerations=[{key: a, operator: Exists, effect: No}]",),
        ("cluster.head.tolerations.0", "effect", "NoSchedule"),
    ),
    "more hours than a number holds": (("cluster.deadline_hours=1e+300",), ("cluster.deadline_hours", "596523")),
    "a pod in which Ray cannot start": (
        ("cluster.workers.memory=249Mi",),
        ("cluster.workers.memory=249Mi", "250Mi"),
    ),
    "a volume over the config": (
        ("cluster.volume={claim: disk, mount_path: /etc}",),
        ("cluster.volume.mount_path=/etc", "/etc/raysft", "another folder"),
    ),
    "storage that leaves the volume": (
        ("run.storage=/mnt/raysft/../runs", "cluster.volume.claim=disk"),
        ("run.storage=/mnt/raysft/../runs", "cluster.volume.mount_path=/mnt/raysft"),
    ),
    "more engines than GPUs": (
        ("generate.num_actors=3", "scaling.num_workers=2"),
        ("generate.num_actors=3", "hold 2", "use 2"),
    ),
    "a folder that is none": (("cluster.volume.mount_path=data",), ("cluster.volume.mount_path='data'", "absolute")),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_what_cannot_run_is_refused(case):
    overrides, words = REFUSALS[case]
    message = messages.refusal(lambda: render(config(*overrides)))
    assert [word for word in words if word not in message] == [], message


@pytest.mark.parametrize("name", ["HF_TOKEN", "TRACKER_PASSWORD", "MY_SECRET", "WANDB_API_KEY", "DB_PWD", "PASSPHRASE"])
def test_a_secret_is_refused_and_not_repeated(name):
    message = messages.refusal(config, f"cluster.environment={{{name}: hidden-value}}")
    assert "cluster.environment" in message
    assert name in message
    assert "hidden-value" not in message


def test_a_file_with_credentials_may_be_named():
    given = config("cluster.environment={GOOGLE_APPLICATION_CREDENTIALS: /mnt/raysft/key.json}")
    assert environment(templates(job(given))["head"])["GOOGLE_APPLICATION_CREDENTIALS"] == "/mnt/raysft/key.json"
    assert "CREDENTIALS" in messages.refusal(config, "cluster.environment={GOOGLE_APPLICATION_CREDENTIALS: '{}'}")


@pytest.mark.parametrize(
    "value", ["1e3", ".5E-3", "1_0", "0o17", "0X1F", "y", "N", "2026-1-2", "yes", "12:30:45", "~", ""]
)
def test_kubectl_takes_text_for_text(value):
    """It reads YAML with another library than Python's, for which more is a number."""
    text = render(config(f"cluster.environment={{A: '{value}'}}"))
    assert re.search(rf"- name: A\n +value: (['\"]){re.escape(value)}\1\n", text)


@pytest.mark.parametrize("value", ["\x85", "a\x85b\nc", "\u2028", "\ufeff", "a\n b\t\n", " \n", "# a", "---\n"])
def test_text_is_the_same_in_the_pods(value):
    given = with_overrides(config(), {"cluster.environment": {"A": value}})
    assert environment(templates(job(given))["head"])["A"] == value
    assert list(yaml.safe_load_all(render(given))) == documents(given)
    assert yaml.safe_load(config_text(given))["cluster"]["environment"] == {"A": value}
    assert yaml.safe_load(given.to_yaml()) == given.model_dump(mode="json")


def test_documents_are_utf_8_in_a_terminal_that_is_not(monkeypatch):
    terminal = io.TextIOWrapper(io.BytesIO(), encoding="latin-1")
    monkeypatch.setattr("sys.stdout", terminal)
    given = (
        "run.storage=s3://bucket/runs",
        "cluster.image=raysft:1",
        "cluster.workers={gpus: 1}",
        "generate.stop_tokens=[数]",
    )
    assert main(["submit", str(ROOT / "configs" / "lora.yaml"), "--to", "kubernetes", "--render", "-", *given]) == 0
    assert terminal.buffer.getvalue().decode() == render(load(ROOT / "configs" / "lora.yaml", given))  # pyright: ignore


def test_a_deadline_is_never_zero_seconds():
    assert job(config("cluster.deadline_hours=1.0e-9"))["spec"]["activeDeadlineSeconds"] == 1


def test_a_label_without_a_value_selects_nodes():
    pod = templates(job(config("cluster.workers.node_selector={node-role.kubernetes.io/gpu: ''}")))["workers"]
    assert pod["spec"]["nodeSelector"] == {"node-role.kubernetes.io/gpu": ""}


def test_a_config_larger_than_a_config_map_is_refused():
    given = with_overrides(config(), {"generate.stop_tokens": ["<stop>" * 200_000]})
    assert "1,048,576" in messages.refusal(render, given)


def test_what_pods_see_is_accepted(tmp_path, monkeypatch):
    seen = (
        "cluster.volume.claim=disk",
        "cluster.image_folders=[/models]",
        "model.path=/models/qwen",
        "data.train.0.path=[/mnt/raysft/a.jsonl, package:name/b.jsonl, hf://datasets/org/name/c.jsonl]",
        "data.cache=/mnt/raysft/cache",
        "model.chat_template=chatml",
        "generate.metrics=[similarity, org/metric]",
    )
    render(config(*seen))
    monkeypatch.chdir(tmp_path)
    render(config("model.path=org/model"))
    (tmp_path / "org" / "model").mkdir(parents=True)
    # Here raysft would take the folder, there the model of that name.
    assert messages.holds(messages.refusal(render, config("model.path=org/model")), "model.path=org/model … pods")
