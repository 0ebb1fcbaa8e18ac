"""What is sent to a cluster for a config: a command, the resolved config, and who sent it. Pure; nothing here asks the cluster."""

from __future__ import annotations

import hashlib
import re
import shlex
import subprocess
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from raysft import __version__
from raysft.config import Config, masked
from raysft.config.verb import verb_of
from raysft.errors import RequestError
from raysft.storage.local_cache import may_be_on_hub

STOP_SECONDS = 290
"""Time between the signal that stops a job and its end by force: enough for a checkpoint."""
CONFIG_NAME = "config.yaml"
GIT_SECONDS = 10
REMEDY = "use an absolute path that all nodes of the cluster can access, or a URI"
MODULES_AT_HOME = re.compile(r"[A-Za-z0-9_-]+(/[A-Za-z0-9_.-]+)?$")
"""Metrics that are built in or on the Hub."""


@dataclass(frozen=True)
class JobRequest:
    """A job, without its number: the same config gives the same request."""

    name: str
    """``run.name``."""
    digest: str
    """Hash of the resolved config."""
    config: str
    """The resolved config as YAML, the only file that travels."""
    entrypoint: str
    """Shell command."""
    place: str
    """The run directory, without secrets."""
    metadata: dict[str, str]

    @property
    def prefix(self) -> str:
        """The submission id without its number."""
        return f"raysft-{self.name}-{self.digest}-"

    def number(self, submission_id: str) -> int | None:
        """The number of a job of this request; None if it is a job of another.

        >>> JobRequest("toy", "1a2b", "", "", "", {}).number("raysft-toy-1a2b-12")
        12
        """
        number = submission_id.removeprefix(self.prefix)
        return int(number) if submission_id.startswith(self.prefix) and number.isdecimal() else None


def job_request(config: Config, allow_changed: bool = False, commit: str | None = None) -> JobRequest:
    """Return what is sent for a config.

    Args:
        config: the resolved config.
        allow_changed: resume a run that started with other settings.
        commit: of the repository that the config lies in, for the job's metadata.

    Raises:
        RequestError: the cluster could not read what the config names, or the verb has no such option.
    """
    verb = verb_of(config)
    if allow_changed and verb != "run":
        raise RequestError(f"--allow-changed: raysft {verb} does not support this option; remove it")
    refuse_local(config)
    text = config.to_yaml()
    digest = hashlib.sha256(text.encode("utf-8", errors="backslashreplace")).hexdigest()[:8]
    place = masked(str(config.run_place))
    metadata = {"raysft_version": __version__, "config_hash": digest, "run_directory": place}
    if commit:
        metadata["git_commit"] = commit
    options = ["--allow-changed"] if allow_changed else []
    # In place of the shell, which a stop would end first: in a container without an init process nobody would then notice that
    # raysft has ended, and Ray would wait for it until it kills it.
    entrypoint = f"exec {shlex.join(['raysft', verb, CONFIG_NAME, *options])}"
    return JobRequest(config.run.name, digest, text, entrypoint, place, metadata)


def refuse_local(config: Config) -> None:
    """Refuse what only means something on this machine: relative paths, and the address of a cluster.

    Raises:
        RequestError: the first key that does.
    """
    if config.scaling.address not in (None, "auto"):
        raise RequestError(
            f"scaling.address={config.scaling.address}: a job runs on the cluster that it is submitted to; remove "
            "scaling.address"
        )
    for key, value in relative_paths(config):
        what = (
            "another folder on the cluster"
            if value.startswith("~")
            else "relative, but a job has its own working directory"
        )
        raise RequestError(f"{key}={value}: is {what}; {REMEDY}")


def relative_paths(config: Config) -> Iterator[tuple[str, str]]:
    """Yield the keys whose paths depend on the folder that a command is started in, with these paths."""
    return ((key, path) for key, path in named_paths(config) if _is_relative(path))


def named_paths(config: Config) -> Iterator[tuple[str, str]]:
    """Yield the keys that name files, with their paths and URIs; names of the Hub and of what raysft brings along are none."""
    deepspeed = config.train.deepspeed if isinstance(config.train.deepspeed, str) else None
    paths: list[tuple[str, str | Sequence[str] | None]] = [
        ("run.storage", config.run.storage),
        ("data.cache", config.data.cache),
        ("data.registry", config.data.registry),
        ("data.media_dir", config.data.media_dir),
        ("train.deepspeed", deepspeed),
    ]
    for part, sources in (("train", config.data.train), ("eval", config.data.eval)):
        paths += [(f"data.{part}.{index}.path", source.path) for index, source in enumerate(sources)]
    for key, value in paths:
        for path in [value] if isinstance(value, str) else value or ():
            yield key, path
    models = [("model.path", config.model.path), ("evaluate.model", config.evaluate.model)]
    models += [("generate.model", config.generate.model), ("train.reference_model", config.train.reference_model)]
    models += [(f"model.adapters.{index}", path) for index, path in enumerate(config.model.adapters)]
    for key, path in models:
        if path and not _is_hub_id(path):
            yield key, path
    template = config.model.chat_template
    if template and (template.endswith(".jinja") or "/" in template or Path(template).is_file()):
        yield "model.chat_template", template
    for index, metric in enumerate(config.generate.metrics):
        if not (MODULES_AT_HOME.match(metric) and not Path(metric).exists()):
            yield f"generate.metrics.{index}", metric


def _is_relative(path: str) -> bool:
    return not (Path(path).is_absolute() or "://" in path or path.startswith("package:"))


def _is_hub_id(path: str) -> bool:
    """True if a path is not a file on this machine and may name a model on the Hub."""
    package = path.startswith("package:")
    return may_be_on_hub(path) and not package and not path.endswith(".gguf") and not Path(path).exists()


def commit_of(folder: Path) -> str | None:
    """The commit that a folder's git repository has checked out; None without a repository."""
    command = ["git", "-C", str(folder), "rev-parse", "HEAD"]
    try:
        ran = subprocess.run(command, capture_output=True, text=True, timeout=GIT_SECONDS, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return ran.stdout.strip() or None if ran.returncode == 0 else None
