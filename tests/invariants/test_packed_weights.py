"""QLoRA under ZeRO-3: each worker holds its part of the packed weights, and the numbers are those of ZeRO-2."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from raysft.estimate.setup import setup_of
from raysft.estimate.states import states
from raysft.telemetry.events import SetupDone
from tests.measured_memory import config_of, estimated, measured, model_of
from tests.training import Case, Result, assert_same, make_config, prepare, rows_of, train_all

PARTITIONED = {
    "zero_optimization": {
        "stage3_param_persistence_threshold": 0,
        "stage3_max_live_parameters": 0,
        "stage3_max_reuse_distance": 0,
        "stage3_prefetch_bucket_size": 0,
    }
}
"""Settings of DeepSpeed with which ZeRO-3 gathers each weight only where it is used, however small."""
WAYS: dict[str, dict[str, Any]] = {
    "double": {},
    "simple scales, recomputed": {"model.double_quantization": False, "train.gradient_checkpointing": True},
    "fp4 in bfloat16": {"model.quantization_type": "fp4", "model.dtype": "bfloat16"},
    "oft": {"model.finetuning": "oft", "model.oft.block_size": 16},
    "head too": {"model.lora.extra_modules": ["lm_head"]},
}
STEPS = 2


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    return prepare(tmp_path_factory.mktemp("packed"))


def test_two_workers_with_zero_3_equal_two_with_zero_2(prepared):
    folder, model, manifest = prepared
    few = rows_of(manifest, steps=1)
    both = []
    for stage in (2, 3):
        settings = {
            "model.finetuning": "lora",
            "model.quantization": "4bit",
            "train.zero_stage": stage,
            **({"train.deepspeed": PARTITIONED} if stage == 3 else {}),
        }
        both += [
            Case(
                make_config(
                    folder / f"{stage} {name}",
                    model,
                    {**settings, **way},
                    micro_batch_size=1,
                    max_steps=STEPS,
                    eval_at_start=False,
                ),
                rows_of(manifest, steps=STEPS),
                eval_rows=few,
            )
            for name, way in WAYS.items()
        ]
    results = train_all(both, 2)
    loaded = AutoModelForCausalLM.from_pretrained(model)
    whole = sum(weight.numel() for weight in loaded.parameters())
    for name, two, three in zip(WAYS, results[: len(WAYS)], results[len(WAYS) :], strict=True):
        assert two.failure + three.failure == "", name
        for result in (two, three):
            assert frozen_parameters(result) == whole, name
        assert two.losses[0] != two.losses[-1], name
        # In 16 bits the sums of gradients round otherwise.
        tolerance = 2e-2 if "bfloat16" in name else 1e-5
        assert_same((*three[:3], {}), (*two[:3], {}), tolerance)
        assert three.evaluation["eval_loss"] == pytest.approx(two.evaluation["eval_loss"], rel=tolerance), name
        # A word or two may be the likeliest by one rounding.
        assert three.evaluation["eval_accuracy"] == pytest.approx(two.evaluation["eval_accuracy"], abs=0.01), name


def frozen_parameters(result: Result) -> int:
    """Weights that a training does not train, as the run prints them, whatever takes how many bits."""
    (setup,) = (event for event in result.events if isinstance(event, SetupDone))
    return setup.parameters - setup.trained_parameters


def test_each_worker_holds_half_of_the_packed_weights(tmp_path):
    from transformers import LlamaConfig, LlamaForCausalLM

    shape = LlamaConfig(
        vocab_size=400, hidden_size=128, intermediate_size=256, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=4,
    )  # fmt: skip
    model = LlamaForCausalLM(shape)
    model.save_pretrained(tmp_path / "model")
    linear = sum(weight.numel() for name, weight in model.named_parameters() if "proj" in name)
    others = sum(weight.numel() for weight in model.parameters()) - linear
    settings = {
        "model.finetuning": "lora",
        "model.lora.rank": 2,
        "model.quantization": "4bit",
        "data.sequence_length": 16,
    }
    stages = [
        config_of(tmp_path, tmp_path / "model", {**settings, **more})
        for more in ({"train.zero_stage": 2}, {"train.zero_stage": 3, "train.deepspeed": PARTITIONED})
    ]
    adapters = sum(
        2 * (weight.shape[0] + weight.shape[1]) for name, weight in model.named_parameters() if "proj" in name
    )
    whole = linear / 2 + 4 * (others + adapters)
    two, three = measured(stages, 2)
    for rank in (0, 1):
        assert two[rank].weights == pytest.approx(whole, rel=0.01)
        assert three[rank].weights == pytest.approx(whole / 2, rel=0.01)
    # What is estimated has the scales too: a byte for each 64 weights, and a number for each 256 of these.
    found = states(model_of(stages[1])[0], setup_of(stages[1], 2, 1))
    scales = linear * (1 / 64 + 4 / (64 * 256))
    assert found.weights == pytest.approx(whole / 2 + scales, rel=0.01)
    assert found.loading == pytest.approx(whole + scales + 4 * 128 * 256, rel=0.01)
    assert estimated(stages[1], 2).sure >= whole


def test_layers_of_a_model_that_is_in_4_bits_already_let_go_of_their_weights_too(prepared, tmp_path):
    from bitsandbytes.nn.modules import Linear4bit
    from transformers import BitsAndBytesConfig

    from raysft.train.engine import _loss_model
    from raysft.train.packed_weights import _forward

    folder, path, _ = prepared
    options = BitsAndBytesConfig(load_in_4bit=True)
    AutoModelForCausalLM.from_pretrained(path, quantization_config=options, device_map="cpu").save_pretrained(tmp_path)
    config = make_config(folder, tmp_path, {"model.finetuning": "lora", "train.zero_stage": 3})
    model = _loss_model(config, str(tmp_path), torch.device("cpu"), None, None)
    layers = [module for module in model.modules() if isinstance(module, Linear4bit)]
    assert layers
    assert all(getattr(layer.forward, "__func__", None) is _forward for layer in layers)


def test_a_layer_lets_go_of_its_weight_between_forward_and_backward():
    from bitsandbytes.nn.modules import Linear4bit

    from raysft.models.quantization import keep_layout
    from raysft.train.packed_weights import release_after_forward

    torch.manual_seed(0)
    layers = []
    for _ in range(2):
        torch.manual_seed(0)
        layer = Linear4bit(64, 32, quant_type="nf4", quant_storage=torch.float32, compute_dtype=torch.float32).to("cpu")
        keep_layout(layer)
        layers.append(layer.requires_grad_(False))
    release_after_forward(layers[0])
    gradients = []
    for layer in layers:
        inputs = torch.randn(5, 64, generator=torch.Generator().manual_seed(1), requires_grad=True)
        result = layer(inputs)
        packed, storage = layer.weight.data.clone(), layer.weight.data.untyped_storage()
        if layer is layers[0]:  # as ZeRO-3 frees a weight, and gathers it again
            layer.weight.data = torch.empty(0)
            storage.resize_(0)
            layer.weight.data = packed
        result.square().sum().backward()
        gradients.append((result.detach(), inputs.grad))
    torch.testing.assert_close(gradients[0], gradients[1], rtol=0, atol=0)
