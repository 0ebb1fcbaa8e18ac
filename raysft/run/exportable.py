"""What ``raysft export`` can export: the trained model of a run, the model of one of its checkpoints, or any other model."""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from raysft.config import Config, parse
from raysft.config.section import known_scheme
from raysft.errors import RequestError
from raysft.models.adapter_files import adapter_base, named_base
from raysft.storage.cache_home import cache_home
from raysft.storage.local_cache import local_copy, may_be_on_hub, model_copy, on_hub
from raysft.storage.path import StoragePath
from raysft.storage.retry import FIRST_SECONDS, retry_for
from raysft.storage.run_directory import MODEL_MARKS, RunDirectory
from raysft.train.checkpoint import catalog
from raysft.train.checkpoint.resume import ResumePoint

if TYPE_CHECKING:
    from raysft.run.inputs import ModelFiles

Notify = Callable[[str], None]
ELSEWHERE = ("package:", "ms://")
"""Prefixes of model locations that are neither paths nor in an object store."""


@dataclass(frozen=True)
class Exportable:
    """A model or adapter that can be exported."""

    name: str
    """As messages name it."""
    version: str
    """Differs if the content has changed."""
    model: str = ""
    """Location of its folder; empty for a checkpoint."""
    run: StoragePath | None = None
    """The run directory to which it belongs."""
    config: Config | None = None
    """Config of the run; None if it is from another version, whose model can still be exported."""
    checkpoint: ResumePoint | None = None

    @property
    def dtype(self) -> str | None:
        """Data type of the weights in training; None if unknown."""
        return self.config.weight_dtype if self.config is not None else None

    @property
    def runs_code(self) -> bool:
        """True if code that comes with the model may run."""
        return self.config is not None and self.config.model.runs_code

    @property
    def is_adapter(self) -> bool:
        """True for an adapter without its base."""
        if self.checkpoint is not None:
            return self.config is not None and self.config.model.adapter is not None
        return (Path(local_copy(self.model)) / "adapter_config.json").exists()

    @property
    def caches(self) -> tuple[StoragePath, ...]:
        """Folders of models that raysft made and can make again, and that nobody else has."""
        known = [self.config, self.moved_config] if self.config is not None else []
        return (*(config.cache_directory / "models" for config in known if config), _cache() / "models")

    @property
    def made_in(self) -> StoragePath:
        """The cache for models that raysft makes to export this one."""
        return self.caches[0].parent

    @property
    def moved_config(self) -> Config | None:
        """The run's config with the run's current location: it may have been moved, or be named from elsewhere."""
        if self.config is None or self.run is None:
            return None
        section = self.config.run.model_copy(update={"storage": self.run.parent.location})
        return self.config.model_copy(update={"run": section})

    def folder(self, scratch: Path, notify: Notify) -> Path:
        """Return a local folder with the model or adapter; that of a checkpoint is written into ``scratch``."""
        if self.checkpoint is None:
            return model_copy(self.model)
        _restore(self, self.checkpoint, scratch, notify)
        return scratch

    def base(self, notify: Notify, with_code: bool) -> Path | None:
        """Return the base of an adapter if it is not where the adapter says, or differs from it; None otherwise.

        A copy in the cache, such as one with new tokens, is made again. One in FP8 or MXFP4 is dequantized, to merge into it.

        Args:
            notify: receives a line for the user before something that takes long.
            with_code: code that comes with the base may run.
        """
        from raysft.models.dequantized import exact_copy

        if self.checkpoint is not None or not self.is_adapter:
            return None
        folder = Path(local_copy(self.model))
        named = named_base(folder)
        if not named:
            return None
        if may_be_on_hub(named) or named.startswith(ELSEWHERE) or StoragePath.of(named).exists():
            location = named if on_hub(named) else str(adapter_base(folder))
            exact = exact_copy(self.made_in, location, notify, with_code)
            return model_copy(exact) if exact != location else None
        if self.config is None:
            return None
        files = _model_files(self, notify)
        if (
            StoragePath.of(named).parent in self.caches
            and StoragePath.of(files.model).name != StoragePath.of(named).name
        ):
            raise RequestError(
                f"{self.name}: the model that it was trained from, or its tokenizer, has changed ({files.model}); restore its "
                f"files, or merge into a model that has the same weights (raysft export MODEL --adapters {self.name})"
            )
        return model_copy(files.model)


def find_exportable(source: str, notify: Notify, option: str = "MODEL") -> Exportable:
    """Find out what a path, URI or Hub id refers to.

    Args:
        source: the path, URI or Hub id.
        notify: receives a line for the user before something that takes long.
        option: the argument that gives it, for messages.

    Raises:
        RequestError: nothing there can be exported.
    """
    place = None if source.startswith(ELSEWHERE) else _place(source)
    if place is None:
        return _model(source, notify, option)
    if _is_run(place):
        return _of_run(place)
    if place.name == "model" and _is_run(place.parent):
        return _of_run(place.parent)
    if place.name == "checkpoints" and _is_run(place.parent):
        raise RequestError(f"{source}: is a folder of checkpoints; give one of them: {source}/N ({_known(place)})")
    if place.parent.name == "checkpoints" and _is_run(place.parent.parent):
        return _of_checkpoint(place)
    if place.local and place.local.is_dir() and not any((place.local / mark).exists() for mark in MODEL_MARKS):
        raise RequestError(
            f"{source}: contains neither a run's config.yaml nor a model's {' or '.join(MODEL_MARKS)}; give a run directory, "
            "RUN_DIR/checkpoints/N, or a model"
        )
    if place.local and not place.local.exists() and not may_be_on_hub(source) and not source.endswith(".gguf"):
        raise RequestError(f"{source}: no such run directory or model; check the path")
    return _model(source, notify, option)


def find_adapter(source: str, notify: Notify) -> Exportable:
    """Find an adapter for ``--adapters``: a folder, a URI, a Hub id, a run that trained one, or one of its checkpoints."""
    found = find_exportable(source, notify, "--adapters")
    if not found.is_adapter:
        raise RequestError(f"--adapters {source}: is a whole model, not an adapter; give adapters")
    return found


def _place(source: str) -> StoragePath:
    try:
        return StoragePath.of(known_scheme(source))
    except ValueError as error:
        raise RequestError(f"{source}: {error}") from None


def _is_run(place: StoragePath) -> bool:
    with retry_for(FIRST_SECONDS):  # other programs put their own config.yaml next to a model
        return (place / "config.yaml").exists() and not any((place / mark).exists() for mark in MODEL_MARKS)


def _cache() -> StoragePath:
    """Where a GGUF file that belongs to no run is converted."""
    return StoragePath.of(cache_home())


def _model(source: str, notify: Notify, option: str) -> Exportable:
    from raysft.models.fingerprint import exact_fingerprint
    from raysft.models.resolve import find_model

    location = find_model(source, _cache(), notify, option, accept_adapter=True)
    return Exportable(source, exact_fingerprint(location), location)


def _of_run(place: StoragePath) -> Exportable:
    directory = RunDirectory.of(place)
    if not directory.is_trained():
        newest = catalog.newest(directory.checkpoints)
        remedy = f", or use its newest checkpoint, {_address(newest)}" if newest else ""
        raise RequestError(f"{directory.model}: contains no trained model; train first (raysft train CONFIG){remedy}")
    # Sizes and times of the files show whether the run has trained in the meantime.
    return Exportable(str(place), str(directory.model.walk()), directory.model.location, place, _config(place))


def _of_checkpoint(place: StoragePath) -> Exportable:
    """Find a checkpoint by its step, or by the name of its folder."""
    checkpoints, wanted = place.parent, place.name
    step = int(wanted) if wanted.isdigit() else None
    with retry_for(FIRST_SECONDS):
        complete = [ResumePoint.of(folder) for folder in catalog.complete(checkpoints)]
    found = next((each for each in complete if wanted == each.path.name or step == each.cursor.step), None)
    if found is None:
        if any(name == wanted or _step_of(name) == step is not None for name in checkpoints.entries()):
            other = f"; export the newest complete one, {_address(complete[0])}" if complete else ""
            raise RequestError(f"{place}: is incomplete or damaged{other or ', and the run has no other one'}")
        raise RequestError(f"{place}: no such checkpoint; {_known(checkpoints)}")
    config = _config(checkpoints.parent)
    if config is None:
        raise RequestError(
            f"{checkpoints.parent / 'config.yaml'}: is not a config of this raysft version, so its checkpoints cannot be read; "
            "export with the version that trained the run"
        )
    name = f"{checkpoints.parent} after step {found.cursor.step}"
    return Exportable(name, str(found.path.walk()), "", checkpoints.parent, config, found)


def _known(checkpoints: StoragePath) -> str:
    steps = sorted({ResumePoint.of(folder).cursor.step for folder in catalog.complete(checkpoints)})
    return f"there are {', '.join(map(str, steps))}" if steps else "the run has no complete checkpoint"


def _step_of(name: str) -> int | None:
    step = name.removeprefix("checkpoint_").split("_")[0]
    return int(step) if step.isdigit() else None


def _address(checkpoint: ResumePoint) -> str:
    return f"{checkpoint.path.parent}/{checkpoint.cursor.step}"


def _config(place: StoragePath) -> Config | None:
    try:
        return parse(yaml.safe_load((place / "config.yaml").read_text()))
    except (RequestError, TypeError, ValueError, yaml.YAMLError):
        return None


def _restore(source: Exportable, checkpoint: ResumePoint, folder: Path, notify: Notify) -> None:
    from raysft.train.restore import write_model

    try:
        write_model(_job(source, checkpoint, notify), checkpoint, folder)
    except (catalog.CorruptCheckpoint, FileNotFoundError) as error:
        complete = [ResumePoint.of(path) for path in catalog.complete(checkpoint.path.parent)]
        other = next((each for each in complete if each.path != checkpoint.path), None)
        remedy = f"export {_address(other)}, the newest other one" if other else "the run has no other one"
        if checkpoint.path not in [each.path for each in complete]:
            message = f"{checkpoint.path}: its run deleted it during the export, because it keeps only the newest ones"
            raise RequestError(f"{message}; {remedy}") from None
        if isinstance(error, FileNotFoundError):
            raise
        raise RequestError(f"{error}; {remedy}") from None


def _job(source: Exportable, checkpoint: ResumePoint, notify: Notify) -> Any:
    """Return the training job that a run's workers got, as far as its model needs it."""
    from raysft.models.fingerprint import model_fingerprint
    from raysft.models.tokenizer import load_tokenizer
    from raysft.train.job import TrainJob

    assert source.run is not None
    files, config = _model_files(source, notify), _config_for_reading(source)
    identity = checkpoint.cursor.identity
    for name, now in (("the model", files.model), ("the adapter", files.adapter)):
        if now and identity.get(name, model_fingerprint(now)) != model_fingerprint(now):
            raise RequestError(f"{source.name}: {name} that it was trained from has changed ({now}); restore its files")
    ends = _ends(_plan(source), load_tokenizer(files.model, config.model.runs_code)) if config.stage == "sft" else ()
    run = RunDirectory.of(source.run)
    return TrainJob(config, files.model, run, None, {}, files.adapter, identity=identity, ends=ends)


def _model_files(source: Exportable, notify: Notify) -> ModelFiles:
    """Find the model that a run started from, and the adapter that it continued."""
    from raysft.run.inputs import check_model_files

    commit = _plan(source).get("resolved", {}).get("model_commit")
    return check_model_files(_config_for_reading(source), notify, commit)


def _config_for_reading(source: Exportable) -> Config:
    from raysft.train.restore import for_reading

    assert source.moved_config is not None
    return for_reading(source.moved_config)


def _plan(source: Exportable) -> dict[str, Any]:
    assert source.run is not None
    with suppress(OSError, ValueError):
        return json.loads((source.run / "plan.json").read_text())
    return {}


def _ends(plan: dict[str, Any], tokenizer: Any) -> tuple[int, ...]:
    """Return the tokens that end an assistant turn, as the run's plan has counted them."""
    turns = plan.get("turns") or {}
    counts: dict[str, int] = {
        text: count for text, count in (turns.get("end_tokens") or {}).items() if text not in turns["inner_end_tokens"]
    }
    ids = {tokenizer.convert_tokens_to_ids(text): count for text, count in counts.items()}
    return tuple(sorted(ids, key=lambda token: (-ids[token], token)))
