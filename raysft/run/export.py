"""Export the trained model of a run: into a folder, to a repository of the Hugging Face hub, or both."""

from __future__ import annotations

import json
import shutil
import signal
import tempfile
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import yaml

from raysft.config import Config, parse
from raysft.errors import RequestError, RunFailed, one_line
from raysft.storage import hub_upload
from raysft.storage.json_files import write_atomically
from raysft.storage.local_cache import local_copy, may_be_on_hub
from raysft.storage.path import StoragePath
from raysft.storage.retry import FIRST_SECONDS, retry_for
from raysft.storage.run_directory import RunDirectory
from raysft.storage.sync import open_read_only
from raysft.telemetry.terminal import Terminal

UNPUSHED = ".unpushed"
"""A hidden file in an exported folder that is still to be pushed; it names the model, with which the same command goes on."""
PLOT = "training_loss.png"


@dataclass(frozen=True)
class Push:
    """What is asked of the hub."""

    name: str
    """``ORG/NAME``, or ``NAME`` of one's own account."""
    private: bool = False
    """Create a private repository."""


def export(place: StoragePath, output: Path | None, push: Push | None = None, adapter: bool = False) -> None:
    """Write the trained model of a run directory as one Hugging Face model, adapters merged.

    Args:
        place: the run directory.
        output: folder for the model; new or empty, or left by a push that was interrupted.
        push: where to upload it. Without ``output`` it is written to a temporary folder for that.
        adapter: write the trained adapter as it is instead.
    """
    directory = _trained(place)
    config = _config(place)
    if adapter:
        _check_adapter(directory, config)
    with _sigterm_interrupts(), ExitStack() as stack:
        # Sizes and times of the files say whether the run has trained meanwhile.
        model = f"{place} {directory.model.walk()} {adapter} {push.name}" if push else None
        written = output is not None and _holds(output, model)
        name = hub_upload.open_repository(push.name, push.private) if push else ""
        folder = (
            _created(output)
            if output
            else Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="raysft-export-")))
        )
        if not written:
            trusted = config is not None and config.model.runs_code
            with _written(folder, output is None):
                _write(directory, folder, trusted, adapter)
                if push:
                    message = _describe(place, folder, name, adapter)
                    write_atomically(folder / UNPUSHED, json.dumps({"model": model, "message": message}))
        if output is not None:
            Terminal().line(f"exported: {output}")
        if push:
            _push(folder, name)


@contextmanager
def _sigterm_interrupts() -> Iterator[None]:
    """Handle SIGTERM like Ctrl-C in the block: a batch system that ends the job must not leave half a model, or a temporary one."""
    handles = (
        threading.current_thread() is threading.main_thread() and signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    )
    if handles:
        signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        if handles:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)


def _trained(place: StoragePath) -> RunDirectory:
    with retry_for(FIRST_SECONDS):
        is_run = (place / "config.yaml").exists()
    if not is_run:
        raise RequestError(f"{place}: holds no config.yaml; give a run directory, {{run.storage}}/{{run.name}}")
    directory = RunDirectory.of(place)
    if not directory.is_trained():
        raise RequestError(f"{directory.model}: holds no trained model; train first (raysft train CONFIG)")
    return directory


def _config(place: StoragePath) -> Config | None:
    """Return the run's config; None for one of another version, whose model can be exported all the same."""
    try:
        return parse(yaml.safe_load((place / "config.yaml").read_text()))
    except (RequestError, TypeError, ValueError, yaml.YAMLError):
        return None


def _check_adapter(directory: RunDirectory, config: Config | None) -> None:
    """Refuse to export an adapter that nobody could load elsewhere, or none."""
    description = directory.model / "adapter_config.json"
    if not description.exists():
        raise RequestError(f"--adapter: {directory.model} is a whole model and no adapter; remove --adapter")
    base = str(json.loads(description.read_text()).get("base_model_name_or_path"))
    if may_be_on_hub(base):
        return
    if config is not None and StoragePath.of(base).parent == config.cache_directory / "models":
        raise RequestError(
            f"--adapter: the adapter's base is a copy in the cache, {base}, which is nowhere else; remove --adapter"
        )
    Terminal().line(f"the adapter names {base} as its base: whoever loads it needs the model there")


def _holds(output: Path, unpushed: str | None) -> bool:
    """Return True if the folder holds the whole model already, from a push that did not come to its end."""
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        with suppress(OSError, ValueError, KeyError, TypeError):
            if unpushed and json.loads((output / UNPUSHED).read_text(encoding="utf-8"))["model"] == unpushed:
                return True
        raise RequestError(f"--output {output}: is not an empty folder; choose another")
    return False


def _created(output: Path) -> Path:
    try:
        output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RequestError(f"--output {output}: cannot be created ({error.strerror}); choose another folder") from None
    return output


@contextmanager
def _written(folder: Path, temporary: bool) -> Iterator[None]:
    """Remove what the block has written of a model if it fails: the same command must be able to run again."""
    from safetensors import SafetensorError

    try:
        yield
    except BaseException as error:
        shutil.rmtree(folder, ignore_errors=True)
        if isinstance(error, SafetensorError):  # a full disk, as that library reports it
            remedy = "set TMPDIR to a folder with more space, or use --output" if temporary else "free some space"
            raise RunFailed(
                f"{folder}: the model cannot be written ({one_line(error)}); {remedy}, then run the same command again"
            ) from error
        raise


def _write(directory: RunDirectory, folder: Path, trusted: bool, adapter: bool) -> None:
    from raysft.models.adapters import merge

    trained = Path(local_copy(directory.model.location))
    if adapter:
        shutil.copytree(trained, folder, dirs_exist_ok=True)
    else:
        merge(trained, folder, trusted)


def _describe(place: StoragePath, folder: Path, name: str, adapter: bool) -> str:
    """Write the model card for the hub into the folder, and return the title of the commit."""
    from raysft.report.card import Published, model_card
    from raysft.report.read_run import read_run

    with open_read_only(place, Terminal().line) as directory:
        log = read_run(directory)
        plots = [plot for plot in [directory.path / PLOT] if plot.is_file()]
        for plot in plots:
            shutil.copyfile(plot, folder / plot.name)
        write_atomically(folder / "README.md", model_card(log, plots, Published(name, adapter)))
    step = log.trained.get("best_step") if log.option("train.keep_best") else None
    step = step or (log.steps[-1]["current_steps"] if log.steps else None)
    what = f"{log.adapter} adapter" if adapter else "model"
    return f"raysft: the {what} of run {log.name}" + (f" after step {step}" if step else "")


def _push(folder: Path, name: str) -> None:
    unpushed = folder / UNPUSHED
    message = json.loads(unpushed.read_text(encoding="utf-8"))["message"]
    size = sum(path.stat().st_size for path in hub_upload.files_to_push(folder).values())
    Terminal().line(f"pushing {size / 2**20:,.1f} MiB to {name}")
    address = hub_upload.push(name, folder, message, Terminal().line)
    unpushed.unlink()
    Terminal().line(f"pushed: {address}")
