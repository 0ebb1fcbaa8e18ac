"""What is written of a trained model."""

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file

from raysft.storage import Place
from raysft.train.export import export
from tests.tiny import tiny_model


@pytest.fixture
def group():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.usefixtures("group")
def test_buffers_that_belong_to_a_model_are_written_too(tmp_path: Path):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = tiny_model(tmp_path / "base")
    model = AutoModelForCausalLM.from_pretrained(folder)
    model.model.register_buffer("balance", torch.arange(3.0))
    model.model.register_buffer("passing", torch.arange(3.0), persistent=False)
    export(model, AutoTokenizer.from_pretrained(folder), Place.of(tmp_path / "out"))
    written = load_file(tmp_path / "out" / "model.safetensors")
    assert written["model.balance"].tolist() == [0.0, 1.0, 2.0]
    assert "model.passing" not in written
    assert written.keys() - {"model.balance"} == load_file(folder / "model.safetensors").keys()
