"""Names that a tracker refuses. Pure: its library would say so when the data is ready and the training is to start."""

from __future__ import annotations

import re
from collections.abc import Iterator

from raysft.config.config import Config

PROJECTS = {
    "wandb": (re.compile(r"[^/\\#?%:]{1,128}"), "W&B", r"without / \ # ? % :"),
    "swanlab": (re.compile(r"[0-9A-Za-z_.+-]{1,100}"), "SwanLab", "of at most 100 letters, digits and _ - + ."),
}
"""Tracker → what its projects are called, its name, and the same in words."""
RESERVED = re.compile(
    "registry-.*|.+_(?:system|configs|traces|artifacts|artifact_versions|artifact_aliases|run_artifact_links|"
    "external_run_artifact_links)"
)
"""Projects of trackio whose files would be those of another one."""
MLFLOW_TAG = re.compile(r"[\w/.: -]{1,250}", re.ASCII)


def tracking(config: Config) -> Iterator[str]:
    """Yield what speaks against the names of ``train.tracking``."""
    names, trackers = config.train.tracking, config.train.trackers
    project, key = names.project, f"train.tracking.project={names.project}"
    for tracker, (pattern, title, words) in PROJECTS.items():
        if project and tracker in trackers and not pattern.fullmatch(project):
            yield f"{key} names a project, but {title} takes only names {words}; rename it"
    if project and "trackio" in trackers and RESERVED.fullmatch(re.sub(r"[^\w-]", "", project)):
        yield f"{key} names a project, but trackio keeps files of its own under such a name; rename it"
    refused = next((tag for tag in names.tags if not MLFLOW_TAG.fullmatch(tag.partition("=")[0])), None)
    if refused is not None and "mlflow" in trackers:
        yield (
            f"train.tracking.tags has {refused}, but keys of MLflow's tags have only letters from a to z, digits, spaces and "
            "/ . : _ -; rename it"
        )
