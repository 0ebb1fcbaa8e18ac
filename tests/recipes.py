"""The scripts in ``configs`` that make the model and the data of a recipe."""

import importlib.util
from pathlib import Path
from types import ModuleType


def recipe_script(name: str) -> ModuleType:
    """Import a script by its name, which no package has."""
    spec = importlib.util.spec_from_file_location(name, Path(__file__).parents[1] / f"configs/{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
