"""The file of an ``evaluate`` module by path or by its id on the hub."""

from __future__ import annotations

from pathlib import Path

from raysft.storage import hub
from raysft.storage.local_cache import may_be_on_hub

KINDS = ("metric", "comparison", "measurement")
"""The hub's ``NAME`` is ``evaluate-KIND/NAME`` of the first kind that has it."""


class NotGiven(Exception):
    """A module is neither here nor given by the hub: "FACT; REMEDY"."""


def script_of(name: str) -> str:
    """The file that ``evaluate.load`` can load a module from without asking the hub, whose errors it would not tell apart and
    wait for without a bound.

    Args:
        name: a file, the folder ``…/NAME`` of a ``NAME.py``, or an id on the hub.

    Raises:
        NotGiven: neither the hub gives it, nor its cache where the hub does not answer.
    """
    if name.endswith(".py") or (Path(name) / f"{Path(name).name}.py").is_file() or not may_be_on_hub(name):
        return name
    ids = [name] if "/" in name else [f"evaluate-{kind}/{name}" for kind in KINDS]
    try:
        return str(_fetched(ids))
    except hub.failures() as error:
        kept = next((found for id in ids if (found := _kept(id))), None)
        if kept is None:
            raise NotGiven(f"is no file here, and {hub.reason_of(error) or hub.NONSENSE}") from None
        return str(kept)


def _fetched(ids: list[str]) -> Path:
    """The file of the first id that the hub or its cache has; else what came in the way."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import RepositoryNotFoundError

    hub.be_patient()
    failures: list[Exception] = []
    for id in ids:
        try:
            folder = Path(snapshot_download(id, repo_type="space", allow_patterns="*.py"))
        except hub.failures() as error:
            failures.append(error)
            continue
        script = folder / f"{Path(id).name}.py"
        if not script.is_file():
            raise NotGiven(f"is no metric: {id} on the hub holds no {script.name}; check its name")
        return script
    raise next((error for error in failures if not isinstance(error, RepositoryNotFoundError)), failures[0])


def _kept(id: str) -> Path | None:
    """The newest file that ``evaluate`` itself has fetched for an id at some time."""
    from evaluate.loading import init_dynamic_modules

    folder = Path(init_dynamic_modules(), "metrics", id.replace("/", "--"))
    return max(folder.glob(f"*/{Path(id).name}.py"), key=lambda file: file.stat().st_mtime, default=None)
