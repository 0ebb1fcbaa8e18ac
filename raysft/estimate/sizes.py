"""The numbers of a model and of its activations from which the memory of any setup follows. Pure."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

GIB, MIB = 1 << 30, 1 << 20


def amount(value: float) -> str:
    """Format bytes for messages.

    >>> amount(3.25 * GIB), amount(52_000_000)
    ('3.2 GiB', '49.6 MiB')
    """
    return f"{value / GIB:.1f} GiB" if value >= 0.1 * GIB else f"{value / MIB:.1f} MiB"


@dataclass(frozen=True)
class Weight:
    """Weights of one shape that are trained."""

    shape: tuple[int, ...]
    inner: bool
    """True for a matrix inside the layers, neither embedding nor output head."""
    count: int
    """Number of such weights."""

    @property
    def elements(self) -> int:
        """Elements of all of them."""
        return self.count * math.prod(self.shape)


@dataclass(frozen=True)
class ModelSizes:
    """Sizes of a model and its adapters, in elements."""

    total: int
    """Of all weights, tied ones once."""
    trained: tuple[Weight, ...]
    quantizable: int
    """Of the linear layers inside the decoder, which bitsandbytes quantizes."""
    largest: int
    """Of the largest weight."""
    largest_linear: int
    """Of the largest linear layer inside the decoder."""
    largest_layer: int
    """Of the largest layer of the decoder; also the block that BAdam trains at a time."""
    small: int
    """Of weights with fewer than 100,000 elements, which ZeRO-3 keeps whole."""
    tied_head: bool = False
    """True if the output head is the embedding, and is trained."""
    head: int = 0
    """Of the output head, if it is trained."""
    experts: int = 0
    """Of the experts that compute in the kernel of ``model.experts: kt``, which ``total`` does not count."""
    experts_of_layer: int = 0
    """Of those of one layer."""
    adapters_in_kernel: int = 0
    """Of the adapters that it computes with, filled up to ranks that it has."""
    bytes_in_kernel: float = 0.0
    """Bytes that their kernel needs besides, for each token of a microbatch."""

    @property
    def trained_elements(self) -> int:
        """Elements of all trained weights."""
        return sum(weight.elements for weight in self.trained)

    @property
    def largest_trained(self) -> int:
        """Elements of the largest trained weight."""
        return max((math.prod(weight.shape) for weight in self.trained), default=0)


@dataclass(frozen=True)
class Line:
    """A number of bytes that grows with the rows of a microbatch: ``fixed + rows · per_row``."""

    fixed: float
    per_row: float

    @classmethod
    def through(cls, one: float, two: float) -> Line:
        """Return the line through the values for one row and for two.

        >>> Line.through(30, 50)
        Line(fixed=10, per_row=20)
        """
        return cls(2 * one - two, two - one)

    def at(self, rows: float) -> float:
        """Return the bytes for this many rows; never fewer than 0."""
        return max(0.0, self.fixed + rows * self.per_row)


@dataclass(frozen=True)
class Layers:
    """Layers of the decoder that are alike."""

    count: int
    saved: Line
    """Bytes that each keeps from its forward pass for its backward pass."""
    forward: Line
    """Most bytes that its forward pass needs at a time."""
    backward: Line
    """Most bytes that its backward pass, with what it computes again, needs at a time, beyond what was saved."""
    recomputed: bool = False
    """True if they are computed again, so that they keep their inputs alone."""


@dataclass(frozen=True)
class LossBytes:
    """Bytes of the loss for a number of rows, beyond what the decoder has saved."""

    peak: float
    """Most at a time, in forward and backward."""
    left: float
    """When the backward pass of the last layer begins: gradients of the hidden states and of the head."""


@dataclass(frozen=True)
class Images:
    """Bytes of the images of a microbatch and of what encodes them, before the decoder; the lines grow with their number."""

    pixels: Line
    """What the model is given."""
    saved: Line
    """Kept for the backward pass, as far as parts that encode them are trained."""
    forward: Line
    """Most at a time while they are encoded."""
    backward: Line
    """Most at a time in the backward pass of what encodes them, with what was saved; 0 if nothing of it is trained."""
    per_row: float = 0.0
    """Images of a row."""

    def at(self, rows: int) -> ImageBytes:
        """Return the bytes for this many rows."""
        lines = (self.pixels, self.saved, self.forward, self.backward)
        return ImageBytes(*(line.at(rows * self.per_row) if self.per_row else 0.0 for line in lines))


class ImageBytes(NamedTuple):
    """Bytes of the images of a microbatch; the fields are those of ``Images``."""

    pixels: float = 0.0
    saved: float = 0.0
    forward: float = 0.0
    backward: float = 0.0


@dataclass(frozen=True)
class Activations:
    """Bytes that a forward and backward pass needs beyond weights and stored gradients."""

    tokens: int
    """Tokens of a row."""
    embedded: Line
    """Kept by what comes before the layers."""
    layers: tuple[Layers, ...]
    loss: Mapping[int, LossBytes]
    """Rows of a microbatch → bytes of the loss."""
    tail: Line
    """Most bytes while the first layer's and the embedding's gradients are computed."""
    traced: bool
    """False if a formula gave these numbers."""
    images: Images | None = None
    """None without images, or if what encodes them cannot be traced."""

    def saved(self, rows: int) -> float:
        """Return what the decoder keeps for the backward pass."""
        return self.embedded.at(rows) + sum(layers.count * layers.saved.at(rows) for layers in self.layers)

    def inputs(self, rows: int) -> tuple[float, float]:
        """Return what all recomputed layers keep for the backward pass, and the most that one of them does."""
        kept = [(layers.count, layers.saved.at(rows)) for layers in self.layers if layers.recomputed]
        return sum(count * saved for count, saved in kept), max((saved for _, saved in kept), default=0.0)

    def loss_at(self, rows: int) -> LossBytes:
        """Return the bytes of the loss: those of the next larger number of rows that is known, or as the largest two continue."""
        known = sorted(self.loss)
        above = next((each for each in known if each >= rows), None)
        if above is not None:
            return self.loss[above]
        last = known[-1]
        before = known[-2] if len(known) > 1 else 0
        largest, smaller = self.loss[last], self.loss.get(before, LossBytes(0.0, 0.0))
        steps = (rows - last) / (last - before)
        return LossBytes(
            largest.peak + steps * max(0.0, largest.peak - smaller.peak),
            largest.left + steps * max(0.0, largest.left - smaller.left),
        )

    def backward(self, rows: int) -> float:
        """Return the most bytes that the backward pass of a layer needs beyond what was saved."""
        return max((layers.backward.at(rows) for layers in self.layers), default=0.0)

    def images_at(self, rows: int) -> ImageBytes:
        """Return the bytes of the images of this many rows."""
        return ImageBytes() if self.images is None else self.images.at(rows)

    def to_dict(self) -> dict[str, Any]:
        """The fields as JSON can hold them."""
        return asdict(self)

    @classmethod
    def from_dict(cls, content: Mapping[str, Any]) -> Activations:
        """Read what ``to_dict`` returns."""
        layers = tuple(
            Layers(
                each["count"],
                Line(**each["saved"]),
                Line(**each["forward"]),
                Line(**each["backward"]),
                each["recomputed"],
            )
            for each in content["layers"]
        )
        loss = {int(rows): LossBytes(**each) for rows, each in content["loss"].items()}
        embedded, tail = Line(**content["embedded"]), Line(**content["tail"])
        return cls(content["tokens"], embedded, layers, loss, tail, content["traced"], _images(content["images"]))


def _images(content: Mapping[str, Any] | None) -> Images | None:
    if content is None:
        return None
    lines = (Line(**content[name]) for name in ("pixels", "saved", "forward", "backward"))
    return Images(*lines, per_row=content["per_row"])


def weights_of(shapes: Sequence[tuple[tuple[int, ...], bool]]) -> tuple[Weight, ...]:
    """Group weights, (shape, whether it is a matrix inside the layers), that are alike.

    >>> weights_of([((4, 2), True), ((4, 2), True)])
    (Weight(shape=(4, 2), inner=True, count=2),)
    """
    counts: dict[tuple[tuple[int, ...], bool], int] = {}
    for each in shapes:
        counts[each] = counts.get(each, 0) + 1
    return tuple(Weight(shape, inner, count) for (shape, inner), count in counts.items())
