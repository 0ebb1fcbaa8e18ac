"""Which files of a config the pods can read: those behind a URI, of a Python package, on the volume or in the image."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

import raysft
from raysft.config import ClusterSection, Config
from raysft.errors import RequestError

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?")


def refuse_local_paths(config: Config) -> None:
    """Refuse what the pods would not find, and storage that would be lost with them.

    Raises:
        RequestError: names the first such key.
    """
    for key, path in (("run.storage", config.run.storage), ("data.cache", config.data.cache)):
        if path and not _stored(path, config.cluster):
            raise RequestError(f"{key}={path} would be lost with the pods; {_remedy_for_storage(config.cluster)}")
    for key, path in _files(config):
        if not _visible(path, config.cluster):
            raise RequestError(
                f"{key}={path} is no path that the pods see; use a URI (s3://…, hf://…), or a path below {_seen(config.cluster)}"
            )
    for key, name in _named(config):
        path = PurePosixPath(name)
        hub_id = _HUB_ID.fullmatch(name) and path.suffix != ".gguf" and not Path(name).exists()
        if not hub_id and not _visible(name, config.cluster):
            raise RequestError(
                f"{key}={name} is no path that the pods see; use a name of the Hugging Face Hub, or a path below "
                f"{_seen(config.cluster)}"
            )


def _stored(path: str, cluster: ClusterSection) -> bool:
    if "://" in path:
        return not path.startswith("file://")
    return bool(cluster.volume.claim) and PurePosixPath(path).is_relative_to(cluster.volume.mount_path)


def _visible(path: str, cluster: ClusterSection) -> bool:
    if path.startswith("package:") or _stored(path, cluster):
        return True
    return any(PurePosixPath(path).is_relative_to(folder) for folder in cluster.image_folders)


def _remedy_for_storage(cluster: ClusterSection) -> str:
    if cluster.volume.claim:
        return f"use a folder below cluster.volume.mount_path={cluster.volume.mount_path}, or a URI (s3://…)"
    return "use a URI (s3://…), or set cluster.volume.claim and use a folder below cluster.volume.mount_path"


def _seen(cluster: ClusterSection) -> str:
    volume = f"cluster.volume.mount_path={cluster.volume.mount_path}" if cluster.volume.claim else "cluster.volume"
    return f"{volume} or cluster.image_folders={cluster.image_folders}"


def _files(config: Config) -> Iterator[tuple[str, str]]:
    """Yield the keys whose values are always paths."""
    for kind, sources in (("train", config.data.train), ("eval", config.data.eval)):
        for index, source in enumerate(sources):
            for path in [source.path] if isinstance(source.path, str) else source.path or []:
                yield f"data.{kind}.{index}.path", path
    if config.data.registry:
        yield "data.registry", config.data.registry
    template = config.model.chat_template
    if template and not (Path(raysft.__file__).parent / "chat_templates" / f"{template}.jinja").exists():
        yield "model.chat_template", template
    if isinstance(config.train.deepspeed, str):
        yield "train.deepspeed", config.train.deepspeed


def _named(config: Config) -> Iterator[tuple[str, str]]:
    """Yield the keys whose values may be names instead of paths."""
    yield "model.path", config.model.path
    for index, adapter in enumerate(config.model.adapters):
        yield f"model.adapters.{index}", adapter
    if config.generate.model:
        yield "generate.model", config.generate.model
    for index, metric in enumerate(config.generate.metrics):
        yield f"generate.metrics.{index}", metric
