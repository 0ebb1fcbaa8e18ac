"""The processor of a vision-language model: it knows which tokens stand for an image, and turns the image into pixels."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from raysft.errors import RequestError, one_line
from raysft.models.fingerprint import TOKENIZER_SUFFIXES

FILES = ("processor_config.json", "preprocessor_config.json")
"""A folder with one of these has a processor in addition to its tokenizer."""
NEIGHBOUR = (56, 56)
"""Pixels of an image that is placed next to another one."""
ROUGH = {"do_rescale": False, "do_normalize": False, "resample": 0}
"""Arguments with which a processor makes pixels of the same number, but other values, in a third of the time."""


def has_processor(folder: str | Path) -> bool:
    """True if a model's folder has a processor in addition to its tokenizer."""
    return any((Path(folder) / name).is_file() for name in FILES)


def load_processor(folder: str | Path, runs_code: bool = False) -> Any:
    """Load a model's processor; without torchvision, also those of models for videos, without their part for videos.

    Args:
        folder: of the model.
        runs_code: allow code that comes with the model to run.

    Raises:
        RequestError: it cannot be loaded.
    """
    from transformers import AutoProcessor

    kind = None if find_spec("torchvision") else _class_with_videos(Path(folder))
    try:
        return (_without_videos(kind) if kind else AutoProcessor).from_pretrained(folder, trust_remote_code=runs_code)
    except ImportError as error:
        raise RequestError(
            f"{folder}: its processor needs a package that is not installed ({one_line(error)}); install it on every node"
        ) from None
    except Exception as error:  # of any type: raised by its files and the code that they name
        raise RequestError(f"{folder}: its processor cannot be loaded ({one_line(error)}); check its files") from None


def file_template(folder: str | Path) -> str | None:
    """Return the chat template of a processor from its own file; None if it has none."""
    with suppress(OSError, ValueError, AttributeError):
        return json.loads((Path(folder) / "chat_template.json").read_text()).get("chat_template")
    return None


@dataclass(frozen=True)
class ProcessorFiles:
    """A processor as its files, for processes that may not see the model's folder."""

    digest: str
    """Hash of the files."""
    runs_code: bool
    """True if code that comes with the model may run."""
    contents: tuple[tuple[str, bytes], ...] = field(repr=False, compare=False)
    """(name, content) of each."""

    @classmethod
    def of(cls, folder: str | Path, runs_code: bool = False) -> ProcessorFiles:
        """Read the files of a model's folder from which its processor and its tokenizer are loaded."""
        names = sorted(
            path.name
            for path in Path(folder).iterdir()
            if path.suffix in TOKENIZER_SUFFIXES and path.is_file() and not path.name.endswith(".index.json")
        )
        contents = tuple((name, (Path(folder) / name).read_bytes()) for name in names)
        hashes = [(name, hashlib.sha256(content).hexdigest()) for name, content in contents]
        return cls(hashlib.sha256(repr(hashes).encode()).hexdigest(), runs_code, contents)

    def load(self) -> Any:
        """Load the processor, once in a process.

        Raises:
            RequestError: it cannot be loaded.
        """
        return _loaded(self)


@lru_cache(maxsize=2)
def _loaded(files: ProcessorFiles) -> Any:
    with TemporaryDirectory(prefix="processor-") as folder:
        for name, content in files.contents:
            (Path(folder) / name).write_bytes(content)
        return load_processor(folder, files.runs_code)


def image_text(processor: Any, width: int, height: int, beside: bool = False) -> str:
    """Return the text that a processor puts in place of its token for an image.

    Args:
        processor: of a model.
        width: of the image in pixels.
        height: of the image in pixels.
        beside: the conversation has other images, too; some processors divide an image into tiles only where it has none.

    Raises:
        RequestError: the processor does not say it for any image.
        Exception: anything the processor raises for an image of this size.
    """
    asked: dict[str, Any] = {
        "text": [processor.image_token * (2 if beside else 1)],
        "images": [_blank([(width, height), *([NEIGHBOUR] if beside else [])])],
        "return_text_replacement_offsets": True,
        "verbose": False,  # or its tokenizer warns of a text that is long for the model
    }
    try:
        made = processor(**asked, **ROUGH)
    except Exception:  # it does not know these arguments, or refuses the size
        made = processor(**asked)
    places = made.get("text_replacement_offsets")
    if not places or not places[0]:
        raise RequestError(
            f"model: {type(processor).__name__} does not define which tokens represent an image, so the model cannot be given "
            "images; use another model, or text-only data"
        )
    return places[0][0]["replacement"]


@lru_cache(maxsize=2)
def differs_alone(processor: Any) -> bool:
    """True if a processor has different tokens for an image that is alone in its conversation than for one among others."""
    try:
        alone, beside = (image_text(processor, *NEIGHBOUR, beside=each) for each in (False, True))
    except Exception:  # it does not take two images in a text
        return True
    return alone != beside


def processor_ids(processor: Any, text: str, sizes: Sequence[tuple[int, int]]) -> list[int]:
    """Return the tokens of a rendered conversation as ``apply_chat_template(…, tokenize=True)`` has them.

    Args:
        processor: of a model.
        text: the conversation, with the processor's token for each image.
        sizes: width and height of each image.
    """
    bos = processor.tokenizer.bos_token
    options = {"add_special_tokens": False} if bos and text.startswith(bos) else {}
    made = processor(text=[text], images=[_blank(sizes)], verbose=False, **options)
    return [int(token) for token in made["input_ids"][0]]


def _blank(sizes: Sequence[tuple[int, int]]) -> list[Any]:
    from PIL import Image

    return [Image.new("RGB", size) for size in sizes]


def _class_with_videos(folder: Path) -> Any:
    """The class of transformers that a folder's processor has, if it has a part for videos; None for all others."""
    import transformers

    for file in (*FILES, "tokenizer_config.json"):
        with suppress(OSError, ValueError, AttributeError):
            named = json.loads((folder / file).read_text()).get("processor_class")
            kind = getattr(transformers, named or "", None)
            if kind is not None:
                return kind if "video_processor" in kind.get_attributes() else None
    return None


def _without_videos(kind: Any) -> Any:
    """A processor class without its part for videos: transformers makes that one with torchvision alone."""

    class WithoutVideos(kind):
        @classmethod
        def get_attributes(cls) -> list[str]:
            return [name for name in super().get_attributes() if name != "video_processor"]

        @classmethod
        def from_args_and_dict(cls, args: Any, processor_dict: dict[str, Any], **kwargs: Any) -> Any:
            # Some classes (SmolVLM's) have no default for it.
            return super().from_args_and_dict(args, processor_dict, video_processor=None, **kwargs)

    WithoutVideos.__name__ = kind.__name__  # files of a saved processor name its class
    return WithoutVideos
