"""Recomputation of some layers, and inputs of layers that wait on the CPU: the same gradients, bit for bit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from raysft.config import with_overrides
from raysft.config.llamafactory.conversion import convert
from raysft.models import recomputation
from raysft.models.decoder_layers import decoder_layers
from raysft.train.check_model import check_model
from raysft.train.finetuning import load_model
from tests.measured_memory import HostMemory, config_of
from tests.messages import holds, refusal
from tests.tiny import tiny_model

RECOMPUTED: dict[str, Any] = {"train.gradient_checkpointing": True}
ON_CPU = {**RECOMPUTED, "train.offload.activations": "cpu"}
CASES: dict[str, tuple[dict[str, Any], list[bool], int]] = {
    "all": (RECOMPUTED, [True, True], 0),
    "one": ({**RECOMPUTED, "train.recompute_layers": 1}, [True, False], 0),
    "none of them": ({**RECOMPUTED, "train.recompute_layers": 0}, [False, False], 0),
    "all, inputs on the CPU": (ON_CPU, [True, True], 2),
    "one, inputs on the CPU": ({**ON_CPU, "train.recompute_layers": 1}, [True, False], 1),
    "LoRA, inputs on the CPU": ({**ON_CPU, "model.finetuning": "lora"}, [True, True], 2),
}
"""Name → settings, which layers are recomputed, and how many inputs wait on the CPU."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    tiny_model(tmp_path_factory.mktemp("recomputed") / "model")
    return tmp_path_factory.getbasetemp() / "recomputed0"


def gradients(model: Any) -> dict[str, torch.Tensor]:
    tokens = torch.randint(3, 390, (2, 48), generator=torch.Generator().manual_seed(0))
    model.train()(input_ids=tokens, labels=tokens, use_cache=False).loss.backward()
    return {name: weight.grad for name, weight in model.named_parameters() if weight.requires_grad}


@pytest.mark.parametrize("case", CASES)
def test_gradients_are_the_same_bit_for_bit(folder, monkeypatch, case):
    settings, recomputed, waiting = CASES[case]
    config = config_of(folder, folder / "model", settings)
    stored = with_overrides(config, {**dict.fromkeys(settings), **{
        "train.gradient_checkpointing": False, "train.offload.activations": "none",
        "model.finetuning": config.model.finetuning, "train.recompute_layers": None,
    }})  # fmt: skip
    expected = gradients(load_model(stored, config.model.path))
    found = load_model(config, config.model.path)
    plain = recomputation.without_adapters(found)
    layers = plain.get_submodule(decoder_layers(plain)[0])
    assert list(map(recomputation.is_recomputed, layers)) == recomputed

    kept: list[tuple[int, ...]] = []

    class Noted(HostMemory):
        """Memory that torch does not know, which notes what comes."""

        def keep(self, tensor: torch.Tensor) -> Any:
            kept.append(tuple(tensor.shape))
            return super().keep(tensor)

    monkeypatch.setattr(recomputation, "save_on_cpu", Noted)
    for name, gradient in gradients(found).items():
        assert torch.equal(gradient, expected[name]), name
    assert kept == [(2, 48, 64)] * waiting


def test_what_cannot_be_recomputed_so_is_refused(folder):
    many = config_of(folder, folder / "model", {**RECOMPUTED, "train.recompute_layers": 3})
    told = refusal(check_model, many, str(folder / "model"))
    assert holds(told, "train.recompute_layers=3 … has 2 layers; use at most 2")
    for key, value in (("train.offload.activations", "cpu"), ("train.recompute_layers", 1)):
        told = refusal(config_of, folder, folder / "model", {key: value})
        assert holds(told, f"{key}={value} … train.gradient_checkpointing=false … remove {key}")


def test_the_key_of_llamafactory_is_taken():
    given = {"model_name_or_path": "m", "stage": "sft", "do_train": True, "dataset": "a", "output_dir": "o"}
    train = convert({**given, "use_unsloth_gc": True}).config["train"]
    assert (train["gradient_checkpointing"], train["offload"]) == (True, {"activations": "cpu"})
    assert (
        "offload"
        not in convert({**given, "use_unsloth_gc": True, "disable_gradient_checkpointing": True}).config["train"]
    )
