"""A GPU is asked for nothing between the microbatches of a step."""

from contextlib import nullcontext

import pytest
import torch

from raysft.models.examples import begin
from raysft.train.loss import TokenLoss
from raysft.train.router_loss import RouterLoss
from raysft.train.step import microbatches
from raysft.train.step_rows import cut
from tests.unit.test_uploads import model, recomputing, rows, with_dynamic_positions, with_sinks

MODELS = {"plain": model, "recomputed": recomputing, "dynamic": with_dynamic_positions}


@pytest.mark.parametrize("kind", [*MODELS, "sinks"])
def test_nothing_waits_for_the_gpu(tmp_path, device, kind):
    """torch notes waits for a GPU alone: on a CPU this only shows that the test runs."""
    if kind == "sinks" and device == "cuda" and torch.cuda.get_device_capability()[0] < 9:
        pytest.skip("torch multiplies the groups of experts without a question from Hopper on")
    place = torch.device(device)
    made = with_sinks(tmp_path) if kind == "sinks" else MODELS[kind]()
    loss = TokenLoss(made.to(place, torch.bfloat16), neftune_alpha=5.0).train()
    routers = RouterLoss(made, 0.01) if kind == "sinks" else None

    def compute() -> torch.Tensor:
        total = torch.zeros((), device=place)
        for part, inputs in zip(cut(rows(), 1), microbatches(rows(), 1, place), strict=True):
            with routers or nullcontext():
                value = loss(**inputs, number_of_sources=2)[0]
            if routers is not None:
                value = value + routers.coefficient * routers(part)
            value.backward()
            total += value.detach()
        return total

    try:
        compute()  # which loads kernels, and allocates pinned memory
        if device == "cuda":
            torch.cuda.synchronize()
            torch.cuda.set_sync_debug_mode("error")
        total = compute()
    finally:
        if device == "cuda":
            torch.cuda.set_sync_debug_mode("default")
        begin(None)
    assert torch.isfinite(total)


def test_what_is_copied_beside_the_computation_arrives(device):
    place = torch.device(device)
    parts = [inputs for _ in range(20) for inputs in microbatches(rows(), 1, place)]
    for index, inputs in enumerate(parts):
        expected = rows()["input_ids"][index % 2, : inputs["input_ids"].shape[1]]
        assert inputs["input_ids"][0].tolist() == expected.tolist()
