"""The ``data`` section: sources, masks, rows."""

from __future__ import annotations

import json
from datetime import date
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from raysft.config.section import Fraction, Name, Positive, Section, Text, known_scheme

Format = Literal["alpaca", "sharegpt", "openai", "prompt_completion", "turns", "text", "tokenized"]
Column = Literal[
    "messages", "conversations", "instruction", "input", "output", "system", "history", "tools", "prompt", "completion",
    "turns", "text", "input_ids", "labels", "weight",
]  # fmt: skip
Tag = Literal["role", "content", "user", "assistant", "observation", "function", "system"]


class Source(Section):
    """One dataset."""

    name: Name
    """Name of the source in logs, metrics and rejected.jsonl; with ``data.registry``, its name there."""
    path: Text | Annotated[list[Text], Field(min_length=1)] | None = None
    """File, folder or glob, or a list of them; local, or on a filesystem that pyarrow reads (``s3://``, ``gs://``,
    ``hdfs://``, ``hf://datasets/``), or ``package:NAME/GLOB`` inside an installed Python package. Not needed for a
    source of ``data.registry``. Credentials belong into the environment, a profile or a machine's role: one in a config is
    refused."""
    format: Format | None = None
    """Shape of a record: ``alpaca`` (instruction, input, output), ``sharegpt`` (conversations of from/value), ``openai``
    (messages of role/content), ``prompt_completion`` (two texts, or two lists of messages), ``turns`` (a list of texts,
    the user's and the assistant's by turns), ``text``, ``tokenized`` (input_ids, labels). Default: found from the columns."""
    columns: dict[Column, Text | None] = {}
    """Where a field has another name in the file: field → column, for example ``{output: answer}``; null for a field that is
    not to be read. A column that stands for one field is not read for the field of its own name as well."""
    tags: dict[Tag, Text] = {}
    """Where a conversation uses other words: ``role`` and ``content`` name the keys of a turn; ``user``, ``assistant``,
    ``observation``, ``function`` and ``system`` are its roles."""
    weight: Annotated[float, Field(gt=0)] | None = None
    """Share of this source in the mixture, relative to the others (``data.mixing``). Default: 1."""
    num_samples: Positive | None = None
    """Draw N records at random, by ``run.seed``. Where there are fewer, all are taken, and as many again as lack."""
    max_examples: Positive | None = None
    """Read only the first N records: of the file, or of those that were drawn."""

    def column(self, field: str) -> str | None:
        """The column that a field is read from; None where it is not read.

        >>> Source(name="s", columns={"instruction": "input"}).column("input")
        """
        if field in self.columns:
            return self.columns[field]  # type: ignore[index]
        return None if field in self.columns.values() else field


class DataSection(Section):
    train: Annotated[list[Source], Field(min_length=1)]
    """Sources to train on."""
    eval: list[Source] = []
    """Sources to evaluate and generate on."""
    registry: Text | None = None
    """A ``dataset_info.json`` as LLaMA-Factory has it, or its folder: a source without a path is looked up there by name. As
    there, a column that its entry does not name is not read; what a source says itself goes before what its entry says."""
    mixing: Literal["concat", "first_exhausted", "all_exhausted"] = "concat"
    """``concat``: every example once an epoch. Otherwise examples are drawn in the proportion of the sources' weights, anew
    in each epoch, until the first source is used up, or until each one was (smaller ones come again)."""
    holdout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Share of each training source that is kept out of training and evaluated under the source's name. A stable hash
    of an example's opening decides, so that examples that open alike stay on one side, in this and any other run."""
    sequence_length: Annotated[int, Field(ge=8, strict=True)] = 2048
    """Tokens that one row holds."""
    packing: bool = True
    """Put several examples into one row; they do not see each other. With ``stage: pt``: join documents and cut full rows."""
    document_mask: bool = True
    """With ``stage: pt``: documents in one row do not see each other."""
    mask_history: bool = False
    """Train only on the last assistant turn of each conversation."""
    train_on_prompt: bool = False
    """Train on every token of a conversation, not only on what the assistant wrote."""
    on_overflow: Literal["truncate", "split", "drop", "error"] = "error"
    """A conversation longer than a row is shortened, cut into several examples, dropped, or stops the run; always counted.
    Raw text is never shortened."""
    keep_prompt: Literal["head", "tail"] = "head"
    """With ``on_overflow: truncate``: which end of a prompt is kept."""
    control_tokens_in_text: Literal["keep", "escape", "reject"] = "keep"
    """A special token of the tokenizer that is written out in a text (``<|im_end|>``): it acts as one, as in
    ``apply_chat_template``; is encoded as plain characters; or the record is rejected. Always counted."""
    template_options: dict[str, Any] = {}
    """Variables for the chat template, for example ``{enable_thinking: false}``."""
    max_rejected: Fraction = 0.0
    """Share of records that may be unusable before the run stops; each one is kept in rejected.jsonl."""
    cache: Text | None = None
    """Folder of tokenized shards and converted models, shared by runs: a path that every node of the cluster sees, or a URI.
    Default: ``{run.storage}/cache``."""

    @field_validator("cache")
    @classmethod
    def _cache_is_known(cls, value: str | None) -> str | None:
        return value and known_scheme(value)

    @field_validator("template_options")
    @classmethod
    def _options_are_plain(cls, value: dict[str, Any]) -> dict[str, Any]:
        taken = {
            "messages",
            "conversations",
            "tools",
            "documents",
            "chat_template",
            "add_generation_prompt",
        } & value.keys()
        if taken:
            raise ValueError(f"{sorted(taken)[0]} is what the template is given anyway; take it out")
        # YAML makes a date of 2024-07-26, where templates want the text.
        plain = {key: each.isoformat() if isinstance(each, date) else each for key, each in value.items()}
        try:
            json.dumps(plain)
        except TypeError as error:
            raise ValueError(f"texts, numbers, booleans, lists and mappings belong there ({error})") from None
        return plain

    @model_validator(mode="after")
    def _masks_agree(self) -> DataSection:
        if self.mask_history and self.train_on_prompt:
            raise ValueError("mask_history and train_on_prompt contradict each other; set one of them")
        return self

    @model_validator(mode="after")
    def _names_are_unique(self) -> DataSection:
        for sources in (self.train, self.eval):
            names = [source.name for source in sources]
            twice = {name for name in names if names.count(name) > 1}
            if twice:
                raise ValueError(f"two sources are named {sorted(twice)[0]!r}; give each its own name")
        if self.holdout:
            clash = {s.name for s in self.train} & {s.name for s in self.eval}
            if clash:
                raise ValueError(
                    f"{sorted(clash)[0]!r} is in data.train and data.eval; with data.holdout > 0 names must differ"
                )
        return self

    @model_validator(mode="after")
    def _sources_are_complete(self) -> DataSection:
        for source in (*self.train, *self.eval):
            if source.path is None and self.registry is None:
                raise ValueError(f"source {source.name!r} has no path; give it one, or name data.registry")
        weighted = [source.name for source in self.train if source.weight is not None]
        if weighted and self.mixing == "concat":
            raise ValueError(
                f"source {weighted[0]!r} has a weight, which data.mixing=concat does not use; "
                "set data.mixing to first_exhausted or all_exhausted"
            )
        return self
