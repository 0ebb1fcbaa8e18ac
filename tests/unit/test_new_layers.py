"""New layers: an expanded model computes what the model did, its layers keep their kinds, and training reaches the new ones."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from raysft.config import Config, parse
from raysft.estimate.fake_model import model_without_weights, sizes_of
from raysft.models.decoder_layers import decoder_layers, spread_layers
from raysft.models.new_layers import DESCRIPTION, expanded_config, with_new_layers
from raysft.models.transformers_internals import attention_implementation
from raysft.run.inputs import check_model_files
from raysft.train.finetuning import load_model
from raysft.train.trained_weights import trained_layers
from tests.messages import holds, refusal
from tests.tiny import tiny_model, tiny_tokenizer

LAYERS = 4
USUAL: dict[str, Any] = {
    "vocab_size": 400, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": LAYERS, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 128, "pad_token_id": 0, "bos_token_id": 1,
    "eos_token_id": 2,
}  # fmt: skip
GPT: dict[str, Any] = {
    "vocab_size": 400, "n_embd": 32, "n_layer": LAYERS, "n_head": 4, "n_positions": 128, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
EXPERTS: dict[str, Any] = {
    "num_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "n_routed_experts": 4,
}  # fmt: skip
ALTERNATING = {"layer_types": ["sliding_attention", "full_attention"] * 2, "sliding_window": 8}
PROJECTIONS = ["mlp.down_proj", "self_attn.o_proj"]
NORMS = ["post_attention_layernorm", "post_feedforward_layernorm"]
KINDS: dict[str, tuple[str, dict[str, Any], list[str]]] = {
    "llama": ("llama", USUAL, PROJECTIONS),
    "llama with biases": ("llama", {**USUAL, "attention_bias": True, "mlp_bias": True}, PROJECTIONS),
    "qwen2 with windows": (
        "qwen2",
        {**USUAL, "use_sliding_window": True, "sliding_window": 8, "max_window_layers": 2},
        PROJECTIONS,
    ),
    "qwen3": ("qwen3", USUAL, PROJECTIONS),
    "qwen3_moe": ("qwen3_moe", {**USUAL, **EXPERTS, "decoder_sparse_step": 2, "mlp_only_layers": [3]}, PROJECTIONS),
    "mistral": ("mistral", {**USUAL, "sliding_window": 8}, PROJECTIONS),
    "mixtral": ("mixtral", {**USUAL, **EXPERTS}, ["mlp.experts.down_proj", "self_attn.o_proj"]),
    "phi3": ("phi3", {**USUAL, "num_key_value_heads": 4}, PROJECTIONS),
    "phi, parallel": ("phi", {**USUAL, "num_key_value_heads": 4}, ["mlp.fc2", "self_attn.dense"]),
    "gpt2": ("gpt2", GPT, ["attn.c_proj", "mlp.c_proj"]),
    "opt": ("opt", {**USUAL, "ffn_dim": 48, "word_embed_proj_dim": 32}, ["fc2", "self_attn.out_proj"]),
    "granite": ("granite", {**USUAL, "residual_multiplier": 0.5}, PROJECTIONS),
    "gemma2": ("gemma2", {**USUAL, **ALTERNATING}, NORMS),
    "gemma3": ("gemma3_text", {**USUAL, **ALTERNATING}, NORMS),
    "gemma4": ("gemma4_text", {**USUAL, **ALTERNATING, "hidden_size_per_layer_input": 0, "global_head_dim": 16}, NORMS),
    "olmo2": ("olmo2", {**USUAL, "num_key_value_heads": 4}, NORMS),
    "glm4": ("glm4", USUAL, ["post_mlp_layernorm", "post_self_attn_layernorm"]),
    "glm4_moe": (
        "glm4_moe",
        {**USUAL, **EXPERTS, "first_k_dense_replace": 2},
        ["mlp.experts.down_proj", "mlp.shared_experts.down_proj", "self_attn.o_proj"],
    ),
    "smollm3": ("smollm3", {**USUAL, "no_rope_layer_interval": 2}, PROJECTIONS),
    "bamba": (
        "bamba",
        {
            **USUAL,
            "attn_layer_indices": [1],
            "mamba_n_heads": 8,
            "mamba_d_head": 8,
            "mamba_d_state": 8,
            "mamba_n_groups": 1,
        },
        ["feed_forward.down_proj", "mamba.out_proj"],
    ),
}
"""Name → type of the model, its config, and what is zeroed in its last new layer."""
WITHOUT_IDENTITY = {
    "norms on the residual": ("opt", {**USUAL, "ffn_dim": 48, "word_embed_proj_dim": 32, "do_layer_norm_before": False}),
    "scores by index": ("gpt2", {**GPT, "scale_attn_by_inverse_layer_idx": True}),
    "shared keys": (
        "gemma4_text",
        {**USUAL, **ALTERNATING, "hidden_size_per_layer_input": 0, "global_head_dim": 16, "num_kv_shared_layers": 2},
    ),
    "embeddings of each layer": (
        "gemma4_text",
        {**USUAL, **ALTERNATING, "hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": 400, "global_head_dim": 16},
    ),
    "kinds at intervals": (
        "jamba",
        {**USUAL, "attn_layer_period": 2, "attn_layer_offset": 1, "mamba_d_state": 8, "mamba_dt_rank": 4,
         "use_mamba_kernels": False},
    ),
}  # fmt: skip


def make_model(folder: Path, kind: str, settings: dict[str, Any]) -> Path:
    """A model whose norms and biases, too, are at random."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **settings))
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(torch.randn_like(weight) * 0.05)
        for name, buffer in model.named_buffers():
            if name.endswith("layer_scalar"):
                buffer.fill_(0.7)
    model.save_pretrained(folder / "model")
    tiny_tokenizer().save_pretrained(folder / "model")
    return folder / "model"


def make_config(folder: Path, model: Path, new: int = 2, **settings: Any) -> Config:
    return parse(
        {
            "run": {"name": "r", "storage": str(folder)},
            "model": {"path": str(model), "dtype": "float32", "new_layers": new, "finetuning": "freeze", **settings},
            "data": {
                "train": [{"name": "a", "path": str(folder / "a.jsonl")}],
                "sequence_length": 64,
                "cache": str(folder / "cache"),
            },
        }
    )


def logits(model: Any) -> torch.Tensor:
    tokens = torch.randint(400, (2, 40), generator=torch.Generator().manual_seed(7))
    with torch.no_grad():
        return model.eval()(tokens, use_cache=False).logits


@pytest.mark.parametrize("name", KINDS)
def test_an_expanded_model_gives_the_same_logits_and_its_new_layers_learn(tmp_path, name):
    kind, settings, zeroed = KINDS[name]
    path = make_model(tmp_path, kind, settings)
    plain = AutoModelForCausalLM.from_pretrained(path)
    # Windows, one after the other, would round in another way than the plain model.
    config = make_config(tmp_path, path, attention=attention_implementation(plain))
    expanded_config(config, AutoConfig.from_pretrained(path))
    folder = with_new_layers(config, str(path), lambda line: None)
    assert json.loads((Path(folder) / DESCRIPTION).read_text()) == {"layers": [2, 5], "zeroed": zeroed}
    model = load_model(config, folder)
    assert torch.equal(logits(model), logits(plain))
    prefix, count = decoder_layers(model)
    assert count == LAYERS + 2
    trained = {
        name.split(".")[prefix.count(".") + 1] for name, weight in model.named_parameters() if weight.requires_grad
    }
    assert trained == {"2", "5"}
    model.train()
    tokens = torch.randint(400, (2, 40), generator=torch.Generator().manual_seed(8))
    optimizer = torch.optim.AdamW([weight for weight in model.parameters() if weight.requires_grad], lr=1e-3)
    for _ in range(2):  # what stands before a zeroed weight has a gradient once that has moved
        optimizer.zero_grad()
        model(tokens, labels=tokens, use_cache=False).loss.backward()
        optimizer.step()
    for weight_name, weight in model.named_parameters():
        if weight.requires_grad:
            assert weight.grad is not None, weight_name
            assert weight.grad.any(), weight_name


@pytest.mark.parametrize("name", KINDS)
def test_each_layer_keeps_its_kind(tmp_path, name):
    kind, settings, _ = KINDS[name]
    hf_config = AutoConfig.for_model(kind, **settings)
    with torch.device("meta"):
        before, after = (
            AutoModelForCausalLM.from_config(each)
            for each in (hf_config, expanded_config(make_config(tmp_path, tmp_path), hf_config))
        )
    layers = [model.get_submodule(decoder_layers(model)[0]) for model in (before, after)]
    shapes = [[{key: weight.shape for key, weight in layer.named_parameters()} for layer in each] for each in layers]
    assert shapes[1] == [shapes[0][index] for index in (0, 1, 1, 2, 3, 3)]
    types = getattr(before.config, "layer_types", None)
    if types:
        assert list(after.config.layer_types) == [types[index] for index in (0, 1, 1, 2, 3, 3)]


@pytest.mark.parametrize("name", WITHOUT_IDENTITY)
def test_a_model_that_would_compute_something_else_is_refused_and_leaves_no_copy(tmp_path, name):
    kind, settings = WITHOUT_IDENTITY[name]
    path = make_model(tmp_path, kind, settings)
    config = make_config(tmp_path, path)
    told = refusal(check_model_files, config, lambda line: None)
    assert holds(told, "model.new_layers=2 … remove model.new_layers")
    models = tmp_path / "cache" / "models"
    assert not (models.exists() and [each for each in models.iterdir() if each.is_dir()])


def test_after_a_norm_at_the_end_of_a_branch_the_first_update_is_a_small_one(tmp_path):
    """A zeroed projection before the norm would have a step of 1e-4 change the logits by more than their deviation."""
    kind, settings, _ = KINDS["olmo2"]
    path = make_model(tmp_path, kind, settings)
    config = make_config(tmp_path, path)
    model = load_model(config, with_new_layers(config, str(path), lambda line: None))
    before = logits(model)
    tokens = torch.randint(400, (2, 40), generator=torch.Generator().manual_seed(8))
    model(tokens, labels=tokens, use_cache=False).loss.backward()
    torch.optim.AdamW([weight for weight in model.parameters() if weight.requires_grad], lr=1e-4).step()
    assert 0 < (logits(model) - before).abs().max() < 0.01 * before.std()


def test_layers_are_spread_as_evenly_as_possible(tmp_path):
    path = tiny_model(tmp_path / "base")
    hf_config = AutoConfig.from_pretrained(path)
    hf_config.num_hidden_layers = 7
    expanded = expanded_config(make_config(tmp_path, path, new=3), hf_config)
    assert expanded.num_hidden_layers == 10
    # 7 layers in 3 parts: 2, 2 and 3, each followed by a new one.
    assert spread_layers(10, 3) == [2, 5, 9]
    # LLaMA-Factory's rule for a model that was expanded by as many layers as divide it.
    for layers, new in ((40, 8), (36, 4), (6, 2), (8, 8)):
        stride = layers // new
        assert spread_layers(layers, new) == list(range(stride - 1, layers + stride - 1, stride))


def test_more_new_layers_than_layers_are_refused(tmp_path):
    path = tiny_model(tmp_path / "base")
    told = refusal(check_model_files, make_config(tmp_path, path, new=3), lambda line: None)
    assert holds(told, "model.new_layers=3 … has 2; use at most 2")


def test_the_run_starts_from_the_expanded_model_and_makes_it_once(tmp_path):
    path, told = tiny_model(tmp_path / "base"), []
    config = make_config(tmp_path, path)
    files = check_model_files(config, told.append)
    assert files.hf_config.num_hidden_layers == 4
    assert [line for line in told if "adding 2 layers" in line]
    told.clear()
    assert check_model_files(config, told.append).model == files.model
    assert not [line for line in told if "new layers" in line]
    other = check_model_files(make_config(tmp_path, path, new=1), told.append)
    assert (other.model != files.model, other.hf_config.num_hidden_layers) == (True, 3)
    sizes, former = (sizes_of(model_without_weights(config, each.hf_config)) for each in (files, other))
    layer = (files.hf_config.hidden_size, sizes.largest_layer)
    assert sizes.total - former.total == layer[1]
    assert (sizes.trained_elements, former.trained_elements) == (2 * layer[1], 2 * layer[1])


def test_new_tokens_and_new_layers_go_together(tmp_path):
    path = tiny_model(tmp_path / "base")
    config = make_config(tmp_path, path, new_tokens={"plain": ["capital"]})
    files = check_model_files(config, lambda line: None)
    model = load_model(config, files.model)
    assert (model.config.num_hidden_layers, files.embedding_rows) == (4, len(model.get_input_embeddings().weight))
    base = AutoModelForCausalLM.from_pretrained(path)
    tokens = torch.randint(300, (2, 20), generator=torch.Generator().manual_seed(7))
    with torch.no_grad():
        found = model.eval()(tokens, use_cache=False).logits[..., :300]
        torch.testing.assert_close(found, base(tokens, use_cache=False).logits[..., :300], rtol=0, atol=1e-5)


@pytest.mark.parametrize("finetuning", ["lora", "oft"])
def test_adapters_on_new_layers_that_begin_with_norms_of_zeros_are_refused(tmp_path, finetuning):
    kind, settings, _ = KINDS["olmo2"]
    path = make_model(tmp_path, kind, settings)
    told = refusal(check_model_files, make_config(tmp_path, path, finetuning=finetuning), lambda line: None)
    assert holds(
        told,
        f"model.finetuning={finetuning} … zeroed norms … freeze or full … model.{finetuning}.extra_modules",
    )
    section: dict[str, Any] = {finetuning: {"extra_modules": NORMS}}
    check_model_files(make_config(tmp_path, path, 2, finetuning=finetuning, **section), lambda line: None)
    check_model_files(make_config(tmp_path, path, finetuning="full"), lambda line: None)


@pytest.mark.parametrize(
    ("freeze", "count", "layers"),
    [
        ({}, 6, [4, 5]),
        ({"layers": 3}, 6, [3, 4, 5]),
        ({"layers": -2}, 6, [0, 1]),
        ({"layers": [-1, 0, 3]}, 6, [0, 3, 5]),
        ({"layers": [2]}, 6, [2]),
        ({"layers": 2, "spread": True}, 6, [2, 5]),
        ({"layers": 4, "spread": True}, 10, [1, 4, 6, 9]),
    ],
)
def test_layers_to_train(tmp_path, freeze, count, layers):
    assert trained_layers(make_config(tmp_path, tmp_path, new=0, freeze=freeze), count) == layers


def test_new_layers_are_trained_unless_the_config_names_others(tmp_path):
    assert trained_layers(make_config(tmp_path, tmp_path, new=2), 6) == [2, 5]
    assert trained_layers(make_config(tmp_path, tmp_path, new=2, freeze={"layers": 2}), 6) == [4, 5]


@pytest.mark.parametrize(
    ("layers", "message"),
    [
        ([0, 6], "model.freeze.layers=[0, 6] names layer 6, but the model has 6 layers; use 0 to 5, or -6 to -1"),
        ([-7], "names layer -7, but the model has 6 layers"),
        ([5, -1], "names layer 5 of the model's 6 twice, also as -1; name each layer once"),
    ],
)
def test_layers_that_are_not_there_or_named_twice_are_refused(tmp_path, layers, message):
    assert message in refusal(trained_layers, make_config(tmp_path, tmp_path, new=0, freeze={"layers": layers}), 6)


@pytest.mark.parametrize(
    ("freeze", "message"),
    [
        ({"layers": []}, "config: model.freeze.layers=[] … selects no layers to train"),
        ({"layers": [1, 1]}, "config: model.freeze.layers=[1, 1] … names layer 1 twice"),
        ({"layers": ["0-3"]}, "config: model.freeze.layers … integer"),
        ({"layers": "first"}, "config: model.freeze.layers='first' … auto"),
        ({"spread": True}, "config: model.freeze … spread=true … layers='auto' … remove spread"),
        ({"layers": -2, "spread": True}, "config: model.freeze … layers=-2 … above 0"),
    ],
)
def test_layers_that_mean_nothing_are_refused_in_the_config(tmp_path, freeze, message):
    assert holds(refusal(make_config, tmp_path, tmp_path, freeze=freeze), message)


def test_a_run_that_began_when_two_layers_were_the_default_goes_on(tmp_path):
    former = make_config(tmp_path, tmp_path, new=0, freeze={"layers": 2}).numerics_keys()
    assert former == make_config(tmp_path, tmp_path, new=0).numerics_keys()
    assert former != make_config(tmp_path, tmp_path, new=0, freeze={"layers": 3}).numerics_keys()
    assert former != make_config(tmp_path, tmp_path, new=2).numerics_keys()
