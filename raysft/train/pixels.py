"""The pixels of the next microbatches, prepared in threads while the current one is computed."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import torch

from raysft.data.types import RowMedium
from raysft.errors import one_line
from raysft.media.files import Unreadable
from raysft.media.images import open_image, resized
from raysft.models.attention import without_adapters
from raysft.models.media_inputs import by_example, has_planes, media_inputs, rope_planes
from raysft.train.faults import BadImage
from raysft.train.job import Batch
from raysft.train.phases import Phases
from raysft.train.read_ahead import ReadAhead
from raysft.train.step_rows import cut, named_records

AHEAD = 3
"""Microbatches whose pixels exist at the same time, in addition to the current one's."""


class ImageInputs:
    """Prepares what a model takes as input for the images of a microbatch.

    Args:
        processor: of the model.
        model: the transformers or peft model.
    """

    def __init__(self, processor: Any, model: Any) -> None:
        self._processor, self._decoder = processor, without_adapters(model).base_model

    def __call__(self, microbatch: Batch, source: Any) -> dict[str, Any]:
        """Return ``images``, the tensors of all images over the rows, and ``position_ids`` if the images change them.

        Args:
            microbatch: rows, at least one of which has images.
            source: ``RowSource`` of the rows, to name records.

        Raises:
            BadImage: one cannot be used.
        """
        rows = zip(microbatch["row"].tolist(), microbatch["media"], microbatch["position_ids"], strict=True)
        examples = [
            [_opened(medium, row, source) for medium in of_example]
            for row, media, positions in rows
            for of_example in by_example(media, positions)
        ]
        try:
            images = media_inputs(self._processor, examples)
        except Exception as error:  # of any type: raised by the processor
            files = ", ".join(dict.fromkeys(medium.location for media in microbatch["media"] for medium in media))
            raise BadImage(f"the model's processor cannot use one of {files:.500} ({one_line(error)})") from error
        if not has_planes(self._decoder):
            return {"images": images}
        ids, positions = (torch.as_tensor(microbatch[name], dtype=torch.long) for name in ("input_ids", "position_ids"))
        starts = [[medium.start for medium in media] for media in microbatch["media"]]
        planes = rope_planes(self._decoder, ids, positions, starts, images["image_grid_thw"])
        return {"images": images, "position_ids": planes}


def _opened(medium: RowMedium, row: int, source: Any) -> Any:
    if medium.fault:
        raise BadImage(medium.fault)
    try:
        return resized(open_image(medium.content), medium.width, medium.height)
    except Unreadable as error:
        records = named_records(source, [row])
        raise BadImage(f"{medium.location}: {one_line(error)}; row {row} holds {records}") from None


def image_inputs(processor: Any, model: Any) -> ImageInputs | None:
    """Return what makes the inputs for images; None without a processor."""
    return None if processor is None else ImageInputs(processor, model)


class Pixels:
    """Makes the inputs for the images of one stream of rows, in order, a few microbatches ahead, even across steps.

    Args:
        source: ``RowSource`` of the rows.
        rows: rows of a microbatch.
        phases: told when this worker waits for them.
    """

    def __init__(self, source: Any, rows: int, phases: Phases | None = None) -> None:
        self._source, self._rows, self._phases = source, rows, phases or Phases()
        self._make: ImageInputs | None = None
        self._pool = ThreadPoolExecutor(AHEAD, "pixels")
        self._lock = threading.Lock()
        self._waiting: deque[Batch] = deque()
        self._made: deque[Future[dict[str, Any]] | None] = deque()
        self._open = True
        self._waited = 0.0

    def __enter__(self) -> Pixels:
        return self

    def __exit__(self, *_: object) -> None:
        with self._lock:
            self._open = False
            self._waiting.clear()
        self._pool.shutdown(wait=False, cancel_futures=True)

    def begin(self, make: ImageInputs) -> None:
        """Begin making pixels, for which the model must be loaded; rows may be read before."""
        self._make = make
        self._fill()

    def along(self, batches: Iterable[Batch]) -> Iterator[Batch]:
        """Yield the batches; work on the pixels of each begins when it is read."""
        for batch in batches:
            with self._lock:
                self._waiting.extend(cut(batch, self._rows))
            self._fill()
            yield batch

    def take(self) -> dict[str, Any]:
        """Return the inputs of the next microbatch, named as arguments of ``TokenLoss``; nothing if it has no images.

        Raises:
            BadImage: one of its images cannot be used.
        """
        self._fill()
        with self._lock:
            made = self._made.popleft()
        if made is None:
            return {}
        started = time.perf_counter()
        if not made.done():
            self._phases.enter("data")
        inputs = made.result()
        self._waited += time.perf_counter() - started
        self._fill()
        return inputs

    def waited(self) -> float:
        """Return the seconds that ``take`` has waited since the last call."""
        seconds, self._waited = self._waited, 0.0
        return seconds

    def _fill(self) -> None:
        with self._lock:
            while self._make and self._open and self._waiting and sum(each is not None for each in self._made) < AHEAD:
                microbatch = self._waiting.popleft()
                shown = "media" in microbatch and any(microbatch["media"])
                self._made.append(self._pool.submit(self._make, microbatch, self._source) if shown else None)


@contextmanager
def beside(
    make: ImageInputs | None, batches: Iterable[Batch], source: Any, rows: int
) -> Iterator[tuple[Iterable[Batch], Pixels | None]]:
    """Yield batches, read one ahead, and the pixels of their images; without images, the batches as they are.

    Args:
        make: makes the pixels; None if no row has images.
        batches: to read.
        source: ``RowSource`` of their rows.
        rows: rows of a microbatch.
    """
    if make is None or not source.has_media:
        yield batches, None
        return
    with Pixels(source, rows) as pixels, ReadAhead(pixels.along(batches)) as ahead:
        pixels.begin(make)
        yield iter(ahead.take, None), pixels
