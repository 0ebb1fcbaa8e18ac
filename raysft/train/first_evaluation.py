"""The evaluation before the first step. It is cached: later runs and the trials of a sweep often start with the same model.

It is cached for each set under a hash of everything that may change its last bit: model, rows, settings and the workers'
machines. So a number taken from the cache is the one that this run would compute.
"""

from __future__ import annotations

import hashlib
import json
import math
import socket
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from raysft.errors import StorageFailed
from raysft.models.fingerprint import exact_fingerprint
from raysft.storage.path import StoragePath
from raysft.storage.retry import reason_of, retry_for
from raysft.telemetry.results import Evaluation
from raysft.train.deepspeed_config import given_settings
from raysft.train.job import TrainJob
from raysft.train.machine import describe_machine

FAILURES = (OSError, ValueError, TypeError, KeyError, StorageFailed)
"""What a missing or damaged file, or failing storage, may raise."""


@dataclass(frozen=True)
class FirstEvaluation:
    """What the cache has of the evaluation that is due, the same for all workers, and where to store the rest."""

    known: dict[str, Evaluation]
    """Evaluation set → its evaluation, from the cache."""
    files: dict[str, StoragePath]
    """Evaluation set → its file in the cache; empty on all workers but the first, and if nothing is to be stored."""

    @classmethod
    def find(cls, job: TrainJob, device: torch.device) -> FirstEvaluation:
        """Look the evaluation up; a collective, after which all workers know the same.

        Args:
            job: the training.
            device: where this worker computes.
        """
        if job.evaluations is None or not job.eval_rows or job.config.model.runs_code:  # such code may do anything
            return cls({}, {})
        workers: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(workers, _worker(device))
        if None in workers:
            return cls({}, {})
        files: dict[str, StoragePath] = {}
        found: list[Any] = [{}]
        if dist.get_rank() == 0:
            files = _files(job, job.evaluations, workers)
            found = [{name: evaluation for name, file in files.items() if (evaluation := _read(name, file))}]
        dist.broadcast_object_list(found, src=0)
        return cls(found[0], files)

    def keep(self, evaluations: Sequence[Evaluation]) -> str:
        """Write those that the cache lacks; failing to do so does not end the run.

        Returns:
            A note for the log; empty if all were computed and kept.
        """
        try:
            for evaluation in evaluations:
                if evaluation.name in self.files and evaluation.name not in self.known:
                    _write(evaluation, self.files[evaluation.name])
        except FAILURES as error:
            return f"not kept in the cache ({reason_of(error)})"
        if len(self.known) < len(evaluations):
            return f"{', '.join(self.known)} from the cache" if self.known else ""
        return "from the cache"


def _worker(device: torch.device) -> tuple[str, str] | None:
    """Describe this worker: its host, and a hash of its machine and code.

    None if they are unknown. No failure may end this worker: the others would wait for it.
    """
    try:
        machine = describe_machine(device)
        if machine is None:
            return None
        return socket.gethostname(), _hash(machine)
    except Exception:
        return None


def _files(job: TrainJob, folder: StoragePath, workers: Sequence[tuple[str, str]]) -> dict[str, StoragePath]:
    """Name the file of each set; none if the content of the model is unknown.

    Args:
        job: the training.
        folder: folder of the files.
        workers: host, and hash of the machine, of each worker.
    """
    try:
        hosts = list(dict.fromkeys(host for host, _ in workers))
        shared = {
            "model": exact_fingerprint(job.model),
            "adapter": job.adapter and exact_fingerprint(job.adapter),
            "settings": job.config.evaluation_keys(),
            "deepspeed": given_settings(job.config),
            # The order of summation depends on which workers share a host.
            "workers": [(hosts.index(host), machine) for host, machine in workers],
        }
        return {
            name: folder / f"{name}-{_hash({**shared, 'rows': rows.content()})}.json"
            for name, rows in job.eval_rows.items()
        }
    except FAILURES:
        return {}


def _read(name: str, file: StoragePath) -> Evaluation | None:
    """Read an evaluation; None if there is none, or a damaged one."""
    try:
        with retry_for(0):
            stored = json.loads(file.read_text())
        values = stored["evaluation"]
        if stored["hash"] != _hash(values):
            return None
        return Evaluation(name, 0, float(values["loss"]), float(values["accuracy"]), int(values["tokens"]))
    except FAILURES:
        return None


def _write(evaluation: Evaluation, file: StoragePath) -> None:
    if not math.isfinite(evaluation.loss):  # perhaps because of a machine fault
        return
    values = {"loss": evaluation.loss, "accuracy": evaluation.accuracy, "tokens": evaluation.tokens}
    with retry_for(0):
        file.write_text(json.dumps({"evaluation": values, "hash": _hash(values)}) + "\n")


def _hash(value: Any) -> str:
    """Hash what JSON can hold; its numbers are read back exactly as written, to the last bit."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:32]
