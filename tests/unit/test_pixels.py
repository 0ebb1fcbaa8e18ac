"""Pixels are made in order, a few microbatches ahead, also across steps; what cannot be made is named."""

from __future__ import annotations

import threading
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from raysft.data.types import RowMedium
from raysft.models.media_inputs import media_inputs
from raysft.train.faults import BadImage
from raysft.train.phases import Phases
from raysft.train.pixels import AHEAD, ImageInputs, Pixels
from raysft.train.step_rows import cut
from tests.tiny_vision import tiny_processor
from tests.vision_shards import draw

CPU = torch.device("cpu")
WITHIN_SECONDS = 30


def batch(numbers: list[int], shown: bool = True) -> dict[str, np.ndarray]:
    """Rows of which each may have an image."""
    media = np.empty(len(numbers), object)
    media[:] = [(RowMedium("image", "a.png", "", 1, 1, 0, 1),) if shown else () for _ in numbers]
    ids = np.tile(np.arange(8), (len(numbers), 1))
    return {
        "row": np.array(numbers),
        "tokens": np.full(len(numbers), 8),
        "input_ids": ids,
        "position_ids": ids,
        "media": media,
    }


class Maker:
    """Makes nothing but the numbers of rows, when it may."""

    def __init__(self) -> None:
        self.may, self.begun = threading.Semaphore(0), []
        self.begins = threading.Semaphore(0)

    def __call__(self, microbatch: dict[str, np.ndarray], source: Any) -> dict[str, Any]:
        self.begun.append(microbatch["row"].tolist())
        self.begins.release()
        assert self.may.acquire(timeout=WITHIN_SECONDS)
        return {"row": torch.as_tensor(microbatch["row"])}

    def wait(self, number: int) -> None:
        """Wait until so many more microbatches are begun."""
        for _ in range(number):
            assert self.begins.acquire(timeout=WITHIN_SECONDS)


def test_pixels_of_a_few_microbatches_exist_in_the_order_of_the_rows():
    make, phases = Maker(), Phases()
    with Pixels(None, 2, phases) as pixels:
        list(
            pixels.along([batch(list(range(6))), batch([6, 7, 8, 9])])
        )  # 3 and 2 microbatches: the next step's are made too
        pixels.begin(make)  # type: ignore[arg-type]
        make.wait(AHEAD)
        assert sorted(make.begun) == [[0, 1], [2, 3], [4, 5]]
        taken = []
        for _ in range(5):
            make.may.release(2)
            taken.append(pixels.take()["row"].tolist())
            assert len(make.begun) <= len(taken) + AHEAD
        assert taken == [[0, 1], [2, 3], [4, 5], [6, 7], [8, 9]]


def test_rows_without_images_take_no_place():
    make = Maker()
    make.may.release(99)
    with Pixels(None, 1) as pixels:
        pixels.begin(make)  # type: ignore[arg-type]
        list(pixels.along([batch([0], shown=False), batch([1]), batch([2], shown=False)]))
        taken = [pixels.take() for _ in range(3)]
    assert [bool(each) for each in taken] == [False, True, False]
    assert make.begun == [[1]]


def test_a_wait_is_measured_and_shown():
    make, phases = Maker(), Phases()
    with Pixels(None, 1, phases) as pixels:
        pixels.begin(make)  # type: ignore[arg-type]
        list(pixels.along([batch([0]), batch([1])]))
        phases.enter("forward", 3)
        threading.Timer(0.3, make.may.release, [9]).start()
        pixels.take()
        assert phases.moment == "reading the rows of step 3"
        assert 0.2 < pixels.waited() < WITHIN_SECONDS
        assert pixels.waited() == 0


def test_no_thread_is_left():
    make = Maker()
    with Pixels(None, 1) as pixels:
        pixels.begin(make)  # type: ignore[arg-type]
        batches = pixels.along([batch([number]) for number in range(9)])
        for _ in range(8):
            next(batches)
        make.wait(AHEAD)
    make.may.release(9)
    threads = [thread for thread in threading.enumerate() if thread.name.startswith("pixels")]
    for thread in threads:
        thread.join(WITHIN_SECONDS)
        assert not thread.is_alive()
    assert len(make.begun) == AHEAD
    next(batches)  # a reader that was not asked to end yet harms nobody


def test_an_image_that_cannot_be_used_is_named_with_its_records(tmp_path):
    (file,) = draw(tmp_path, 1)
    whole = RowMedium("image", str(file), "", 28, 28, 0, 4, content=file.read_bytes())
    broken = RowMedium("image", "b.png", "", 28, 28, 4, 8, content=file.read_bytes()[:50])
    changed = RowMedium("image", "c.png", "", 28, 28, 4, 8, fault="d: f:3: c.png: has changed")
    make = ImageInputs(tiny_processor("llava"), _Model())
    for media, message in (
        ((whole, broken), r"b.png: is corrupt .*; row 5 holds d: f:2"),
        ((changed,), "d: f:3: c.png: has changed"),
    ):
        rows = batch([5])
        rows["media"][0] = media
        with Pixels(_Source(), 1) as pixels:
            pixels.begin(make)
            list(pixels.along([rows]))
            with pytest.raises(BadImage, match=message):
                pixels.take()


def test_images_are_brought_to_the_size_that_was_tokenized(tmp_path):
    (file,) = draw(tmp_path, 1, [(100, 50)])
    rows = batch([5])
    rows["media"][0] = (RowMedium("image", str(file), "", 56, 28, 0, 2, content=file.read_bytes()),)
    made = ImageInputs(tiny_processor("qwen2.5-vl"), _Model())(next(iter(cut(rows, 1))), _Source())
    assert made["images"]["image_grid_thw"].tolist() == [[1, 2, 4]]  # patches of 14 pixels


def test_images_of_a_row_are_made_example_by_example(tmp_path):
    """LLaVA-OneVision divides an image that is alone in its example into tiles, wherever others stand in the row."""
    (file,) = draw(tmp_path, 1, [(56, 28)])
    rows = batch([5])
    starts = (1, 2, 4, 6)
    rows["position_ids"] = np.array([[0, 1, 2, 3, 0, 1, 0, 1]])
    rows["media"][0] = tuple(
        RowMedium("image", str(file), "", 56, 28, start, start + 1, content=file.read_bytes()) for start in starts
    )
    made = ImageInputs(tiny_processor("llava-onevision"), _Model())(rows, _Source())["images"]
    assert made["batch_num_images"].tolist() == [2, 1, 1]
    tiles = [int((tile != 0).any(-1).any(-1).any(-1).sum()) for tile in made["pixel_values"]]
    assert tiles == [1, 1, 3, 3]  # the whole image, and two tiles


def test_pixels_of_several_examples_leave_the_tokenizer_as_it_is():
    """Threads share it, and each change of its padding would be one for the texts of the others."""
    processor, image = tiny_processor("llava-onevision"), Image.new("RGB", (28, 28))
    processor.tokenizer.pad_token = None
    made = media_inputs(processor, [[image], [image, image]])
    assert len(made["pixel_values"]) == 3
    assert processor.tokenizer.backend_tokenizer.padding is None
    assert processor.tokenizer.pad_token is None


def test_images_that_the_processor_cannot_use_are_named(tmp_path):
    (file,) = draw(tmp_path, 1, [(600, 1)])  # Qwen's wants less than 200 times as wide as high
    rows = batch([5])
    rows["media"][0] = (RowMedium("image", str(file), "", 600, 1, 0, 2, content=file.read_bytes()),)
    with pytest.raises(BadImage, match=rf"the model's processor cannot use one of {file} \(.*ratio"):
        ImageInputs(tiny_processor("qwen2.5-vl"), _Model())(rows, _Source())


class _Model:
    """A model without positions in time, height and width."""

    base_model = None


class _Source:
    def records(self, row: int) -> list[str]:
        return ["d: f:2"]
