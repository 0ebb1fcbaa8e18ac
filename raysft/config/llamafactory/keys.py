"""What becomes of a key of LLaMA-Factory: it is written to a key of raysft, or needs nothing, or is refused."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from raysft.config.llamafactory.values import Reader, anything

PREFERENCES = "only used in stages rm, ppo, dpo and kto"
VIDEOS = "only used for video and audio, and raysft rejects records that contain them"


@dataclass(frozen=True)
class Key:
    """A key of LLaMA-Factory 0.9.5 and what it becomes: of ``path``, ``reason`` and ``remedy`` at least one is set."""

    read: Reader = anything
    """Reads the value."""
    default: Any = None
    """Value without the key, as ``read`` returns it."""
    path: str = ""
    """Key of raysft."""
    alone: bool = True
    """True if the value goes to ``path`` as it is read; otherwise ``translation`` derives it from several keys."""
    note: str = ""
    """How the meaning of ``path`` differs."""
    reason: str = ""
    """Why a value needs nothing."""
    remedy: str = ""
    """What to do instead of a value that is refused: any other than the default."""


Keys = dict[str, Key]


def same(path: str, read: Reader, default: Any = None, note: str = "") -> Key:
    """A key with a counterpart."""
    return Key(read, default, path=path, note=note)


def joined(path: str, read: Reader, default: Any = None) -> Key:
    """A key that takes effect together with others, on one key of raysft or several."""
    return Key(read, default, path=path, alone=False)


def harmless(reason: str) -> Key:
    """A key that needs nothing, whatever its value."""
    return Key(reason=reason)


def only(default: Any, remedy: str, read: Reader = anything) -> Key:
    """A key that raysft takes with its default alone."""
    return Key(read, default, reason="raysft has no other value", remedy=remedy)
