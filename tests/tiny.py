"""A model and a tokenizer small enough to make in a second, so that tests need neither a network nor a download."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

SENTENCES = (
    "The capital of France is Paris, and the capital of Germany is Berlin.",
    "Write a short poem about the sea and the wind that blows over it.",
    "Here is a list of three animals: the cat, the dog and the horse.",
    "What is the sum of 12 and 30? The sum of 12 and 30 is 42.",
    "你好，请介绍一下北京。北京是中国的首都。",
    "system user assistant tool You are a helpful assistant.",
)
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
"""ChatML, without ``{% generation %}`` marks."""
OTHER_TEMPLATE = (
    "{% for message in messages %}{{ message['role'] + ':\n' + message['content'] + '<|im_end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant:\n' }}{% endif %}"
)
"""A template in which no special token begins a turn."""
OWN_CODE = """\
from pathlib import Path

from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

Path({ran!r}).touch()


class OwnConfig(LlamaConfig):
    model_type = "own"


class OwnForCausalLM(LlamaForCausalLM):
    config_class = OwnConfig


class OwnTokenizerFast(PreTrainedTokenizerFast):
    pass
"""
"""A model of its own that is a Llama; ``ran`` is a file that it leaves behind when it is run."""


_EXPERTS = {"num_experts": 4, "moe_intermediate_size": 16}
_ROUTED = {"n_routed_experts": 4, "moe_intermediate_size": 16, "n_shared_experts": 1, "n_group": 1, "topk_group": 1}
_LATENT = {
    "first_k_dense_replace": 1, "q_lora_rank": 8, "kv_lora_rank": 8, "qk_rope_head_dim": 4, "qk_nope_head_dim": 4,
    "v_head_dim": 8, "head_dim": 4,
}  # fmt: skip
FAMILIES: dict[str, dict[str, Any]] = {
    "mixtral": {"num_local_experts": 4},
    "qwen2_moe": {**_EXPERTS, "shared_expert_intermediate_size": 16, "decoder_sparse_step": 1},
    "qwen3_moe": {**_EXPERTS, "norm_topk_prob": True, "mlp_only_layers": [0]},
    "deepseek_v2": {**_ROUTED, **_LATENT},
    "deepseek_v3": {**_ROUTED, **_LATENT},
    "glm4_moe": {**_ROUTED, "first_k_dense_replace": 1},
    "gpt_oss": {
        "num_local_experts": 4, "rope_parameters": {"rope_type": "default", "rope_theta": 1e4}, "sliding_window": 12,
    },
}  # fmt: skip
"""Mixtures of experts, each with a router or a block of its own: type of the model → settings of ``tiny_mixture``."""


def tiny_tokenizer(vocabulary: int = 400):
    """A byte-level BPE tokenizer with ChatML: any text can be encoded; ``<|im_end|>`` ends a turn, ``<|pad|>`` pads.

    Args:
        vocabulary: most tokens that it has, special ones and the 256 bytes included.
    """
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    special = ["<|pad|>", "<|im_start|>", "<|im_end|>"]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=[AddedToken(token, special=True) for token in special],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(SENTENCES, trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<|im_start|>",
        eos_token="<|im_end|>",
        pad_token="<|pad|>",
        model_max_length=512,
        clean_up_tokenization_spaces=False,
    )
    fast.chat_template = CHAT_TEMPLATE
    return fast


def tiny_model(folder: str | Path, seed: int = 0, spread: float = 0.1) -> Path:
    """Save a random two-layer Llama (hidden 64, float32) with ``tiny_tokenizer`` into ``folder``.

    Args:
        spread: standard deviation of the weights; at 0.2 greedy text varies from token to token, below it soon repeats.

    Returns:
        The folder, as AutoModelForCausalLM and AutoTokenizer load it. The same seed gives the same weights.
    """
    sizes = {"hidden_size": 64, "intermediate_size": 128}
    return _save_random(folder, "llama", seed, {**sizes, "initializer_range": spread, "tie_word_embeddings": True})


def other_model(folder: str | Path) -> Path:
    """Save a model like ``tiny_model`` with a vocabulary, a template and weights of its own."""
    tiny_model(folder, seed=3, spread=0.2)
    tokenizer = tiny_tokenizer(300)
    tokenizer.chat_template = OTHER_TEMPLATE
    tokenizer.save_pretrained(folder)
    return Path(folder)


def tiny_folder(folder: Path, config: str, spread: float = 0.1, file: str = "c.yaml", **chats: int) -> Path:
    """Fill a folder with a ``tiny_model`` in ``base``, a config, and conversations, so many in the file of each name."""
    tiny_model(folder / "base", spread=spread)
    for name, count in chats.items():
        write_chats(folder / f"{name}.jsonl", count)
    (folder / file).write_text(config)
    return folder


def tiny_mixture(folder: str | Path, model_type: str = "qwen3_moe", seed: int = 0, **settings: Any) -> Path:
    """Save a random mixture of experts, of two layers unless the settings say otherwise, with ``tiny_tokenizer`` into ``folder``.

    Args:
        model_type: as transformers has it.
        settings: what its config says beyond sizes.
    """
    sizes = {"hidden_size": 32, "intermediate_size": 48, "head_dim": 8, "num_experts_per_tok": 2}
    return _save_random(folder, model_type, seed, {**sizes, "initializer_range": 0.1, **settings})


def _save_random(folder: str | Path, model_type: str, seed: int, settings: dict[str, Any]) -> Path:
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    tokenizer = tiny_tokenizer()
    config = AutoConfig.for_model(
        model_type,
        vocab_size=len(tokenizer),
        num_attention_heads=4,
        max_position_embeddings=512,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        **{"num_hidden_layers": 2, "num_key_value_heads": 2, **settings},
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return Path(folder)


def write_chats(file: Path, count: int) -> None:
    """So many conversations of one question and one answer, no two of them alike."""
    words = " ".join(SENTENCES).split()
    with file.open("w") as lines:
        for index in range(count):
            question = " ".join(words[index % 40 : index % 40 + 4]) + f" {index}"
            answer = " ".join(words[(index * 7) % 40 : (index * 7) % 40 + 5])
            turns = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
            lines.write(json.dumps({"messages": turns}) + "\n")


def with_code(folder: Path, ran: Path, model_type: str = "own", origin: str = "", tokenizer: bool = False) -> Path:
    """Give a model (of ``tiny_model``) code of its own.

    Args:
        ran: what the code leaves behind when it is run.
        model_type: one that transformers knows (``llama``) can do without the code.
        origin: another repository that the code is in, as ``org/name--``.
        tokenizer: the tokenizer has a class of its own too.
    """
    (folder / "modeling_own.py").write_text(OWN_CODE.format(ran=str(ran)))
    description = json.loads((folder / "config.json").read_text())
    names = {"AutoConfig": "OwnConfig", "AutoModelForCausalLM": "OwnForCausalLM"}
    description["auto_map"] = {key: f"{origin}modeling_own.{name}" for key, name in names.items()}
    description |= {"model_type": model_type, "architectures": ["OwnForCausalLM"]}
    (folder / "config.json").write_text(json.dumps(description))
    if tokenizer:
        described = json.loads((folder / "tokenizer_config.json").read_text())
        described["auto_map"] = {"AutoTokenizer": [None, "modeling_own.OwnTokenizerFast"]}
        described["tokenizer_class"] = "OwnTokenizer"
        (folder / "tokenizer_config.json").write_text(json.dumps(described))
    return folder
