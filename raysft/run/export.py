"""Export a model: into a folder, to a repository on the Hugging Face Hub, or both."""

from __future__ import annotations

import json
import shutil
import signal
import tempfile
import threading
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from raysft.errors import RequestError
from raysft.models.adapter_files import base_name, read_adapter_config
from raysft.models.model_files import other_files
from raysft.models.processor import has_processor
from raysft.report.plain_card import plain_card, public
from raysft.run.export_folder import UNPUSHED, check_outside, draft, holds
from raysft.run.exportable import Exportable, find_adapter, find_exportable
from raysft.run.modelfile import MODELFILE, write_modelfile
from raysft.storage import hub_upload
from raysft.storage.json_files import write_atomically, write_json
from raysft.storage.local_cache import may_be_on_hub, model_copy, on_hub
from raysft.storage.path import StoragePath
from raysft.storage.sync import open_read_only
from raysft.telemetry.terminal import Terminal

RESTORED = ".restored"
"""A hidden folder with the models of checkpoints, until they are merged or converted."""
PLOT = "training_loss.png"
NAMED_FILES = 5
"""Most files of a folder that a line names."""


@dataclass(frozen=True)
class Push:
    """What to push to the Hub."""

    name: str
    """``ORG/NAME``, or ``NAME`` in the user's own account."""
    private: bool = False
    """Create a private repository."""


@dataclass(frozen=True)
class Form:
    """How a model is written."""

    dtype: str | None = None
    """Data type of the weights. Default: that of the training run; for a model that no run trained, its own."""
    shard_size: str | None = None
    """Largest size of a file of weights, such as ``5GB``."""
    adapters: tuple[str, ...] = ()
    """Adapters for the model, to merge in order."""
    merges: bool = True
    """False to write the only adapter as it is, without its base."""
    runs_code: bool = False
    """True if code that comes with the model or an adapter may run; the config of the model's run may allow it too."""


def export(source: str, output: Path | None, push: Push | None = None, form: Form | None = None) -> None:
    """Write a model in Hugging Face's format, by default with all adapters merged.

    Args:
        source: a run directory, one of its checkpoints (``RUN_DIR/checkpoints/STEP``), or a model: a folder, URI, GGUF file or
            Hub id of a whole model or an adapter.
        output: folder for the model; new or empty, or left by a push that was interrupted.
        push: where to upload it. Without ``output`` it is first written to a temporary folder.
        form: how to write it.
    """
    form, say = form or Form(), Terminal().line
    with _sigterm_interrupts(), ExitStack() as stack:
        exported = find_exportable(source, say)
        adapters = [find_adapter(each, say) for each in form.adapters]
        form = replace(form, adapters=tuple(each.name for each in adapters))
        if not form.merges:
            _check_adapter(exported, adapters)
        if output is not None:
            check_outside(output, [each.model for each in (exported, *adapters) if each.model])
        versions = [each.version for each in (exported, *adapters)]
        model = f"{exported.name} {versions} {form} {push.name}" if push else None
        written = output is not None and holds(output, model)
        name = hub_upload.open_repository(push.name, push.private) if push else ""
        folder = output or Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="raysft-export-")))
        if not written:
            remedy = "free some space" if output else "set TMPDIR to a folder with more space, or use --output"
            with draft(folder, remedy) as unfinished:
                _write(exported, adapters, unfinished, form)
                if push:
                    message = _describe(exported, unfinished, name, form)
                    write_atomically(unfinished / UNPUSHED, json.dumps({"model": model, "message": message}))
        if output is not None:
            say(f"exported: {output}")
        if push:
            _push(folder, name)


@contextmanager
def _sigterm_interrupts() -> Iterator[None]:
    """Handle SIGTERM like Ctrl-C in the block: a batch system that ends the job must not leave a partial or temporary model."""
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


def _check_adapter(exported: Exportable, adapters: Sequence[Exportable]) -> None:
    """Refuse to keep an adapter if there is none, or there are several, or nobody could load it elsewhere."""
    is_adapter = exported.is_adapter
    if not is_adapter and not adapters:
        raise RequestError(f"--no-merge: {exported.name} is a whole model, not an adapter; remove --no-merge")
    if is_adapter + len(adapters) > 1:
        raise RequestError(
            f"--no-merge: keeps one adapter unmerged, but there are {is_adapter + len(adapters)}; remove --no-merge, or all "
            "but one"
        )
    if not is_adapter:
        _check_base(base_name(exported.model)[0], exported)
    elif exported.checkpoint is None:
        _check_base(_base_of(model_copy(exported.model)), exported)


def _base_of(adapter: Path) -> str:
    return str(read_adapter_config(adapter).get("base_model_name_or_path"))


def _check_base(base: str, exported: Exportable) -> None:
    """Refuse a base that is a copy in the cache, and say where a base lies that is not on the Hub."""
    if may_be_on_hub(base):
        return
    if StoragePath.of(base).parent in exported.caches:
        named = StoragePath.of(base).name.startswith("dequantized-")
        remedy = f", or name the model that it is a copy of: raysft export MODEL --no-merge --adapters {exported.name}"
        raise RequestError(
            f"--no-merge: the adapter's base is a copy in the cache, {base}, which exists nowhere else; remove --no-merge"
            + (remedy if named else "")
        )
    Terminal().line(f"the adapter names {base} as its base: to load it, the model must be available there")


def _write(exported: Exportable, adapters: Sequence[Exportable], folder: Path, form: Form) -> None:
    from raysft.models.dequantized import exact_copy
    from raysft.models.merging import merge

    say, scratch, runs_code = Terminal().line, folder / RESTORED, exported.runs_code or form.runs_code
    model = exported.folder(scratch / "model", say)
    others = [each.folder(scratch / f"adapter{index}", say) for index, each in enumerate(adapters)]
    if not form.merges:
        _write_adapter(exported, model, others, folder, form)
    elif model.parent == scratch and not others and _is_final(model, exported, form):
        for path in model.iterdir():
            path.rename(folder / path.name)
    else:
        dtype = form.dtype or exported.dtype
        if not (model / "adapter_config.json").exists():
            base = None
            if others or form.dtype:  # otherwise it is copied as stored
                location = exported.model if exported.model and on_hub(exported.model) else str(model)
                model = model_copy(exact_copy(exported.made_in, location, say, runs_code))
        else:
            base = exported.base(say, runs_code)
        merge(model, folder, runs_code, dtype, form.shard_size, others, base)
    if not (form.merges and (others or (model / "adapter_config.json").exists())):
        _tell_left_out(others[0] if others else model)
    shutil.rmtree(scratch, ignore_errors=True)
    if form.merges and (reason := write_modelfile(folder, exported.config, runs_code)):
        say(f"no {MODELFILE} for Ollama: {reason}")


def _tell_left_out(copied: Path) -> None:
    """Say what else a copied folder holds besides its model, such as the state of a training run."""
    if names := other_files(copied):
        more = f" and {len(names) - NAMED_FILES} more" if len(names) > NAMED_FILES else ""
        Terminal().line(f"not exported, as they are not part of the model: {', '.join(names[:NAMED_FILES])}{more}")


def _is_final(model: Path, exported: Exportable, form: Form) -> bool:
    """Return True if the model of a checkpoint is written as it is."""
    whole = not (model / "adapter_config.json").exists()
    return whole and form.dtype in (None, exported.dtype) and form.shard_size is None


def _write_adapter(exported: Exportable, model: Path, adapters: Sequence[Path], folder: Path, form: Form) -> None:
    from raysft.models.weight_types import rewrite_adapter

    rewrite_adapter(adapters[0] if adapters else model, folder, form.dtype)
    if adapters:  # this is the base that it is exported for, even if it names another
        path = folder / "adapter_config.json"
        base, revision = base_name(exported.model)
        write_json(path, {**read_adapter_config(folder), "base_model_name_or_path": base, "revision": revision})
    elif exported.checkpoint is not None:
        _check_base(_base_of(folder), exported)


def _describe(exported: Exportable, folder: Path, name: str, form: Form) -> str:
    """Write the model card for the Hub into the folder, and return the title of the commit."""
    from raysft.report.card import Published, model_card
    from raysft.report.read_run import read_run

    adapter = not form.merges
    if exported.run is None:
        return _describe_model(exported, folder, name, form)
    step = exported.checkpoint.cursor.step if exported.checkpoint else None
    with open_read_only(exported.run, Terminal().line) as directory:
        log = read_run(directory)
        plots = [plot for plot in [directory.path / PLOT] if plot.is_file()]
        for plot in plots:
            shutil.copyfile(plot, folder / plot.name)
        published = Published(name, adapter, step, form.adapters, has_processor(folder))
        write_atomically(folder / "README.md", model_card(log, plots, published))
    if step is None:
        step = log.trained.get("best_step") if log.option("train.keep_best") else None
        step = step or (log.steps[-1]["current_steps"] if log.steps else None)
    what = f"{log.adapter} adapter" if adapter else "model"
    return f"raysft: the {what} of run {log.name}" + (f" after step {step}" if step else "")


def _describe_model(exported: Exportable, folder: Path, name: str, form: Form) -> str:
    card = folder / "README.md"
    if form.adapters or not card.exists():  # a copied model brings its own
        write_atomically(card, plain_card(name, exported.name, form.adapters, not form.merges, has_processor(folder)))
    with_adapters = f" with {', '.join(map(public, form.adapters))}" if form.adapters else ""
    return f"raysft: {public(exported.name)}{with_adapters}"


def _push(folder: Path, name: str) -> None:
    unpushed = folder / UNPUSHED
    message = json.loads(unpushed.read_text(encoding="utf-8"))["message"]
    size = sum(path.stat().st_size for path in hub_upload.files_to_push(folder).values())
    Terminal().line(f"pushing {size / 2**20:,.1f} MiB to {name}")
    address = hub_upload.push(name, folder, message, Terminal().line)
    unpushed.unlink()
    Terminal().line(f"pushed: {address}")
