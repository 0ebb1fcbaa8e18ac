"""Settings that rows shared by several workers cannot be combined with."""

from __future__ import annotations

from collections.abc import Iterator

from raysft.config.config import Config
from raysft.errors import as_yaml


def sequence_conflicts(config: Config) -> Iterator[str]:
    """Yield what is wrong with ``scaling.sequence_parallel``, as ``conflicts`` words it."""
    scaling, size = config.scaling, config.scaling.sequence_parallel
    if size == 1:
        return
    given = scaling.num_workers
    if any(bound % size for bound in (scaling.fewest_workers, scaling.most_workers)):
        whole = [-(-bound // size) * size for bound in (scaling.fewest_workers, scaling.most_workers)]
        yield (
            f"scaling.sequence_parallel={size} makes groups of {size} workers, but scaling.num_workers="
            f"{given if isinstance(given, int) else as_yaml(list(given))}; use scaling.num_workers="
            f"{whole[1] if isinstance(given, int) else as_yaml(whole)}, or another sequence_parallel"
        )
    if config.model.attention not in ("auto", "sdpa") and not config.model.attention.startswith("flash"):
        yield (
            f"scaling.sequence_parallel={size} computes attention with FlashAttention or SDPA, but model.attention="
            f"{config.model.attention}; set model.attention=auto"
        )
