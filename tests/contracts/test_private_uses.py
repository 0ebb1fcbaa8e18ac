"""The private parts of other libraries are used in the modules that a contract covers, and nowhere else."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

from tests.contracts.contract import ROOT

USES = {
    "raysft/cluster/ray_internals.py": "test_ray.py",
    "raysft/submit/jobs_internals.py": "test_ray_jobs.py",
    "raysft/train/ray_train_internals.py": "test_ray_train.py",
    "raysft/train/deepspeed_internals.py": "test_deepspeed.py",
    "raysft/models/transformers_internals.py": "test_transformers.py",
    "raysft/models/peft_internals.py": "test_peft.py",
    "raysft/models/kt_internals.py": "test_kt_kernel.py",
    "raysft/models/onednn.py": "test_torch.py",
    "raysft/models/torch_internals.py": "test_torch.py",
    "raysft/data/tokenization/tokenizer.py": "test_tokenizers.py",
    "raysft/generate/engines/continuous_internals.py": "test_continuous_batching.py",
    "raysft/generate/metrics/sacrebleu_internals.py": "test_sacrebleu.py",
    "raysft/storage/hub.py": "test_huggingface_hub.py",
    "raysft/storage/modelscope_internals.py": "test_modelscope_hub.py",
    "raysft/telemetry/trackio_internals.py": "test_trackers.py",
}
"""Module → the contract that covers its private uses."""
ALLOWED = {
    ("raysft/train/elastic.py", "_maybe_send_resource_request"): "a policy calls its base class; test_ray_train.py",
    ("raysft/train/elastic.py", "_get_reserved_resources"): "a policy calls its base class; test_ray_train.py",
    ("raysft/train/elastic.py", "_resources_per_worker_not_none"): "as the base class does; test_ray_train.py",
    ("raysft/train/finetuning.py", "_apply_liger_kernel_to_instance"): "the only use of liger; test_liger_kernel.py",
    ("raysft/train/optim.py", "_step_count"): "a key of the scheduler's state; test_torch.py",
    ("raysft/data/rows/splice.py", "_replace"): "public: named tuples have no other name for it",
    ("raysft/train/watchdog.py", "_exit"): "public: the documented name in os",
    ("raysft/cluster/forkserver.py", "_exit"): "public: the documented name in os",
    ("raysft/cluster/forkserver.py", "_registry"): "Python's own, of weakref.finalize; unit/test_forkserver.py",
    ("raysft/__main__.py", "_exit"): "public: the documented name in os",
    ("raysft/cli/parser.py", "_SubParsersAction"): "the type that argparse's add_subparsers returns",
}
"""(module, name) → why it stays outside of the modules above."""
PACKAGES = ("_internal", "_private", "ray.core.generated", "transformers.generation.continuous_batching",
            "transformers.conversion_mapping", "transformers.utils.chat_template_utils", "peft.utils.transformers_weight",
            "peft.tuners.lora.layer")  # fmt: skip
"""Parts of the names of modules that are private, or that no documentation promises."""
ATTRIBUTES = {
    "bit16_groups", "fp16_groups", "single_partition_of_fp32_groups", "fp32_partitioned_groups_flat", "persistent_parameters",
    "update_lp_params", "partition_numel", "lp_fragment_address", "hp_fragment_address", "ds_numel", "ds_shape", "ds_id",
    "ds_opt_adam", "__compatible_ops__", "background_thread_status", "logit_processor", "hf_quantizer",
}  # fmt: skip
"""Attributes without an underscore that are private all the same."""


@cache
def trees() -> dict[str, ast.Module]:
    return {
        str(path.relative_to(ROOT)): ast.parse(path.read_text(encoding="utf-8"))
        for path in sorted(Path(ROOT, "raysft").rglob("*.py"))
    }


def is_private(name: str) -> bool:
    return name in ATTRIBUTES or (name.startswith("_") and not name.startswith("__") and name.strip("_") != "")


def own_names(modules: dict[str, ast.Module]) -> set[str]:
    """Private names that raysft itself defines."""
    names = set()
    for node in (node for tree in modules.values() for node in ast.walk(tree)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            names.add(node.name)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            names.add(node.id)
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store) and ast.unparse(node.value) == "self":
            names.add(node.attr)
    return names - ATTRIBUTES


def private_uses(tree: ast.Module, own: set[str]) -> Iterator[tuple[int, str]]:
    """(line, name) of what a module uses of others' private parts."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and is_private(node.attr) and node.attr not in own:
            yield node.lineno, node.attr
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            if node.func.id in ("getattr", "setattr", "hasattr", "delattr") and isinstance(node.args[1], ast.Constant):
                name = node.args[1].value
                if is_private(name) and name not in own:
                    yield node.lineno, name
        elif isinstance(node, ast.Dict):
            for key in node.keys:
                if isinstance(key, ast.Constant) and isinstance(key.value, str) and is_private(key.value):
                    yield node.lineno, key.value
        elif isinstance(node, ast.Import | ast.ImportFrom):
            module = node.module or "" if isinstance(node, ast.ImportFrom) else ""
            names = [alias.name for alias in node.names]
            if module.split(".")[0] in ("raysft", "__future__"):
                continue
            path = [part for name in (module, *names) for part in name.split(".")]
            for name in path:
                if is_private(name):
                    yield node.lineno, name
            for package in PACKAGES:
                if "." in package and any(f"{module}.{name}".startswith(package) for name in names):
                    yield node.lineno, package


def test_private_parts_of_other_libraries_are_used_behind_contracts_alone():
    modules = trees()
    own = own_names(modules)
    found = [
        f"{path}:{line}: {name} is private to another library; move it to that library's module (see USES), and "
        "cover it in tests/contracts"
        for path, tree in modules.items()
        if path not in USES
        for line, name in private_uses(tree, own)
        if (path, name) not in ALLOWED
    ]
    assert not found, "\n".join(found)


@pytest.mark.parametrize("path", USES)
def test_every_module_of_private_uses_has_a_contract(path):
    contract = Path(ROOT, "tests/contracts", USES[path])
    assert path in contract.read_text(encoding="utf-8")


def test_what_is_allowed_is_used():
    modules = trees()
    own = own_names(modules)
    for path, name in ALLOWED:
        assert name in {used for _, used in private_uses(modules[path], own)}, (
            f"{path} no longer uses {name}: remove it"
        )


@pytest.mark.parametrize(
    ("code", "name"),
    [
        ("from ray.train.v2._internal import context", "_internal"),
        ("import ray._private.services", "_private"),
        ("from ray.core.generated.gcs_service_pb2 import CheckAliveRequest", "ray.core.generated"),
        ("from transformers.utils.chat_template_utils import _compile_jinja_template", "_compile_jinja_template"),
        ("model._supports_sdpa", "_supports_sdpa"),
        ("getattr(module, '_can_record_outputs', None)", "_can_record_outputs"),
        ("for group in optimizer.bit16_groups: pass", "bit16_groups"),
        ("scheduler.load_state_dict({'_step_count': 1})", "_step_count"),
    ],
)
def test_a_private_use_is_found(code, name):
    assert name in {used for _, used in private_uses(ast.parse(code), own=set())}


@pytest.mark.parametrize(
    "code", ["self._own", "from raysft.data import _own", "x.__class__", "{'_own': 1}['a']", "f(_)"]
)
def test_what_is_ours_or_public_is_not(code):
    assert not [used for _, used in private_uses(ast.parse(code), own={"_own"}) if used != "_own"]
