"""Models of the Hugging Face Hub on this machine: known by their commit, and fetched once into the Hub library's own cache."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from urllib.parse import unquote

from raysft.errors import RequestError
from raysft.storage import hub

BESIDE_WEIGHTS = ("*.json", "*.jinja", "*.txt", "*.model", "*.tiktoken", "*.py")
"""Patterns of a model's files other than weights, which the hub may have in several formats."""
WEIGHTS = (("*.safetensors",), ("pytorch_model*.bin", "adapter_model.bin"))
"""Patterns of weights, by format; the first format that a model has is fetched."""
OTHER_WEIGHTS = ("*/*.safetensors", "*/*.bin", "consolidated*.safetensors")
"""Patterns of weights that transformers and peft do not read, such as the same ones in another layout."""
DATASET = re.compile(r"hf://datasets/([^/@]+/[^/@]+)(?:@(refs/(?:convert|pr)/[^/]+|[^/]+))?((?:/.*)?)$", re.DOTALL)
"""Dataset, revision and path in a location."""
SHORT = 12
"""Digits of a commit in a line for the user."""


def split(location: str) -> tuple[str, str | None]:
    """Return the id in ``NAME@REVISION`` and its revision, if it has one.

    >>> split("org/name@v1"), split("org/name")
    (('org/name', 'v1'), ('org/name', None))
    """
    name, _, revision = location.partition("@")
    return name, revision or None


def pin(name: str, revision: str | None = None) -> str:
    """Return ``NAME@COMMIT``, the commit that a branch or tag names now; without the hub, the one it named when it was last asked.

    Raises:
        Exception: of several types; ``hub.reason_of`` knows them.
    """
    from huggingface_hub import resolve_revision

    hub.bound_requests()
    return f"{name}@{resolve_revision(name, revision=revision).resolved}"


def pin_dataset(location: str) -> str:
    """Return the location of a dataset's files, ``hf://datasets/ORG/NAME@REVISION/PATH``, with the commit of the revision.

    Raises:
        Exception: of several types; ``hub.reason_of`` knows them.
    """
    from huggingface_hub import resolve_revision

    found = DATASET.match(location)
    if found is None:
        return location
    name, revision, path = found.groups()
    hub.bound_requests()
    commit = resolve_revision(name, repo_type="dataset", revision=revision and unquote(revision)).resolved
    return f"hf://datasets/{name}@{commit}{path}"


def holds_weights(location: str) -> bool:
    """True unless the hub says that a model has no weights."""
    from huggingface_hub import HfApi, constants

    if constants.HF_HUB_OFFLINE or any(_with_weights(fetch(location))):
        return True
    name, commit = split(location)
    try:
        files = HfApi().list_repo_files(name, revision=commit)
    except hub.error_types():
        return True  # they may be in the cache, and are looked for when they are needed
    return any(Path(file).match(pattern) for file in files for patterns in WEIGHTS for pattern in patterns)


def _with_weights(folder: Path) -> Sequence[Path]:
    return [file for patterns in WEIGHTS for pattern in patterns for file in folder.glob(pattern)]


def fetch(location: str, weights: bool = False) -> Path:
    """Return the folder with a model's files, and its weights if they are asked for.

    The hub is not asked about what the cache has of a commit. Processes of this machine that want the same file wait while one of
    them fetches it.

    Args:
        location: ``NAME``, ``NAME@REVISION`` or ``NAME@COMMIT``.
        weights: fetch these too, and not only what describes the model.

    Raises:
        RequestError: the hub does not give the files, and the cache does not have all of them.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.utils import tqdm

    class Silent(tqdm):
        def __init__(self, *args: Any, **options: Any) -> None:
            super().__init__(*args, **{**options, "disable": True})

    hub.bound_requests()
    name, revision = split(location)

    def snapshot(*patterns: str) -> Path:
        wanted = [*BESIDE_WEIGHTS, *patterns]
        options: dict[str, Any] = {"allow_patterns": wanted, "ignore_patterns": [*OTHER_WEIGHTS]}
        return Path(snapshot_download(name, revision=revision, tqdm_class=Silent, **options))

    try:
        if not weights:
            return snapshot()
        folder = snapshot(*WEIGHTS[0])
        return folder if any(folder.glob("*.safetensors")) else snapshot(*WEIGHTS[1])
    except hub.error_types() as error:
        raise RequestError(f"{name}: is not a local folder, and {hub.reason_of(error) or hub.UNUSABLE}") from None


def is_snapshot(folder: Path) -> bool:
    """True for a folder in the hub's cache, to which weights may still be fetched."""
    return folder.parent.name == "snapshots" and folder.parent.parent.name.startswith("models--")


def shown(folder: str) -> str:
    """Return a model's folder as messages name it: that of a hub model by its id.

    >>> shown("/home/me/.cache/huggingface/hub/models--org--name/snapshots/0a1b"), shown("/models/m")
    ('org/name', '/models/m')
    """
    path = Path(folder)
    return path.parent.parent.name.removeprefix("models--").replace("--", "/") if is_snapshot(path) else folder
