"""Count the examples of a run that say the same as others."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from raysft.data.rows.copies import find_copies
from raysft.data.rows.mixture import Mixing
from raysft.data.shards.manifest import Manifest, load_digests
from raysft.errors import RequestError


@dataclass(frozen=True)
class Duplicates:
    """Numbers of examples by source and by kind; kinds without any are left out."""

    train: dict[str, dict[str, int]]
    """Training source → ``repeated`` (an earlier example of the source is the same), ``repeated_elsewhere`` (one of an earlier
    source is), ``evaluated`` (an evaluation set has it) and ``left_out`` (with ``data.duplicates: drop``)."""
    evaluation: dict[str, dict[str, int]]
    """Evaluation set → ``repeated`` and, unless such examples are left out of training, ``trained_on``."""


def count_duplicates(
    train: Sequence[Manifest], evaluation: Sequence[Manifest], drop: bool, mixing: Mixing = "concat"
) -> Duplicates:
    """Count duplicates by the hashes in the manifests.

    Args:
        train: manifests of the training sources.
        evaluation: manifests of the evaluation sets.
        drop: leave duplicates out of training.
        mixing: as ``mixture`` takes it.

    Raises:
        RequestError: no example is left, or none of a source that is to have a share.
    """
    copies = find_copies(*([load_digests(each.path) for each in manifests] for manifests in (train, evaluation)))
    none = np.zeros(len(copies.elsewhere), bool)
    columns = {
        "repeated": copies.repeated[: len(none)],
        "repeated_elsewhere": copies.elsewhere,
        "evaluated": copies.evaluated,
        "left_out": copies.dropped if drop else none,
    }
    counted = Duplicates(
        _by_set(train, columns),
        _by_set(
            evaluation, {"repeated": copies.repeated[len(none) :], **({} if drop else {"trained_on": copies.trained})}
        ),
    )
    emptied = [each for each in train if counted.train[each.name].get("left_out") == len(each)]
    if emptied and (mixing != "concat" or len(emptied) == len(train)):
        raise RequestError(
            f"source {emptied[0].name!r}: all of its {len(emptied[0]):,} examples are in an evaluation set or an earlier "
            "source, and data.duplicates=drop removes them; remove the source, or set data.duplicates=keep"
        )
    return counted


def _by_set(manifests: Sequence[Manifest], columns: dict[str, np.ndarray]) -> dict[str, dict[str, int]]:
    """Sum columns of all examples up for each set."""
    edges = np.cumsum([0, *map(len, manifests)]).tolist()
    return {
        manifest.name: {name: number for name, values in columns.items() if (number := int(values[first:stop].sum()))}
        for manifest, first, stop in zip(manifests, edges, edges[1:], strict=False)
    }
