"""Names that a tracker refuses, found before anything starts: its library would refuse them only once the data is ready."""

from __future__ import annotations

import re
from collections.abc import Iterator

from raysft.config.config import Config

PROJECTS = {
    "wandb": (re.compile(r"[^/\\#?%:]{1,128}"), "W&B", r"at most 128 characters and none of / \ # ? % :"),
    "swanlab": (
        re.compile(r"[0-9A-Za-z_.+-]{1,100}"),
        "SwanLab",
        "at most 100 characters: letters, digits and _ - + .",
    ),
}
"""Tracker → the project names that it accepts, its own name, and the rule in words."""
RESERVED = re.compile(
    "registry-.*|.+_(?:system|configs|traces|artifacts|artifact_versions|artifact_aliases|run_artifact_links|"
    "external_run_artifact_links)"
)
"""Project names under which trackio stores other data of a project."""
MLFLOW_TAG = re.compile(r"[\w/.: -]{1,250}", re.ASCII)


def tracking(config: Config) -> Iterator[str]:
    """Yield the names in ``train.tracking`` that one of the trackers refuses, and why."""
    names, trackers = config.train.tracking, config.train.trackers
    project, key = names.project, f"train.tracking.project={names.project}"
    for tracker, (pattern, title, words) in PROJECTS.items():
        if project and tracker in trackers and not pattern.fullmatch(project):
            yield f"{key}, but a project name in {title} has {words}; choose another name"
    if project and "trackio" in trackers and RESERVED.fullmatch(re.sub(r"[^\w-]", "", project)):
        yield f"{key}, but trackio reserves this name for its own files; choose another name"
    refused = next((tag for tag in names.tags if not MLFLOW_TAG.fullmatch(tag.partition("=")[0])), None)
    if refused is not None and "mlflow" in trackers:
        yield (
            f"train.tracking.tags has {refused}, but a tag key in MLflow has at most 250 characters: letters from a to z, "
            "digits, spaces and / . : _ -; rename the tag"
        )
