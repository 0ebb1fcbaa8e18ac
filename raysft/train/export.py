"""Export: the trained model, in the format that transformers and peft load."""

from __future__ import annotations

import shutil
import tempfile
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from raysft.errors import RunFailed, StorageFailed
from raysft.models.end_of_turn import write_ends
from raysft.models.peft_internals import TRAINED
from raysft.models.processor_files import save_tokenizer
from raysft.storage.local_cache import local_copy
from raysft.storage.path import StoragePath
from raysft.storage.permissions import let_others_read
from raysft.storage.retry import reason_of, retry_for
from raysft.storage.run_directory import MODEL_MARKS, RunDirectory, is_complete
from raysft.telemetry.events import Emit, Waiting
from raysft.train.checkpoint.cursor import Best
from raysft.train.deepspeed_internals import is_partitioned
from raysft.train.watched_write import Watch

Weights = dict[str, torch.Tensor]


class Exporter:
    """Writes a run's trained model and, during training, its best model so far. All workers call it; the first one writes.

    Args:
        run: the run directory.
        emit: receives ``Waiting``.
        ends: token ids that end an assistant turn.
    """

    def __init__(self, run: RunDirectory, emit: Emit, ends: Sequence[int] = ()) -> None:
        self._run, self._emit, self._ends = run, emit, ends
        self._best: tuple[int, Path] | None = None
        """Step and local folder of the best model while it is uploaded to an object store."""
        self._upload: threading.Thread | None = None
        self._lock = threading.Lock()

    def confirm_best(self, best: Best | None) -> Best | None:
        """Return a checkpoint's best evaluation if its model still exists, else None; the same on all workers.

        The model is missing if its machine died before the upload finished, or if a later best model replaced it before the
        training resumed from that checkpoint.
        """
        if best is None or best.value is None:
            return best
        exists = [True]
        if dist.get_rank() == 0:
            # It may have become the trained model already, if the process died before it wrote its results.
            promoted = self._run.is_trained() and not self._run.best.entries()
            exists = [is_complete(self._best_folder(best.step)) or promoted]
            if not exists[0]:
                self._emit(
                    Waiting(
                        f"{self._run.best}: the best model, after step {best.step}, is missing; it will be chosen among later "
                        "evaluations"
                    )
                )
        dist.broadcast_object_list(exists, src=0)
        return best if exists[0] else None

    def save_best(self, step: int, model: Any, tokenizer: Any) -> None:
        """Write the current model as the best so far. Training does not wait for an upload to an object store.

        Raises:
            RunFailed: it cannot be written; raised by all workers alike, or the others would wait for the first one.
        """
        if failure := _written(model, lambda weights: self._write_best(step, model, weights, tokenizer)):
            raise failure

    def save_snapshot(self, folder: StoragePath, model: Any, tokenizer: Any) -> RunFailed | None:
        """Write the current model elsewhere, without affecting the training; returns on all workers why that failed."""

        def write(weights: Weights) -> None:
            # peft reloads an adapter to convert PiSSA.
            with torch.random.fork_rng(devices=list({p.device for p in model.parameters() if p.is_cuda})):
                export(model, weights, tokenizer, folder, self._ends)

        return _written(model, write)

    def _write_best(self, step: int, model: Any, weights: Weights, tokenizer: Any) -> None:
        if self._run.best.local:
            export(model, weights, tokenizer, self._best_folder(step), self._ends)
            return self._remove_others(step)
        draft = Path(tempfile.mkdtemp(prefix="raysft-best-"))
        save(model, weights, tokenizer, draft, self._ends)
        with self._lock:
            if self._upload is None:
                self._discard_draft()
                self._upload = threading.Thread(target=self._upload_best, name="best model", daemon=True)
                self._upload.start()
            self._best = step, draft  # a running upload takes this one next
        return None

    def write(self, model: Any, tokenizer: Any, watch: Watch) -> None:
        """Write the current model as the trained one.

        Raises:
            RunFailed: it cannot be written; raised by the first worker.
        """
        weights = gather(model)

        def work() -> None:
            assert weights is not None
            with _write_errors(), self._retrying():
                export(model, weights, tokenizer, self._run.model, self._ends)
                self._run.best.remove()  # left over if the config asked for the best model before

        watch(work)
        self._discard_draft()

    def promote_best(self, step: int, watch: Watch) -> None:
        """Make the best model, from the given step, the trained one.

        Raises:
            RunFailed: it cannot be written; raised by the first worker.
        """
        best, model = self._best_folder(step), self._run.model

        def work() -> None:
            with _write_errors(), self._retrying():
                self._wait_for_upload()
                if best.local and model.local:
                    put_in_place(best.local, model.local)
                elif self._best is not None:
                    send(self._best[1], model)
                elif is_complete(best):  # otherwise it was promoted before
                    send(Path(local_copy(best.location)), model)
                self._run.best.remove()

        watch(work)
        self._discard_draft()

    def _upload_best(self) -> None:
        """Upload the best model, then any that became the best in the meantime."""
        sent: tuple[int, Path] | None = None
        while True:
            with self._lock:
                if sent and sent != self._best:
                    shutil.rmtree(sent[1], ignore_errors=True)
                if sent == self._best or self._best is None:
                    self._upload = None
                    return
                sent = self._best
            try:
                with self._retrying():
                    send(sent[1], self._best_folder(sent[0]))
                    self._remove_others(sent[0])
            except (StorageFailed, OSError) as error:
                self._emit(Waiting(f"the best model stays on this node until the end of training: {error}"))

    def _best_folder(self, step: int) -> StoragePath:
        """Folder of the best model from a step. Its name has the step, so that a checkpoint never takes another model for its
        best one."""
        return self._run.best / str(step)

    def _remove_others(self, step: int) -> None:
        for name in self._run.best.entries():
            if name != str(step):
                (self._run.best / name).remove()

    def _wait_for_upload(self) -> None:
        upload = self._upload
        if upload is not None:
            upload.join()  # its retries are bounded

    def _discard_draft(self) -> None:
        if self._best is not None:
            shutil.rmtree(self._best[1], ignore_errors=True)
            self._best = None

    def _retrying(self) -> Any:
        return retry_for(notify=lambda line: self._emit(Waiting(line)))


def _written(model: Any, write: Callable[[Weights], None]) -> RunFailed | None:
    """Gather the weights, and let the first worker write them; returns its failure on all workers."""
    failure: list[RunFailed | None] = [None]
    weights = gather(model)
    if weights is not None:
        try:
            with _write_errors():
                write(weights)
        except RunFailed as error:
            failure = [error]
    dist.broadcast_object_list(failure, src=0)
    return failure[0]


@contextmanager
def _write_errors() -> Iterator[None]:
    """Turn errors of writing the model into a one-line ``RunFailed``."""
    try:
        yield
    except StorageFailed as error:
        raise RunFailed(f"cannot write the model: {error}; run the same command to try again") from error
    except (OSError, SafetensorError) as error:  # safetensors reports a full disk as its own error type
        raise RunFailed(
            f"cannot write the model ({reason_of(error)}); fix that, then resume with the same command"
        ) from error


def gather(model: Any) -> Weights | None:
    """Collect the trained weights by name on the first worker; returns None on the others. All workers call it.

    This is the only collective of an export: if the first worker then fails to write, no other worker waits for it here.
    """
    import deepspeed

    first, adapters_only = dist.get_rank() == 0, hasattr(model, "peft_config")
    weights: Weights = {}
    for name, parameter in model.named_parameters():
        if adapters_only and not parameter.requires_grad:
            continue
        # ZeRO-3 partitions parameters over the workers; gather one at a time.
        with deepspeed.zero.GatheredParameters([parameter], enabled=is_partitioned(parameter)):
            if first:
                weights[name] = parameter.detach().cpu().clone()
    return weights if first else None


def export(model: Any, weights: Weights, tokenizer: Any, folder: StoragePath, ends: Sequence[int] = ()) -> None:
    """Write a model or adapter so that transformers or peft can load it.

    Args:
        model: the transformers or peft model inside the engine.
        weights: from ``gather``.
        tokenizer: saved with the model.
        folder: replaced once everything is written.
        ends: token ids that end an assistant turn.
    """
    if folder.local:
        draft = folder.local.with_name(f".{folder.name}")
        shutil.rmtree(draft, ignore_errors=True)
        draft.parent.mkdir(parents=True, exist_ok=True)
        try:
            save(model, weights, tokenizer, draft, ends)
            put_in_place(draft, folder.local)
        except Exception:
            shutil.rmtree(draft, ignore_errors=True)  # on a full disk, others need the space
            raise
        return
    with tempfile.TemporaryDirectory(prefix="raysft-model-") as scratch:
        save(model, weights, tokenizer, Path(scratch), ends)
        send(Path(scratch), folder)


def save(model: Any, weights: Weights, tokenizer: Any, folder: Path, ends: Sequence[int] = ()) -> None:
    """Write a model into a local folder."""
    if hasattr(model, "peft_config"):
        if pissa_start := getattr(model, "pissa_start", None):
            model.save_pretrained(
                folder, path_initial_model_for_weight_conversion=pissa_start, selected_adapters=[TRAINED]
            )
            _add_whole_modules(model, weights, folder)
        else:
            model.save_pretrained(folder, state_dict=weights, selected_adapters=[TRAINED])
        if generation := getattr(model.get_base_model(), "generation_config", None):
            generation.to_json_file(folder / "generation_config.json")
    else:
        # Some mixture-of-experts models keep their load-balancing state in persistent buffers.
        persistent = model.state_dict().keys()
        buffers = {name: buffer.cpu().clone() for name, buffer in model.named_buffers() if name in persistent}
        model.config.use_cache = True
        model.save_pretrained(folder, state_dict=weights | buffers)
        model.config.use_cache = False
    write_ends(folder, ends)
    (folder / "README.md").unlink(missing_ok=True)  # peft's empty template; the run directory has a model card
    save_tokenizer(tokenizer, folder)
    let_others_read(folder)


def _add_whole_modules(model: Any, weights: Weights, folder: Path) -> None:
    """Add the modules that are trained in full to a saved adapter; peft's conversion of PiSSA leaves them out."""
    from peft import get_peft_model_state_dict

    file = folder / "adapter_model.safetensors"
    saved, trained = load_file(file), get_peft_model_state_dict(model, state_dict=weights)
    if lacking := {name: weight for name, weight in trained.items() if name not in saved}:
        save_file(saved | lacking, file, metadata={"format": "pt"})


def put_in_place(draft: Path, folder: Path) -> None:
    """Replace a folder with a complete draft; if there is no draft, the folder was replaced before."""
    if folder.exists() and not draft.exists():
        return
    shutil.rmtree(folder, ignore_errors=True)
    draft.replace(folder)


def send(model: Path, target: StoragePath) -> None:
    """Upload a model's files, its description last: a model without it counts as incomplete."""
    for mark in MODEL_MARKS:
        (target / mark).remove()
    target.upload(model, last=next(mark for mark in MODEL_MARKS if (model / mark).exists()))
