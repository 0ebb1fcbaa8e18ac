"""What determines the last bits of a worker's numbers besides model, data and settings: processor, libraries, code and threads."""

from __future__ import annotations

import os
import platform
from pathlib import Path
from typing import Any

import torch

from raysft.train.imported_code import imported_code

PROCESSOR = Path("/proc/cpuinfo")
DRIVER = Path("/proc/driver/nvidia/version")
VOLATILE = (
    "processor",
    "microcode",
    "cpu MHz",
    "bogomips",
    "BogoMIPS",
    "core id",
    "apicid",
    "initial apicid",
    "physical id",
)
"""Lines of ``/proc/cpuinfo`` that differ between processors that compute alike, or over time."""
VARIABLES = ("ATEN_", "CUBLAS", "CUDNN", "DISABLE_ADDMM", "DNNL_", "GOMP_", "KMP_", "MKL_", "NCCL_", "NVIDIA_TF32", "OMP_",
             "ONEDNN_", "PYTORCH_", "TORCH_")  # fmt: skip
"""Prefixes of environment variables that make libraries compute differently."""


def describe_machine(device: torch.device) -> dict[str, Any] | None:
    """Describe all of this; two workers with equal descriptions compute the same results from the same inputs.

    Returns:
        The description, which JSON can hold; None if it is unknown which code this process runs.

    Raises:
        OSError: a folder of ``sys.path`` cannot be read.
    """
    code = imported_code()
    if code is None:
        return None
    return {
        "processor": processor(),
        "gpu": _gpu(device) if device.type == "cuda" else None,
        "torch": [torch.__config__.show(), torch.__config__.parallel_info(), torch.get_num_threads()],
        "modes": [torch.get_float32_matmul_precision(), torch.are_deterministic_algorithms_enabled()],
        "python": platform.python_version(),
        "packages": code.packages,
        "raysft": code.raysft,
        "variables": {name: value for name, value in sorted(os.environ.items()) if name.startswith(VARIABLES)},
    }


def processor(cpuinfo: Path = PROCESSOR) -> str:
    """Return the kind of the first processor, with its features and caches."""
    first, _, _ = _read(cpuinfo).partition("\n\n")
    lines = [line for line in first.splitlines() if line.partition(":")[0].strip() not in VOLATILE]
    return "\n".join([platform.machine(), *lines])


def _gpu(device: torch.device) -> list[Any]:
    known = torch.cuda.get_device_properties(device)
    kind = [known.name, known.major, known.minor, known.multi_processor_count, known.total_memory]
    return [*kind, torch.backends.cudnn.version(), _read(DRIVER)]


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
