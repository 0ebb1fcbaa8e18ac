"""The trained model, as transformers and peft load it."""

from __future__ import annotations

import json
import shutil
import tempfile
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors import SafetensorError

from raysft.errors import RunFailed, StorageFailed
from raysft.storage.local_cache import local_copy
from raysft.storage.path import StoragePath
from raysft.storage.retry import reason_of, retry_for
from raysft.storage.run_directory import MODEL_MARKS, RunDirectory, is_whole
from raysft.telemetry.events import Emit, Waiting
from raysft.train.checkpoint.cursor import Best

Weights = dict[str, torch.Tensor]


class Exporter:
    """Writes the model of a run, and meanwhile the best one so far. All workers call it, the first one writes.

    Args:
        run: where to.
        emit: takes events for people.
        ends: tokens that end the turns that are trained on.
    """

    def __init__(self, run: RunDirectory, emit: Emit, ends: Sequence[int] = ()) -> None:
        self._run, self._emit, self._ends = run, emit, ends
        self._best: tuple[int, Path] | None = None
        """The best model on this node and its step, while it is on its way to an object store."""
        self._sending: threading.Thread | None = None
        self._lock = threading.Lock()

    def known(self, best: Best | None) -> Best | None:
        """The best model that a checkpoint tells of; None where it did not come to the object store before its machine died, or
        where a later one took its place before the training went on from that checkpoint.

        All workers come to the same end.
        """
        if best is None:
            return None
        kept = [True]
        if dist.get_rank() == 0:
            # It may be the trained model already, if what came after that did not come to its end.
            trained = self._run.is_trained() and not self._run.best.entries()
            kept = [is_whole(self._there(best.step)) or trained]
            if not kept[0]:
                self._emit(
                    Waiting(
                        f"{self._run.best}: the best model, after step {best.step}, is missing; starting the search over"
                    )
                )
        dist.broadcast_object_list(kept, src=0)
        return best if kept[0] else None

    def keep_best(self, step: int, model: Any, tokenizer: Any) -> None:
        """Write the model as it is now as the best so far; the training does not wait for an object store.

        Raises:
            RunFailed: it cannot be written; on all workers alike, or the others would wait for the first one.
        """
        failure: list[RunFailed | None] = [None]
        weights = gather(model)
        if weights is not None:
            try:
                with _told():
                    self._keep_best(step, model, weights, tokenizer)
            except RunFailed as error:
                failure = [error]
        dist.broadcast_object_list(failure, src=0)
        if failure[0] is not None:
            raise failure[0]

    def _keep_best(self, step: int, model: Any, weights: Weights, tokenizer: Any) -> None:
        if self._run.best.local:
            export(model, weights, tokenizer, self._there(step), self._ends)
            return self._leave_only(step)
        draft = Path(tempfile.mkdtemp(prefix="raysft-best-"))
        save(model, weights, tokenizer, draft, self._ends)
        with self._lock:
            if self._sending is None:
                self._forget()
                self._sending = threading.Thread(target=self._send_best, name="best model", daemon=True)
                self._sending.start()
            self._best = step, draft  # else it is the next to be sent
        return None

    def write(self, model: Any, tokenizer: Any) -> None:
        """Write the model as it is now as the trained one.

        Raises:
            RunFailed: it cannot be written.
        """
        weights = gather(model)
        if weights is not None:
            with _told(), self._patience():
                export(model, weights, tokenizer, self._run.model, self._ends)
                self._run.best.remove()  # where the best one was kept until the config changed
        self._forget()

    def write_best(self, step: int) -> None:
        """Make the best model, after so many steps, the trained one.

        Raises:
            RunFailed: it cannot be written.
        """
        if dist.get_rank() != 0:
            return
        there, model = self._there(step), self._run.model
        with _told(), self._patience():
            self._wait()
            if there.local and model.local:
                put_in_place(there.local, model.local)
            elif self._best is not None:
                send(self._best[1], model)
            elif is_whole(there):  # else it was put there before
                send(Path(local_copy(there.location)), model)
            self._run.best.remove()
        self._forget()

    def _send_best(self) -> None:
        """Send the best model, and those that were better meanwhile."""
        sent: tuple[int, Path] | None = None
        while True:
            with self._lock:
                if sent and sent != self._best:
                    shutil.rmtree(sent[1], ignore_errors=True)
                if sent == self._best or self._best is None:
                    self._sending = None
                    return
                sent = self._best
            try:
                with self._patience():
                    send(sent[1], self._there(sent[0]))
                    self._leave_only(sent[0])
            except (StorageFailed, OSError) as error:
                self._emit(Waiting(f"the best model stays on this node until the end of the training: {error}"))

    def _there(self, step: int) -> StoragePath:
        """Where the model after so many steps is kept: a checkpoint may tell of one that is not there, and another one must not be
        taken for it."""
        return self._run.best / str(step)

    def _leave_only(self, step: int) -> None:
        for name in self._run.best.entries():
            if name != str(step):
                (self._run.best / name).remove()

    def _wait(self) -> None:
        sending = self._sending
        if sending is not None:
            sending.join()  # what it waits for is bounded

    def _forget(self) -> None:
        if self._best is not None:
            shutil.rmtree(self._best[1], ignore_errors=True)
            self._best = None

    def _patience(self) -> Any:
        return retry_for(notify=lambda line: self._emit(Waiting(line)))


@contextmanager
def _told() -> Iterator[None]:
    """A model that cannot be written ends the run, with one line."""
    try:
        yield
    except StorageFailed as error:
        raise RunFailed(f"the model cannot be written: {error}; the same command tries it again") from error
    except (OSError, SafetensorError) as error:  # of safetensors it may be a full disk's
        raise RunFailed(
            f"the model cannot be written ({reason_of(error)}); mend that, and the same command goes on"
        ) from error


def gather(model: Any) -> Weights | None:
    """The trained weights by their names, on the first worker; None on the others. All workers call it.

    It is the only part of an export that takes all of them: whatever the first one meets in writing, nobody waits for it here.
    """
    import deepspeed

    first, adapters_only = dist.get_rank() == 0, hasattr(model, "peft_config")
    weights: Weights = {}
    for name, parameter in model.named_parameters():
        if adapters_only and not parameter.requires_grad:
            continue
        # With ZeRO-3 each worker has a part of it; one parameter at a time is put together.
        with deepspeed.zero.GatheredParameters([parameter], enabled=hasattr(parameter, "ds_id")):
            if first:
                weights[name] = parameter.detach().cpu().clone()
    return weights if first else None


def export(model: Any, weights: Weights, tokenizer: Any, folder: StoragePath, ends: Sequence[int] = ()) -> None:
    """Write a model or adapter so that transformers or peft loads it.

    Args:
        model: the transformers or peft model inside the engine.
        weights: what ``gather`` made of it.
        tokenizer: goes beside it.
        folder: is replaced when all is written.
        ends: tokens that end the turns that it was trained on.
    """
    if folder.local:
        draft = folder.local.with_name(f".{folder.name}")
        shutil.rmtree(draft, ignore_errors=True)
        draft.parent.mkdir(parents=True, exist_ok=True)
        try:
            save(model, weights, tokenizer, draft, ends)
            put_in_place(draft, folder.local)
        except Exception:
            shutil.rmtree(draft, ignore_errors=True)  # on a full disk it holds what others need
            raise
        return
    with tempfile.TemporaryDirectory(prefix="raysft-model-") as scratch:
        save(model, weights, tokenizer, Path(scratch), ends)
        send(Path(scratch), folder)


def save(model: Any, weights: Weights, tokenizer: Any, folder: Path, ends: Sequence[int] = ()) -> None:
    """Write a model into a local folder."""
    if hasattr(model, "peft_config"):
        if begun_with := getattr(model, "begun_with", None):
            model.save_pretrained(folder, path_initial_model_for_weight_conversion=begun_with)
        else:
            model.save_pretrained(folder, state_dict=weights)
        if generation := getattr(model.get_base_model(), "generation_config", None):
            generation.to_json_file(folder / "generation_config.json")
    else:
        # What a model keeps beside its parameters: the routers of some mixtures of experts balance themselves so.
        kept = model.state_dict().keys()
        buffers = {name: buffer.cpu().clone() for name, buffer in model.named_buffers() if name in kept}
        model.config.use_cache = True
        model.save_pretrained(folder, state_dict=weights | buffers)
        model.config.use_cache = False
    _stop_at(ends, folder)
    (folder / "README.md").unlink(missing_ok=True)  # peft's empty form; the run directory holds a model card
    tokenizer.save_pretrained(folder)


def _stop_at(ends: Sequence[int], folder: Path) -> None:
    """Let generation with a model stop where its turns end, besides where it stopped before.

    In the file: transformers saves no generation config that was changed and that it finds fault with, as it does with some
    that were published.
    """
    path = folder / "generation_config.json"
    if not path.exists():
        return
    hf_config = json.loads(path.read_text(encoding="utf-8"))
    before = hf_config.get("eos_token_id")
    known = list(before) if isinstance(before, list) else [] if before is None else [before]
    if new := [token for token in ends if token not in known]:
        hf_config["eos_token_id"] = [*known, *new]
        hf_config.pop("_from_model_config", None)  # it would mean that config.json holds the same
        path.write_text(json.dumps(hf_config, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def put_in_place(draft: Path, folder: Path) -> None:
    """Let a folder that is whole take the place of another one; one that was put there before stays."""
    if folder.exists() and not draft.exists():
        return
    shutil.rmtree(folder, ignore_errors=True)
    draft.replace(folder)


def send(model: Path, place: StoragePath) -> None:
    """Put a model's files into an object store, its description last: one without that is not whole."""
    for mark in MODEL_MARKS:
        (place / mark).remove()
    place.upload(model, last=next(mark for mark in MODEL_MARKS if (model / mark).exists()))
