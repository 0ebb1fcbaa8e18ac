"""Compiled layers compute what the others do: ``train.compile``."""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch

from raysft.data.types import IGNORE_INDEX
from raysft.errors import RequestError
from raysft.telemetry.events import EvaluationDone
from raysft.train.compilation import check_compiler, compile_layers, layers_of
from tests.messages import holds, refusal
from tests.tiny import tiny_mixture, tiny_model
from tests.training import STEPS, Case, Result, assert_same, make_config, prepare, rows_of, timeless, train_all

needs_compiler = pytest.mark.skipif(not shutil.which(os.environ.get("CXX", "g++")), reason="needs a C++ compiler")
HALF = STEPS // 2
RECOMPUTED: dict[str, Any] = {
    "train.gradient_checkpointing": True,
    "train.micro_batch_size": 2,
    "train.save_every_steps": HALF,
}
CASES: dict[str, dict[str, Any]] = {
    "full, with C++": {"model.attention": "sdpa", "train.micro_batch_size": 2},
    "full, recomputed": RECOMPUTED,
    "LoRA, with ZeRO-2 and attention over whole rows": {
        "model.finetuning": "lora",
        "train.zero_stage": 2,
        "model.attention": "sdpa",
    },
}
ZERO3: dict[str, dict[str, Any]] = {
    "full": {"train.zero_stage": 3, "train.gradient_checkpointing": True},
    "LoRA": {"train.zero_stage": 3, "model.finetuning": "lora"},
}


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    return prepare(tmp_path_factory.mktemp("compiled"))


def case(prepared, name: str, settings: dict[str, Any], **options: Any) -> Case:
    folder, model, manifest = prepared
    return Case(make_config(folder / name, model, settings), rows_of(manifest), **options)


@pytest.fixture(scope="module")
def trained(prepared) -> dict[str, tuple[Result, Result]]:
    """Case → its training without and with compiled layers; the last one resumes from a checkpoint without."""
    kept = prepared[0] / "kept"
    plain = [
        case(prepared, f"plain {name}", settings, keep=kept / name if "C++" not in name else None)
        for name, settings in CASES.items()
    ]
    compiled = [
        case(
            prepared,
            f"compiled {name}",
            {**settings, "train.compile": True},
            compiler="inductor" if "C++" in name else "aot_eager",
        )
        for name, settings in CASES.items()
    ]
    half = kept / "full, recomputed" / f"checkpoint_{HALF}"
    resumed = case(prepared, "resumed", {**RECOMPUTED, "train.compile": True}, resume=half, compiler="aot_eager")
    without = train_all(plain)
    found = train_all([*compiled, resumed])  # in another process: that of the first has fused layers
    return dict(zip([*CASES, "resumed"], zip([*without, without[1]], found, strict=True), strict=True))


@needs_compiler
@pytest.mark.parametrize("name", CASES)
def test_numbers_names_and_evaluations_stay(trained, name):
    plain, compiled = trained[name]
    assert not plain.failure + compiled.failure
    assert_same(plain, compiled)
    first = [next(each for each in result.events if isinstance(each, EvaluationDone)) for result in (plain, compiled)]
    assert timeless(first[0].record) == timeless(first[1].record), "an evaluation computes no gradients"


@needs_compiler
def test_a_training_goes_on_with_compiled_layers(trained):
    plain, compiled = trained["resumed"]
    assert not compiled.failure
    np.testing.assert_allclose(compiled.losses, plain.losses[HALF:], rtol=1e-5)
    for name, weight in plain.weights.items():
        np.testing.assert_allclose(compiled.weights[name], weight, rtol=1e-5, atol=1e-5, err_msg=name)


@needs_compiler
def test_zero_3_gathers_whole_layers(prepared):
    plain = [case(prepared, f"whole {name}", settings) for name, settings in ZERO3.items()]
    compiled = [
        case(prepared, f"gathered {name}", {**settings, "train.compile": True}, compiler="aot_eager")
        for name, settings in ZERO3.items()
    ]
    results = train_all([*plain, *compiled], world=2)  # with ZeRO-3, no layers are fused
    half = len(results) // 2
    for one, other in zip(results[:half], results[half:], strict=True):
        assert not one.failure + other.failure
        assert_same(one, other)


@needs_compiler
def test_one_graph_serves_all_layers_and_widths(tmp_path, monkeypatch):
    from torch._dynamo.utils import counters
    from transformers import AutoModelForCausalLM

    from raysft.train.loss import TokenLoss

    model = AutoModelForCausalLM.from_pretrained(tiny_model(tmp_path), attn_implementation="sdpa")
    model.config.use_cache = False
    assert len(layers_of(model)) > 1
    names = [name for name, _ in model.named_parameters()]
    monkeypatch.setattr("raysft.train.compilation.BACKEND", "aot_eager")
    compile_layers(model, torch.device("cpu"))
    counters.clear()
    loss = TokenLoss(model)
    for width in (16, 24, 40, 56, 64, 80, 96, 104, 112, 120):
        ids = torch.arange(2 * width).view(2, width) % 60
        positions = torch.cat([torch.arange(7), torch.arange(width - 7)]).expand(2, -1)
        loss(ids, positions, ids.masked_fill(positions == 0, IGNORE_INDEX))[0].backward()
    assert [name for name, _ in model.named_parameters()] == names == list(model.state_dict())[: len(names)]
    assert not counters["graph_break"], dict(counters["graph_break"])
    assert counters["stats"]["unique_graphs"] == 1
    torch.compiler.reset()


def counted(model: Any, monkeypatch: Any, widths: Sequence[int] = (16, 24)) -> Any:
    """Compile the layers of a model, without making code of their graphs, and train on rows of some widths; torch's counters."""
    from torch._dynamo.utils import counters

    from raysft.train.loss import TokenLoss

    monkeypatch.setattr("raysft.train.compilation.BACKEND", "eager")
    monkeypatch.setattr("raysft.train.compilation.check_compiler", lambda device: None)
    compile_layers(model, torch.device("cpu"))
    counters.clear()
    for width in widths:
        ids = torch.arange(width)[None] % 60
        TokenLoss(model)(ids, torch.arange(width)[None], ids)[0].backward()
    return counters


def test_layers_that_all_differ_have_a_graph_each(monkeypatch):
    """More than torch makes of one function unless it is told otherwise."""
    from torch._dynamo import config
    from transformers import AutoModelForCausalLM, LlamaConfig

    sizes = {"hidden_size": 16, "num_attention_heads": 2, "vocab_size": 64, "num_hidden_layers": 4}
    model = AutoModelForCausalLM.from_config(LlamaConfig(**sizes), attn_implementation="sdpa")
    for index, layer in enumerate(model.model.layers):
        layer.mlp = type(layer.mlp)(LlamaConfig(**sizes, intermediate_size=8 * (index + 1)))
    with config.patch(recompile_limit=2):
        counters = counted(model, monkeypatch)
    assert counters["stats"]["unique_graphs"] == 4
    assert not counters["unimplemented"], dict(counters["unimplemented"])
    torch.compiler.reset()


def test_experts_with_an_adapter_compute_outside_of_compiled_code(tmp_path, monkeypatch):
    """peft makes a new class of them in each pass, for which torch would compile again."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    folder = tiny_mixture(tmp_path, num_experts=4, moe_intermediate_size=16)
    model = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="sdpa")
    parts = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    model = get_peft_model(model, LoraConfig(target_modules=["q_proj"], target_parameters=parts))
    graphs = [
        counted(model, monkeypatch, widths)["stats"]["unique_graphs"] for widths in ((16, 24), (16, 24, 40, 16, 24, 40))
    ]
    assert graphs[0] == graphs[1] > 0
    torch.compiler.reset()


def test_without_a_compiler_it_is_refused(monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    message = refusal(check_compiler, torch.device("cpu"))
    assert holds(message, "train.compile=true needs a C++ compiler … no-such-compiler … set train.compile=false")


def test_a_compiler_that_fails_is_refused(monkeypatch):
    def fail(*inputs: Any, **options: Any) -> Any:
        raise OSError("Python.h: no such file\nand more")

    monkeypatch.setenv("CXX", "python3")
    monkeypatch.setattr("raysft.train.compilation.torch.compile", fail)
    with pytest.raises(RequestError) as error:
        check_compiler(torch.device("cpu"))
    assert holds(
        str(error.value),
        "train.compile=true, but torch.compile fails … OSError: Python.h: no such file … train.compile=false",
    )
    assert "\n" not in str(error.value)
