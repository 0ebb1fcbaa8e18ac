"""The ``data`` section: sources, loss masks, rows."""

from __future__ import annotations

import json
import re
from datetime import date
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Field, field_validator, model_validator

from raysft.config.section import LARGEST, Fraction, Name, PathOrHubId, Positive, Section, Text, known_scheme
from raysft.errors import one_line

Format = Literal["alpaca", "sharegpt", "openai", "prompt_completion", "turns", "text", "texts", "tokenized"]
Column = Literal[
    "messages", "conversations", "instruction", "input", "output", "system", "history", "tools", "prompt", "completion",
    "turns", "text", "texts", "input_ids", "labels", "weight", "images", "videos", "audios",
]  # fmt: skip
Tag = Literal["role", "content", "user", "assistant", "observation", "function", "system"]

OF_CONVERSATIONS = (
    "mask_history", "template_options", "default_system", "thinking", "media_dir", "media_hosts", "image_max_pixels",
    "image_min_pixels",
)  # fmt: skip
"""Keys that say how conversations become text, images and masks; raw text (``stage: pt``) has no use for them."""


def _number_or_fraction(value: Any) -> Any:
    """Say which of the two a number is that is neither: pydantic would say what is wrong for both."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ValueError("must be a fraction below 1, or a whole number of examples")
    if isinstance(value, float) and not 0 <= value < 1:
        raise ValueError(
            "must be at least 0 and less than 1 if it is a fraction; write a number of examples without a decimal point"
        )
    if isinstance(value, int) and not 0 <= value <= LARGEST:
        raise ValueError(f"a number of examples must be between 0 and {LARGEST}")
    return value


def _slice_of_records(value: str) -> str:
    places = value.split(":")
    if len(places) != 2 or not all(re.fullmatch(r"(-?[0-9]+(_[0-9]+)*%?)?", place) for place in places):
        raise ValueError("must be a slice of records, such as :1000, 10%:20% or -100:")
    if "%" in value and any(abs(int(place.rstrip("%"))) > 100 for place in places if place):
        raise ValueError("percentages must be between -100% and 100%")
    return value


Holdout = Annotated[int | float, BeforeValidator(_number_or_fraction)]


class Source(Section):
    """One dataset."""

    name: Name
    """Name of the source in logs, metrics and ``rejected.jsonl``, and in ``data.registry`` if that is set."""
    path: PathOrHubId | Annotated[list[PathOrHubId], Field(min_length=1)] | None = None
    """File, folder or glob, or a list of them: local, in object storage (``s3://``, ``gs://``, ``hdfs://``, ``abfs://``), on the
    Hugging Face Hub (``hf://datasets/``) or ModelScope (``ms://datasets/``), or ``package:NAME/GLOB`` for files of an installed
    Python package. Not required for a source of ``data.registry``. Keep credentials in the environment, a profile or the
    machine's role; configs that contain credentials are rejected."""
    format: Format | None = None
    """Record format: ``alpaca`` (instruction, input, output), ``sharegpt`` (conversations with from/value), ``openai`` (messages
    with role/content), ``prompt_completion`` (two texts or two lists of messages), ``turns`` (a list of texts that alternates
    between user and assistant), ``texts`` (a list of pairs of user and assistant), ``text``, or ``tokenized`` (input_ids, labels).
    Default: inferred from the columns."""
    columns: dict[Column, Text | None] = {}
    """Columns whose names in the file differ from the field names: field → column, for example ``{output: answer}``, or
    ``null`` to ignore a field. Once a column is mapped to one field, it is not also read as the field of its own name."""
    tags: dict[Tag, Text] = {}
    """Keys and roles that have different names in the conversations: ``role`` and ``content`` are the keys of a turn; ``user``,
    ``assistant``, ``observation``, ``function`` and ``system`` are its roles."""
    weight: Annotated[float, Field(gt=0)] | None = None
    """Weight of this source relative to the others; requires ``data.mixing`` other than concat. Default: 1."""
    slice: Annotated[str, AfterValidator(_slice_of_records)] | None = None
    """Use only a slice of the records, as ``datasets`` writes it: ``:1000``, ``10%:20%`` or ``-100:``. If one end is a
    percentage, a number at the other end is also read as a percentage."""
    num_samples: Positive | None = None
    """Sample N records at random, seeded with ``run.seed``. A source with fewer records contributes all of them and repeats
    some."""
    max_examples: Positive | None = None
    """Use only the first N records, counted after sampling with ``num_samples``. Default: ``data.max_examples``."""

    def column(self, field: str) -> str | None:
        """Column that a field is read from; None if the field is not read.

        >>> Source(name="s", columns={"instruction": "input"}).column("input")
        """
        if field in self.columns:
            return self.columns[field]  # type: ignore[index]
        return None if field in self.columns.values() else field


class DataSection(Section):
    """Sources, loss masks and rows."""

    train: Annotated[list[Source], Field(min_length=1)]
    """Sources to train on; each has the keys listed under ``data.train[]``."""
    eval: list[Source] = []
    """Sources to evaluate and generate on, with the same keys as ``data.train``."""
    registry: PathOrHubId | None = None
    """A ``dataset_info.json`` in LLaMA-Factory's format, or the folder that contains it. A source without a path is looked up
    in it by name. As in LLaMA-Factory, only the columns that the entry names are read. Settings of the source override those of
    the entry."""
    mixing: Literal["concat", "first_exhausted", "all_exhausted"] = "concat"
    """``concat``: use every example once per epoch. ``first_exhausted`` and ``all_exhausted``: in each epoch, draw examples in
    proportion to the weights of the sources until the first source, or every source, is used up (smaller sources repeat)."""
    max_examples: Positive | None = None
    """Use only the first N records of each source that has no ``max_examples`` of its own."""
    shuffle: bool = True
    """Train in random order, reshuffled every epoch. ``false``: in file order, one source after another; packed rows are
    ordered by their first example."""
    duplicates: Literal["keep", "drop"] = "keep"
    """What to do with duplicate training examples: those with the same roles, contents, tool calls and functions, ignoring
    whitespace. ``keep``: train on them, and report how many there are. ``drop``: train only on the first of several copies, and
    on none that also occurs in an evaluation set; evaluation sets are left unchanged. Copies drawn by ``num_samples`` count as
    duplicates, too."""
    holdout: Holdout = 0.0
    """Examples to hold out of training and evaluate on, under the names of their sources: a fraction of each training source
    (``0.1``), or a total number of examples across all of them (``500``; ``1`` is one example). A stable hash of each example's
    opening decides, so that examples with the same opening always end up on the same side of the split, in every run; a number
    is rounded up so that no opening is split."""
    sequence_length: Annotated[int, Field(ge=8, le=LARGEST, strict=True)] = 2048
    """Tokens per row."""
    packing: bool = True
    """Pack several examples into one row; they do not attend to each other. With ``stage: pt``: concatenate documents and cut
    the stream into full rows."""
    document_mask: bool = True
    """With ``stage: pt``: documents in the same row do not attend to each other."""
    mask_history: bool = False
    """Compute the loss only on the last assistant turn of each conversation."""
    train_on_prompt: bool = False
    """Compute the loss on every token of a conversation, not only on assistant turns."""
    on_overflow: Literal["truncate", "split", "drop", "error"] = "error"
    """What to do with a conversation longer than a row: truncate it, split it into several examples, drop it, or stop with an
    error. Affected conversations are counted. Raw text is never truncated."""
    keep_prompt: Literal["head", "tail"] = "head"
    """With ``on_overflow: truncate``: which end of a prompt to keep."""
    control_tokens_in_text: Literal["keep", "escape", "reject"] = "keep"
    """What to do with text that spells a special token (``<|im_end|>``). ``keep``: encode it as that token, as
    ``apply_chat_template`` does; ``escape``: encode it as plain text; ``reject``: reject the record. Affected records are
    counted."""
    template_options: dict[str, Any] = {}
    """Variables for the chat template, for example ``{enable_thinking: false}``."""
    default_system: str | None = None
    """System message for conversations that have none or an empty one, instead of the template's default. ``''``: no system
    message, not even the template's default. ``null``: the template's default."""
    thinking: Literal["template", "keep", "empty", "last"] = "template"
    """How to handle the reasoning of assistant turns, given in ``<think>`` tags at the start of the content or in
    ``reasoning_content``. ``template``: leave it to the chat template; many omit the reasoning of earlier turns. ``keep``:
    render and train on the reasoning of all turns. ``empty``: like ``keep``, but turns without reasoning get an empty reasoning
    block. ``last``: like ``empty`` for the last turn, with no reasoning in the turns before it. With ``template_options:
    {enable_thinking: false}``, ``empty`` and ``last`` remove all reasoning, even in the middle of an answer, and give each turn
    an empty reasoning block, which is part of the prompt and not trained on."""
    media_dir: PathOrHubId | None = None
    """Folder or URI that relative image paths are resolved against. Default: the folder of ``data.registry`` for files that it
    lists, and the folder of the data file for all others."""
    media_hosts: list[Text] = []
    """Hosts that images may be downloaded from (``images.example.org``, or ``localhost:8080``); each image is downloaded once,
    into the cache. Records with images on other hosts are rejected, as are redirects to them."""
    image_max_pixels: Positive | None = None
    """Maximum number of pixels per image: larger images are scaled down, keeping their aspect ratio, before the model's
    processor applies its own limits. Fewer pixels mean fewer tokens."""
    image_min_pixels: Positive | None = None
    """Minimum number of pixels per image: smaller images are scaled up."""
    max_rejected: Fraction = 0.0
    """Maximum fraction of unusable records; above it, the run stops. ``rejected.jsonl`` lists them."""
    cache: Text | None = None
    """Folder for tokenized shards, converted models and results of evaluations before the first step, shared by all runs: a
    path that every node of the cluster can access, or a URI. Default: ``{run.storage}/cache``."""

    @field_validator("cache")
    @classmethod
    def _cache_is_known(cls, value: str | None) -> str | None:
        return value and known_scheme(value)

    @field_validator("media_hosts")
    @classmethod
    def _hosts_are_names(cls, value: list[str]) -> list[str]:
        for host in value:
            if not re.fullmatch(r"([A-Za-z0-9_-]+\.)*[A-Za-z0-9_-]+(:[0-9]+)?|\[[0-9a-fA-F:]+\](:[0-9]+)?", host):
                raise ValueError(f"{host} is not a valid host name; write it as images.example.org or localhost:8080")
        return value

    @field_validator("media_dir")
    @classmethod
    def _media_are_in_a_known_place(cls, value: str | None) -> str | None:
        return value if value is None or value.startswith(("package:", "hf://", "ms://")) else known_scheme(value)

    @field_validator("template_options")
    @classmethod
    def _options_are_plain(cls, value: dict[str, Any]) -> dict[str, Any]:
        reserved = {
            "messages",
            "conversations",
            "tools",
            "documents",
            "chat_template",
            "add_generation_prompt",
        } & value.keys()
        if reserved:
            raise ValueError(f"{sorted(reserved)[0]} is set by raysft; remove it")
        # YAML reads 2024-07-26 as a date, but templates expect text.
        plain = {key: option.isoformat() if isinstance(option, date) else option for key, option in value.items()}
        try:
            json.dumps(plain)
        except TypeError as error:
            raise ValueError(
                f"must contain only strings, numbers, booleans, lists and mappings ({one_line(error)})"
            ) from None
        return plain

    @model_validator(mode="after")
    def _masks_agree(self) -> DataSection:
        if self.mask_history and self.train_on_prompt:
            raise ValueError("mask_history and train_on_prompt contradict each other; set only one of them")
        return self

    @model_validator(mode="after")
    def _pixels_agree(self) -> DataSection:
        if self.image_max_pixels and self.image_min_pixels and self.image_min_pixels > self.image_max_pixels:
            raise ValueError(
                f"image_min_pixels={self.image_min_pixels} is greater than image_max_pixels={self.image_max_pixels}; lower it"
            )
        return self

    @model_validator(mode="after")
    def _names_are_unique(self) -> DataSection:
        for sources in (self.train, self.eval):
            names = [source.name for source in sources]
            repeated = {name for name in names if names.count(name) > 1}
            if repeated:
                raise ValueError(f"two sources are named {sorted(repeated)[0]!r}; rename one of them")
        if self.holdout:
            clash = {s.name for s in self.train} & {s.name for s in self.eval}
            if clash:
                raise ValueError(
                    f"data.train and data.eval both have a source named {sorted(clash)[0]!r}, but data.holdout={self.holdout} "
                    "evaluates under the names of data.train; rename one of them"
                )
        return self

    @model_validator(mode="after")
    def _sources_are_complete(self) -> DataSection:
        for source in (*self.train, *self.eval):
            if source.path is None and self.registry is None:
                raise ValueError(f"source {source.name!r} has no path; set its path, or set data.registry")
        weighted = [source.name for source in self.train if source.weight is not None]
        if weighted and self.mixing == "concat":
            raise ValueError(
                f"source {weighted[0]!r} has a weight, but data.mixing=concat ignores weights; "
                "set data.mixing to first_exhausted or all_exhausted"
            )
        return self
