"""Open the images of examples: where each one is, what it is, and its size."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextvars import copy_context
from dataclasses import dataclass, replace
from pathlib import Path

from raysft.config import Config, locate
from raysft.data.sources.downloads import download
from raysft.data.types import Example, Medium, Message, Rejected
from raysft.errors import NotNow, RequestError, StorageFailed, one_line, unreadable
from raysft.media import images
from raysft.media.files import MAX_BYTES, Identity, Unreadable, digest, identity
from raysft.storage.filesystems import options_of
from raysft.storage.hub import silent_server
from raysft.storage.path import SCHEMES, StoragePath

THREADS = 8
"""Images that are opened at once: PIL lets go of the interpreter's lock, and storages keep threads waiting."""
HUBS = ("hf", "ms")
FETCHED = ("http", "https", *HUBS)
"""Schemes of files that are kept in the cache."""
CREDENTIALS = re.compile("[^/@]*:[^/@]*@")


@dataclass(frozen=True)
class MediaOptions:
    """What the config says of images."""

    folder: str
    """Folder that relative paths begin in; empty for that of the data file."""
    cache: str
    """Folder for images that are in records, on the web or on a hub."""
    hosts: tuple[str, ...]
    max_pixels: int | None
    min_pixels: int | None

    @classmethod
    def of(cls, config: Config, folder: str = "") -> MediaOptions:
        """Take the options from a config.

        Args:
            config: the run's config.
            folder: where relative paths begin if the config does not say.
        """
        data = config.data
        folder = locate(data.media_dir, "data.media_dir") if data.media_dir else folder
        return cls(
            folder=StoragePath.of(folder).location if folder else "",
            cache=(config.cache_directory / "media").location,
            hosts=tuple(data.media_hosts),
            max_pixels=data.image_max_pixels,
            min_pixels=data.image_min_pixels,
        )


Opened = tuple[Medium, bool]
"""(image, whether it has more frames than the one that is taken)."""


class MediaOpener:
    """Opens the images of one shard's examples, each once."""

    def __init__(self, options: MediaOptions, files: Mapping[str, str]) -> None:
        """Prepare to open images.

        Args:
            options: what the config says.
            files: path of each data file, as records name it, and its location.
        """
        self.options, self.files = options, files
        self.counts = Counter[str]()
        self.unusable: dict[str, Identity] = {}
        """Location of a file that no image can be made of → what it was then."""
        self._opened: dict[str, Opened] = {}
        """Location or hash of an image → what it was when it was opened."""

    def __call__(self, examples: Sequence[Example]) -> Iterator[Example | Rejected]:
        """Open the images of examples: each gets its location, hash and size, or its example is rejected.

        Raises:
            RequestError: a storage or a host does not respond.
        """
        if not any(message.media for example in examples for message in example.messages):
            yield from examples
            return
        context = copy_context()  # how long storages are asked again
        with ThreadPoolExecutor(THREADS) as pool:
            for found, animated in pool.map(lambda item: context.copy().run(self._example, item), examples):
                if animated:
                    self.counts["animated"] += animated
                yield found

    def _example(self, example: Example) -> tuple[Example | Rejected, int]:
        """Open the images of one example, and count those of which only a frame is taken."""
        path = example.record.rpartition(":")[0]
        messages, animated = list[Message](), 0
        try:
            for message in example.messages:
                opened = [self._medium(medium, path) for medium in message.media]
                animated += sum(more for _, more in opened)
                messages.append(replace(message, media=tuple(medium for medium, _ in opened)) if opened else message)
        except Unreadable as error:
            return Rejected(example.source, example.record, _printable(str(error))), 0
        except StorageFailed as error:
            raise unreadable(f"{example.record}: {error}; check the storage and its credentials", error) from None
        return replace(example, messages=tuple(messages)), animated

    def _medium(self, medium: Medium, data_file: str) -> Opened:
        location = "" if medium.content else self._location(medium.location, data_file)
        if location in self._opened:
            return self._opened[location]
        scheme = location.partition("://")[0].lower() if "://" in location else ""
        try:
            content = medium.content or self._read(location, scheme)
            hashed = digest(content)
            opened = self._opened.get(hashed)
            if opened is None:
                opened = self._open(content, hashed, location or f"image of {len(content):,} bytes in the record")
        except Unreadable:
            if location and scheme not in FETCHED:
                self.unusable[location] = identity(location)
            raise
        if medium.content or scheme in FETCHED:
            kept = opened[0].location or self._keep(content, hashed)
            opened = self._opened[hashed] = (replace(opened[0], location=kept), opened[1])
        else:
            opened = (replace(opened[0], location=location), opened[1])
        if location:
            self._opened[location] = opened
        return opened

    def _open(self, content: bytes, hashed: str, place: str) -> Opened:
        try:
            look = images.look_at(content)
        except Unreadable as error:
            raise Unreadable(f"{_shown(place)}: {error}") from None
        width, height = images.size_within(look.width, look.height, self.options.max_pixels, self.options.min_pixels)
        return Medium("image", "", digest=hashed, width=width, height=height, size=len(content)), look.more_frames

    def _location(self, named: str, data_file: str) -> str:
        """Where an image is that a record names."""
        scheme, found, rest = named.partition("://")
        if found and scheme.lower() == "file":
            return StoragePath.of(named).location
        if found:
            scheme = scheme.lower()
            if scheme not in (*FETCHED, *SCHEMES):
                raise Unreadable(
                    f"{named:.200}: {scheme}:// is not supported; use a path, or one of {', '.join(SCHEMES)}"
                )
            if scheme in SCHEMES and (options_of(named) or CREDENTIALS.match(rest)):
                raise Unreadable(
                    f"{_shown(named)}: storage options belong in data.media_dir; write only the image's path"
                )
            return named
        if "\0" in named:
            raise Unreadable(f"{named!r:.80}: is not a path")
        if named.startswith("/"):
            return named
        folder = self.options.folder or StoragePath.of(self.files.get(data_file, data_file)).parent
        return (StoragePath.of(folder) / named).location

    def _read(self, location: str, scheme: str) -> bytes:
        if scheme in ("http", "https"):
            return download(location, self.options.hosts)
        try:
            local = StoragePath(location).local
            if local and local.exists():
                _refuse_odd(local)
            return StoragePath(location).read_bytes()
        except Unreadable:
            raise
        except FileNotFoundError:
            if scheme == "hf" and (server := silent_server()):
                # As for downloads: tokens are kept, so that the record would be missing for good.
                raise NotNow(
                    f"{_shown(location)}: {server} does not respond; try again, or download the images and set data.media_dir"
                ) from None
            raise Unreadable(f"{_shown(location)}: does not exist; correct the path, or set data.media_dir") from None
        except (OSError, ValueError) as error:
            reason = getattr(error, "strerror", None) or one_line(error)
            raise Unreadable(f"{_shown(location)}: cannot be read ({reason})") from None

    def _keep(self, content: bytes, hashed: str) -> str:
        """Write an image into the cache, unless it is there; return its location."""
        path = StoragePath(self.options.cache) / hashed[:2] / hashed
        try:
            if not path.exists():
                path.write_bytes(content)
        except OSError as error:
            raise RequestError(
                f"data.cache: {path} cannot be written ({error.strerror}); choose another folder"
            ) from None
        return path.location


def _refuse_odd(path: Path) -> None:
    """Refuse what would not be read to its end: folders, devices, and the files of /proc, which have no size."""
    if not path.is_file():
        kind = "a folder" if path.is_dir() else "a device or a pipe"
        raise Unreadable(f"{path}: is {kind}, not a file; correct the path")
    size = path.stat().st_size
    if not size:
        raise Unreadable(f"{path}: is empty")
    if size > MAX_BYTES:
        raise Unreadable(f"{path}: has more than {MAX_BYTES >> 20:,} MiB; scale the image down")


def _shown(location: str) -> str:
    """A location for messages, without options and secrets."""
    return str(StoragePath(location)) if "://" in location else location


def _printable(text: str) -> str:
    """A text in one line: the names of files may contain anything."""
    return "".join(letter if letter.isprintable() else repr(letter)[1:-1] for letter in text)
