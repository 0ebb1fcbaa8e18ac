"""Which files of a config the pods can read: those behind a URI, of a Python package, on the volume or in the image."""

from __future__ import annotations

from pathlib import PurePosixPath
from posixpath import normpath

from raysft.config import ClusterSection, Config
from raysft.errors import RequestError
from raysft.submit.request import named_paths

STORAGE = ("run.storage", "data.cache")


def refuse_local_paths(config: Config) -> None:
    """Refuse what the pods would not find, and storage that would be lost with them.

    Raises:
        RequestError: names the first such key.
    """
    for key, path in named_paths(config):
        if key in STORAGE and not _is_stored(path, config.cluster):
            raise RequestError(f"{key}={path} would be lost with the pods; {_remedy_for_storage(config.cluster)}")
        if not _is_visible(path, config.cluster):
            hub = (
                "a Hugging Face Hub id"
                if key.startswith(("model.", "evaluate.", "generate."))
                else "a URI (s3://…, hf://…)"
            )
            raise RequestError(
                f"{key}={path} is not a path that the pods can access; use {hub}, or a path below {_seen(config.cluster)}"
            )


def _is_stored(path: str, cluster: ClusterSection) -> bool:
    if "://" in path:
        return not path.startswith("file://")
    return bool(cluster.volume.claim) and _is_below(path, cluster.volume.mount_path)


def _is_visible(path: str, cluster: ClusterSection) -> bool:
    if path.startswith("package:") or _is_stored(path, cluster):
        return True
    return any(_is_below(path, folder) for folder in cluster.image_folders)


def _is_below(path: str, folder: str) -> bool:
    return PurePosixPath(normpath(path)).is_relative_to(folder)


def _remedy_for_storage(cluster: ClusterSection) -> str:
    if cluster.volume.claim:
        return f"use a folder below cluster.volume.mount_path={cluster.volume.mount_path}, or a URI (s3://…)"
    return "use a URI (s3://…), or set cluster.volume.claim and use a folder below cluster.volume.mount_path"


def _seen(cluster: ClusterSection) -> str:
    volume = f"cluster.volume.mount_path={cluster.volume.mount_path}" if cluster.volume.claim else "cluster.volume"
    return f"{volume} or cluster.image_folders={cluster.image_folders}"
