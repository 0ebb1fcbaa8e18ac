"""A GPU is asked for nothing between the microbatches of a step."""

import pytest
import torch

from raysft.train.loss import TokenLoss
from raysft.train.step import microbatches
from tests.unit.test_uploads import model, rows


def test_nothing_waits_for_the_gpu(device):
    if device == "cpu":
        pytest.skip("torch notes waits for a GPU alone")
    place = torch.device("cuda")
    loss = TokenLoss(model().to(place, torch.bfloat16), neftune_alpha=5.0).train()

    def compute() -> torch.Tensor:
        total = torch.zeros((), device=place)
        for inputs in microbatches(rows(), 1, place):
            value = loss(**inputs, number_of_sources=2)[0]
            value.backward()
            total += value.detach()
        return total

    compute()  # which loads kernels, and allocates pinned memory
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        total = compute()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.isfinite(total)


def test_what_is_copied_beside_the_computation_arrives(device):
    place = torch.device(device)
    parts = [inputs for _ in range(20) for inputs in microbatches(rows(), 1, place)]
    for index, inputs in enumerate(parts):
        expected = rows()["input_ids"][index % 2, : inputs["input_ids"].shape[1]]
        assert inputs["input_ids"][0].tolist() == expected.tolist()
