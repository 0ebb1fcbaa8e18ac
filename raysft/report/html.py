"""The templates of the HTML pages. A page is one file without network access, scripts or other files."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import jinja2


@cache
def template(name: str) -> jinja2.Template:
    """The template ``{name}.html.jinja`` of this folder."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    environment.filters |= {"percent": lambda value: f"{100 * value:.0f}%"}
    return environment.get_template(f"{name}.html.jinja")
