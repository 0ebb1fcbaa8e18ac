"""The model card of a model that is on the hub and that no run of raysft has trained: where it comes from, and how to load it."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

import yaml

from raysft.report.loading_code import loading_code
from raysft.report.text import masked


def plain_card(name: str, base: str, adapters: Sequence[str], adapter: bool, images: bool = False) -> str:
    """The card as Markdown.

    Args:
        name: ``ORG/NAME`` of the repository.
        base: path, URI or hub id of the model.
        adapters: those that were merged into it, or the one that the repository holds.
        adapter: True if the repository holds an adapter alone.
        images: True if it comes with a processor.

    >>> print(plain_card("org/both", "org/base", ["/home/me/runs/x"], adapter=False).split("---")[2].splitlines()[4])
    This model is `org/base` with `x` merged into it, in this order if there are several, by raysft.
    """
    front: dict[str, object] = {}
    if on_hub(base):
        relation = "adapter" if adapter else "merge" if adapters else "finetune"
        front = {"base_model": base.partition("@")[0], "base_model_relation": relation}
    front |= {
        "library_name": "peft" if adapter else "transformers",
        "pipeline_tag": "image-text-to-text" if images else "text-generation",
        "tags": ["raysft"],
    }
    listed = ", ".join(f"`{public(each)}`" for each in adapters)
    if adapter:
        text = (
            f"This is the adapter {listed} for `{public(base)}`."
            if adapters
            else f"This is the adapter `{public(base)}`."
        )
    elif adapters:
        text = f"This model is `{public(base)}` with {listed} merged into it, in this order if there are several, by raysft."
    else:
        text = f"This model is `{public(base)}`, rewritten by raysft."
    head = yaml.safe_dump(front, sort_keys=False, allow_unicode=True)
    code = loading_code(name, adapter, images)
    return f"---\n{head}---\n\n# {name.rpartition('/')[2]}\n\n{text}\n\n## Usage\n\n```python\n{code}```\n"


def on_hub(model: str) -> bool:
    """Return True if a model's name may stand in ``base_model``: the hub refuses a card with anything else."""
    return (
        bool(re.fullmatch(r"[\w.-]+/[\w.-]+(@\w+)?", model))
        and not Path(model).exists()
        and not model.endswith(".gguf")
    )


def public(model: str) -> str:
    """A path or URI without secrets; of a local path only the last part, without the folders of a machine.

    >>> public("/home/me/runs/x"), public("org/name")
    ('x', 'org/name')
    """
    text = masked(model)
    return Path(text).name if text.startswith(("/", "~", "file:", ".")) or Path(text).exists() else text
