"""Settings that ``train.pure_bf16`` cannot be combined with."""

from __future__ import annotations

from collections.abc import Iterator

from raysft.config.config import Config


def pure_bf16_conflicts(config: Config) -> Iterator[str]:
    """Yield what contradicts ``train.pure_bf16``, as ``conflicts`` words it."""
    train = config.train
    if not train.pure_bf16:
        return
    if config.dtype != "bfloat16":
        yield (
            f"train.pure_bf16=true keeps everything in bfloat16, but model.dtype={config.dtype}; set model.dtype=bfloat16 or "
            "remove train.pure_bf16"
        )
    for name in ("optimizer", "parameters"):
        device = getattr(train.offload, name)
        if device != "none":
            yield (
                f"train.pure_bf16=true keeps everything on the device, but train.offload.{name}={device}; set it to none or "
                "remove train.pure_bf16"
            )
    if train.optimizer == "adai":
        yield (
            "train.pure_bf16=true keeps states in bfloat16, but train.optimizer=adai divides by 1 - 0.999, which bfloat16 "
            "rounds to 0; remove train.pure_bf16 or use another optimizer"
        )
    if train.optimizer == "badam":
        yield (
            "train.pure_bf16=true has no float32 copies, but train.optimizer=badam makes them for the block that it trains; "
            "remove train.pure_bf16 or use another optimizer"
        )
