"""Find the file of an ``evaluate`` module by its path or its id on the Hugging Face Hub."""

from __future__ import annotations

from pathlib import Path

from raysft.storage import hub
from raysft.storage.local_cache import may_be_on_hub

KINDS = ("metric", "comparison", "measurement")
"""A ``NAME`` without an owner is ``evaluate-KIND/NAME`` of the first kind that has it."""


class ScriptNotFound(Exception):
    """No file of the module was found, neither locally nor on the Hub. The message continues a sentence about the module."""


def find_script(name: str) -> str:
    """Find a file that ``evaluate.load`` can load without asking the Hub.

    ``evaluate`` itself would wait for the Hub without a limit, and report all of its errors alike.

    Args:
        name: a file, the folder ``…/NAME`` of a ``NAME.py``, or an id on the Hub.

    Raises:
        ScriptNotFound: the Hub does not have it or does not respond, and it is not cached.
    """
    if name.endswith(".py") or (Path(name) / f"{Path(name).name}.py").is_file() or not may_be_on_hub(name):
        return name
    ids = [name] if "/" in name else [f"evaluate-{kind}/{name}" for kind in KINDS]
    try:
        return str(_fetch(ids))
    except hub.error_types() as error:
        cached = next((script for id in ids if (script := _cached_by_evaluate(id))), None)
        if cached is None:
            raise ScriptNotFound(f"is not a local file, and {hub.reason_of(error) or hub.UNUSABLE}") from None
        return str(cached)


def _fetch(ids: list[str]) -> Path:
    """Fetch the file of the first id that the Hub or its cache has; raise the first failure that says more than "not found"."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import RepositoryNotFoundError

    hub.bound_requests()
    failures: list[Exception] = []
    for id in ids:
        try:
            folder = Path(snapshot_download(id, repo_type="space", allow_patterns="*.py"))
        except hub.error_types() as error:
            failures.append(error)
            continue
        script = folder / f"{Path(id).name}.py"
        if not script.is_file():
            raise ScriptNotFound(f"is not a metric: {id} on the Hub has no {script.name}; check its name")
        return script
    raise next((error for error in failures if not isinstance(error, RepositoryNotFoundError)), failures[0])


def _cached_by_evaluate(id: str) -> Path | None:
    """The newest file that ``evaluate`` itself has cached for an id."""
    from evaluate.loading import init_dynamic_modules

    folder = Path(init_dynamic_modules(), "metrics", id.replace("/", "--"))
    return max(folder.glob(f"*/{Path(id).name}.py"), key=lambda file: file.stat().st_mtime, default=None)
