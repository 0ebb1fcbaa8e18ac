"""Attention example by example, against each example alone."""

import importlib.util

import pytest
import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    BitsAndBytesConfig,
    Gemma3TextConfig,
    Lfm2Config,
    LlamaConfig,
    MistralConfig,
    OPTConfig,
    Qwen2Config,
    Qwen2MoeConfig,
    XLNetConfig,
)

from raysft.config import parse, with_overrides
from raysft.errors import RequestError
from raysft.models import attention
from raysft.train.engine import check_model
from raysft.train.loss import TokenLoss
from tests.messages import holds, refusal
from tests.tiny import tiny_model

SIZES = {
    "vocab_size": 64,
    "hidden_size": 48,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
}


def config(**model):
    return parse(
        {
            "model": {"path": "m", "dtype": "float32", **model},
            "data": {"train": [{"name": "d", "path": "d.jsonl"}], "sequence_length": 16},
        }
    )


def made(described) -> torch.nn.Module:
    torch.manual_seed(2)
    return AutoModelForCausalLM.from_config(described, attn_implementation="sdpa")


def positions(*lengths: int) -> list[int]:
    return [place for length in lengths for place in range(length)]


WINDOWS = [
    *(MistralConfig(**SIZES, sliding_window=window) for window in (1, 3, 8)),
    Qwen2Config(**SIZES, use_sliding_window=True, sliding_window=5, max_window_layers=1),
    Gemma3TextConfig(**SIZES, head_dim=8, sliding_window=4, layer_types=["sliding_attention", "full_attention"]),
]


@pytest.mark.parametrize(
    "described", [LlamaConfig(**SIZES), Qwen2Config(**SIZES), MistralConfig(**SIZES, sliding_window=None), *WINDOWS]
)
def test_packed_rows_are_their_examples_alone(described):
    model = made(described)
    ids = torch.randint(0, 64, (2, 16))
    rows = [(5, 1, 8, 2), (16,)]
    alone = torch.zeros(2, 16, 64)
    for row, lengths in enumerate(rows):
        at = 0
        for length in lengths:
            alone[row, at : at + length] = model(ids[row : row + 1, at : at + length]).logits[0]
            at += length
    alone.square().mean().backward()
    expected = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    model.zero_grad()
    attention.use_examplewise(model, config())
    assert model.config._attn_implementation == attention.EXAMPLEWISE
    packed = model(ids, position_ids=torch.tensor([positions(*row) for row in rows]), use_cache=False).logits
    torch.testing.assert_close(packed, alone.detach(), rtol=1e-5, atol=1e-6)
    packed.square().mean().backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[name], rtol=1e-4, atol=1e-7)


def test_a_window_that_layers_leave_to_the_mask_keeps_the_mask():
    """Qwen2-MoE's attention does not name its window."""
    described = Qwen2MoeConfig(**SIZES, use_sliding_window=True, sliding_window=8, max_window_layers=2, num_experts=2)
    model = made(described)
    attention.use_examplewise(model, config())
    assert model.config._attn_implementation == "sdpa"
    model = made(Qwen2MoeConfig(**{**described.to_dict(), "sliding_window": 16}))
    attention.use_examplewise(model, config())
    assert model.config._attn_implementation == attention.EXAMPLEWISE


def test_who_names_a_kernel_gets_it():
    model = made(LlamaConfig(**SIZES))
    attention.use_examplewise(model, config(attention="sdpa"))
    assert model.config._attn_implementation == "sdpa"


def test_layers_that_do_not_say_where_examples_begin_are_refused():
    states = torch.randn(1, 2, 4, 8)
    with pytest.raises(attention.NoPositions):
        attention.examplewise(torch.nn.Identity(), states, states, states, None)


OPT = OPTConfig(
    vocab_size=64, hidden_size=48, num_hidden_layers=2, num_attention_heads=6, ffn_dim=64, word_embed_proj_dim=48
)


@pytest.mark.parametrize("described", [Lfm2Config(**SIZES, layer_types=["conv", "full_attention"]), OPT])
def test_models_whose_examples_see_each_other_are_refused(described):
    """A recurrent state, and masks that take no note of positions."""
    model = TokenLoss(made(described).eval())
    with pytest.raises(RequestError, match=r"does not keep the examples of a row apart.*; set data\.packing=false"):
        check_model(model, config(attention="sdpa"), torch.device("cpu"))
    alone = with_overrides(config(), {"data.packing": False})
    check_model(model, alone, torch.device("cpu"))


def test_a_model_that_sees_what_it_is_to_predict_is_refused():
    described = XLNetConfig(vocab_size=64, d_model=32, n_layer=1, n_head=2, d_inner=32)
    model = TokenLoss(AutoModelForCausalLM.from_config(described).eval())
    alone = with_overrides(config(), {"data.packing": False})
    with pytest.raises(RequestError, match=r"XLNetLMHeadModel is not causal: .*; use a causal language model"):
        check_model(model, alone, torch.device("cpu"))


def test_rounding_by_what_the_batch_holds_is_no_sight(tmp_path):
    """8 bit as bitsandbytes has it: its columns of 8 and of 16 bits are chosen over all tokens."""
    settings = BitsAndBytesConfig(load_in_8bit=True, llm_int8_threshold=2.5)
    model = AutoModelForCausalLM.from_pretrained(tiny_model(tmp_path), quantization_config=settings, device_map="cpu")
    check_model(TokenLoss(model.eval()), config(), torch.device("cpu"))


@pytest.mark.parametrize("described", [LlamaConfig(**SIZES), MistralConfig(**SIZES, sliding_window=4)])
@pytest.mark.parametrize("kernel", ["sdpa", "eager", attention.EXAMPLEWISE])
def test_others_are_taken(described, kernel):
    model = made(described).eval()
    if kernel == attention.EXAMPLEWISE:
        attention.use_examplewise(model, config())
    else:
        model.set_attn_implementation(kernel)
    check_model(TokenLoss(model), with_overrides(config(), {"train.micro_batch_size": 2}), torch.device("cpu"))


def test_flash_attention_gets_one_long_row(monkeypatch):
    """In a batch of several rows it would take no note of positions."""
    model = made(LlamaConfig(**SIZES)).eval()
    loss, shapes = TokenLoss(model), []
    monkeypatch.setattr("raysft.train.loss.is_varlen", lambda model: True)
    decoder = model.model
    before = decoder.forward

    def seen(**inputs):
        shapes.append(tuple(inputs["input_ids"].shape))
        return before(**inputs)

    ids = torch.randint(0, 64, (2, 16))
    places = torch.tensor([positions(5, 11), positions(16)])
    expected = TokenLoss(made(LlamaConfig(**SIZES)).eval())(ids, places, ids)[0]
    monkeypatch.setattr(decoder, "forward", seen)
    monkeypatch.setattr("raysft.train.loss.is_varlen", lambda model: True)
    torch.testing.assert_close(loss(ids, places, ids)[0], expected)
    assert shapes == [(1, 32)]


@pytest.mark.parametrize(
    ("name", "capability", "refused"),
    [
        ("flash_attention_2", (7, 5), True),
        ("flash_attention_2", (8, 0), False),
        ("flash_attention_3", (8, 9), True),
        ("flash_attention_3", (9, 0), False),
        ("flash_attention_3", (10, 0), True),
        ("sdpa", (7, 5), False),
    ],
)
def test_flash_attention_needs_a_gpu_that_it_has_code_for(monkeypatch, name, capability, refused):
    monkeypatch.setattr("torch.cuda.get_device_capability", lambda device: capability)
    monkeypatch.setattr("torch.cuda.get_device_name", lambda device: "Tesla X")
    chosen = with_overrides(config(), {"model.attention": name, "model.dtype": "bfloat16", "scaling.use_gpu": True})
    if not refused:
        attention.check_kernel(chosen, torch.device("cuda"))
        return
    message = refusal(attention.check_kernel, chosen, torch.device("cuda"))
    assert holds(message, f"model.attention={name} needs a … GPU, but a worker has Tesla X; use … sdpa")


@pytest.mark.parametrize(
    ("family", "name", "remedy"),
    [
        ("gpt_oss", "sdpa", "use auto or eager"),
        ("gpt_oss", "flash_attention_2", "use auto or eager"),
        ("bloom", "sdpa", "use auto or eager"),
        ("gpt_neo", "flex_attention", "use auto or eager"),
        ("gpt_oss", "eager", ""),
        ("llama", "sdpa", ""),
    ],
)
def test_attention_that_a_model_does_not_compute_is_refused(family, name, remedy):
    on_gpu = {"model.dtype": "bfloat16", "scaling.use_gpu": True} if name.startswith("flash") else {}
    chosen = with_overrides(config(), {"model.attention": name, **on_gpu})
    hf_config = AutoConfig.for_model(family)
    if not remedy:
        assert attention.kernel(chosen, hf_config) == name
        return
    message = refusal(attention.kernel, chosen, hf_config)
    assert holds(message, f"model.attention={name} … (model_type={family}); {remedy}")


def test_flash_attention_is_chosen_for_models_that_compute_it_alone(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: True)
    chosen = with_overrides(config(), {"model.dtype": "bfloat16", "scaling.use_gpu": True})
    names = [attention.kernel(chosen, AutoConfig.for_model(family)) for family in ("llama", "gpt_oss", "bloom")]
    assert names == ["flash_attention_2", None, None]


@pytest.mark.parametrize(
    ("name", "package"), [("flash_attention_2", "flash-attn"), ("flash_attention_3", "flash_attn_3")]
)
def test_flash_attention_needs_its_package(name, package):
    if importlib.util.find_spec(attention.FLASH[name][0]):
        pytest.skip(f"{package} is installed")
    chosen = with_overrides(config(), {"model.attention": name, "model.dtype": "bfloat16", "scaling.use_gpu": True})
    message = refusal(attention.kernel, chosen)
    assert holds(message, f"model.attention={name} needs the package {package}; … sdpa")
