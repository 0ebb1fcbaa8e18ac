"""Models in GGUF files: the config, the weights and the tokenizer are in the file."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from raysft.errors import RequestError
from raysft.models.gguf import converted
from raysft.storage.path import StoragePath

NAMES = {
    "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm",
}  # fmt: skip
"""Module of a Llama's layer → tensor of the file."""


def write_gguf(model: Path, file: Path) -> None:
    """Write a Llama and its tokenizer as llama.cpp does."""
    import gguf

    weights, tokenizer = AutoModelForCausalLM.from_pretrained(model), AutoTokenizer.from_pretrained(model)
    config = weights.config
    writer = gguf.GGUFWriter(str(file), "llama")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_rope_dimension_count(config.hidden_size // config.num_attention_heads)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    tokens = tokenizer.convert_ids_to_tokens(range(len(tokenizer)))
    special = set(tokenizer.all_special_ids)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(tokens)
    writer.add_token_types([3 if index in special else 1 for index in range(len(tokens))])
    merges = json.loads(tokenizer.backend_tokenizer.to_str())["model"]["merges"]
    writer.add_token_merges([" ".join(pair) for pair in merges])
    writer.add_bos_token_id(tokenizer.bos_token_id)
    writer.add_eos_token_id(tokenizer.eos_token_id)
    writer.add_pad_token_id(tokenizer.pad_token_id)
    writer.add_chat_template(tokenizer.chat_template)
    for name, values in weights.state_dict().items():
        array = values.numpy()
        if ".q_proj" in name or ".k_proj" in name:  # the halves of each head alternate
            heads = config.num_attention_heads if ".q_proj" in name else config.num_key_value_heads
            half = len(array) // heads // 2
            array = array.reshape(heads, 2, half, -1).swapaxes(1, 2).reshape(array.shape)
        writer.add_tensor(_tensor_name(name), np.ascontiguousarray(array))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _tensor_name(name: str) -> str:
    outside = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
    module = name.removesuffix(".weight")
    if module in outside:
        return f"{outside[module]}.weight"
    _, _, layer, inside = module.split(".", 3)
    return f"blk.{layer}.{NAMES[inside]}.weight"


@pytest.fixture(scope="module")
def file(tmp_path_factory, model) -> Path:
    file = tmp_path_factory.mktemp("gguf") / "tiny.gguf"
    write_gguf(model, file)
    return file


def test_a_model_of_a_gguf_file_is_the_one_that_it_was_made_of(file, model, tmp_path):
    folder = converted(file, StoragePath(str(tmp_path)), lambda line: None, "model.path")
    one, other = (AutoModelForCausalLM.from_pretrained(each) for each in (model, folder))
    ids = torch.arange(3, 40)[None]
    torch.testing.assert_close(other(input_ids=ids).logits, one(input_ids=ids).logits, rtol=1e-5, atol=1e-5)
    one, other = (AutoTokenizer.from_pretrained(each) for each in (model, folder))
    text = "What is the sum of 12 and 30? 北京"
    assert other(text, add_special_tokens=False).input_ids == one(text, add_special_tokens=False).input_ids
    assert other.chat_template == one.chat_template


def test_a_file_that_is_no_gguf_is_refused_in_one_line(tmp_path):
    (tmp_path / "a.gguf").write_bytes(b"GGUF, but no more than that")
    with pytest.raises(RequestError, match=r"model\.path=.*a\.gguf: transformers cannot read this GGUF file") as raised:
        converted(tmp_path / "a.gguf", StoragePath(str(tmp_path / "cache")), lambda line: None, "model.path")
    assert "\n" not in str(raised.value)
