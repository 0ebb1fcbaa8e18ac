"""What raysft takes for granted about the private parts of other libraries, checked in the installed versions.

A failure names the library's version, what it lacks and the line of raysft that needs it.
"""

from __future__ import annotations

import inspect
import textwrap
from collections.abc import Iterable
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]


@dataclass(frozen=True)
class Contract:
    """The names that one module of raysft uses of one library."""

    library: str
    """Its distribution."""
    module: str
    """Path of the module that uses it, from the root of the repository."""

    def name(self, owner: Any, name: str, used_as: str | None = None) -> Any:
        """Assert that ``owner`` has an attribute, and return it."""
        assert hasattr(owner, name), self._lacks(f"{_title(owner)}.{name}", used_as or name)
        return getattr(owner, name)

    def parameters(self, function: Any, names: Iterable[str], used_as: str | None = None) -> None:
        """Assert that a function takes all of these arguments, by name or by ``**options``."""
        given = inspect.signature(function).parameters
        takes_all = any(each.kind is inspect.Parameter.VAR_KEYWORD for each in given.values())
        lacking = [] if takes_all else [name for name in names if name not in given]
        assert not lacking, self._lacks(
            f"argument {lacking[0]!r} of {_title(function)}({', '.join(given)})" if lacking else "",
            used_as or function.__name__,
        )

    def positional(self, function: Any, count: int, used_as: str | None = None) -> None:
        """Assert that a function can be called with this number of positional arguments."""
        try:
            inspect.signature(function).bind(*range(count))
        except TypeError as error:
            needed = f"{_title(function)} with {count} positional arguments ({error})"
            raise AssertionError(self._lacks(needed, used_as or function.__name__)) from None

    def source(self, owner: Any, text: str, used_as: str) -> None:
        """Assert that a class, one of its bases, a function or a module holds some text, such as an assignment to an attribute."""
        owners = inspect.getmro(owner)[:-1] if inspect.isclass(owner) else [owner]
        texts = (
            [textwrap.dedent(inspect.getsource(each)) for each in owners if each.__module__ != "builtins"]
            if (inspect.isclass(owner))
            else [inspect.getsource(owner)]
        )
        assert any(text in each for each in texts), self._lacks(f"`{text}` in {_title(owner)}", used_as)

    def _lacks(self, needed: str, used_as: str) -> str:
        return f"{self.library} {version(self.library)} lacks {needed}; look at {self.line(used_as)}"

    def line(self, text: str) -> str:
        """Return PATH:LINE of the first line of the module that holds a text; fail if none does, for then the contract is stale."""
        for number, line in enumerate((ROOT / self.module).read_text(encoding="utf-8").splitlines(), 1):
            if text in line:
                return f"{self.module}:{number}"
        raise AssertionError(f"{self.module} no longer uses {text!r}; remove it from the contract with {self.library}")


def _title(owner: Any) -> str:
    module = getattr(owner, "__module__", "")
    name = getattr(owner, "__qualname__", None) or getattr(owner, "__name__", None) or type(owner).__name__
    return f"{module}.{name}" if module else name
