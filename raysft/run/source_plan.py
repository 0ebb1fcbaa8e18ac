"""One source in the plan of a run: its examples, tokens and counts, and their line; and the file of records that cannot be used."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from raysft.data.shards.manifest import Manifest
from raysft.storage.json_files import flat, write_jsonl
from raysft.storage.run_directory import RunDirectory

COUNTED = {
    "media": "{:,} images",
    "rejected": "{:,} rejected",
    "dropped": "{:,} dropped",
    "dropped_tokens": "{:,} tokens in them",
    "truncated": "{:,} truncated",
    "truncated_tokens": "{:,} tokens cut off",
    "truncated_media": "{:,} images cut off",
    "animated": "the first frames of {:,} animations",
    "stray_marks": "{:,} with image placeholders as plain text",
    "unanswered": "{:,} without an answer",
    "split": "{:,} split",
    "split_pieces": "into {:,}",
    "control_tokens": "{:,} with control tokens in their text",
    "tools_as_text": "{:,} with tools written as text",
    "turns_left_out": "{:,} with turns that the chat template omits",
    "quoted_arguments": "{:,} with tool-call arguments as a quoted string",
    "repeated": "{:,} that are duplicates",
    "repeated_elsewhere": "{:,} that are duplicates of an earlier source",
    "evaluated": "{:,} that are evaluated on",
    "trained_on": "{:,} that are trained on",
    "left_out": "{:,} dropped as duplicates",
}
"""Counts of a source, in the words of the plan."""


@dataclass(frozen=True)
class SourcePlan:
    """One source, as used by the run."""

    records: int
    examples: int
    tokens: int
    loss_tokens: int
    longest: int
    rejected: int
    dropped: int
    counts: dict[str, int]
    """Numbers of examples and tokens that were ``truncated``, ``split`` and so on (``COUNTED``)."""
    formats: tuple[str, ...]
    """Formats of its records, as configured or detected."""
    reused: bool
    beyond: int = 0
    """Examples with more tokens than the model has positions."""

    def line(self) -> str:
        """The source in the words of the plan."""
        parts = [
            f"{self.examples:,} examples of {self.records:,} records",
            f"{self.tokens:,} tokens",
            f"{self.loss_tokens:,} trained",
            f"longest {self.longest:,}",
        ]
        counted = {"rejected": self.rejected, "dropped": self.dropped, **self.counts}
        parts += [text.format(counted[name]) for name, text in COUNTED.items() if counted.get(name)]
        return f"{'/'.join(self.formats)}, {', '.join(parts)}" + (" (from the cache)" if self.reused else "")


def plan_sources(
    manifests: Sequence[Manifest],
    duplicates: Mapping[str, Mapping[str, int]] | None = None,
    positions: int | None = None,
) -> dict[str, SourcePlan]:
    """Return each source as the run uses it, by name.

    Args:
        manifests: of the sources.
        duplicates: counts of duplicates, by source and kind.
        positions: of the model; None if it has no limit.
    """
    return {
        manifest.name: _source(manifest, (duplicates or {}).get(manifest.name, {}), positions) for manifest in manifests
    }


def write_unusable(directory: RunDirectory, manifests: Sequence[Manifest], kept: Sequence[dict[str, Any]] = ()) -> None:
    """Write the rejected and dropped records to the run directory, after those already there that should stay."""
    records = [flat(record) for manifest in manifests for record in (*manifest.rejected, *manifest.dropped)]
    write_jsonl(directory.rejected, [*(record for record in kept if record not in records), *records])


def _source(manifest: Manifest, duplicates: Mapping[str, int], positions: int | None) -> SourcePlan:
    return SourcePlan(
        records=manifest.records,
        examples=len(manifest),
        tokens=int(manifest.lengths.sum()),
        loss_tokens=int(manifest.loss_tokens.sum()),
        longest=int(manifest.lengths.max()),
        rejected=len(manifest.rejected),
        dropped=len(manifest.dropped),
        counts={**manifest.counts, **duplicates, **({"media": manifest.media} if manifest.media else {})},
        formats=manifest.formats,
        reused=manifest.reused,
        beyond=int((manifest.lengths > positions).sum()) if positions else 0,
    )
