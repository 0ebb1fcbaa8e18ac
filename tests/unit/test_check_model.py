"""Checks of a model before anything starts."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest
import torch

from raysft.config import Config, TrainSection, parse
from raysft.errors import RequestError
from raysft.models.fingerprint import exact_fingerprint, model_fingerprint, tokenizer_fingerprint
from raysft.models.merging import merge
from raysft.train.check_model import check_model, check_shared_rows
from raysft.train.finetuning import load_model
from raysft.train.optim import make_lr_scheduler
from tests import messages


def config(**changes) -> Config:
    plain = {"model": {"path": "m"}, "data": {"train": [{"name": "a", "path": "a.jsonl"}], "sequence_length": 64}}
    return parse({**plain, **changes})


def lora(target: list[str]) -> Config:
    return config(model={"path": "m", "lora": {"target": target}})


def refusal(config: Config, folder: Path) -> str:
    return messages.refusal(check_model, config, str(folder))


def test_a_good_model_passes(model):
    check_model(config(), str(model))
    check_model(lora(["q_proj", "v_proj"]), str(model))


def test_a_module_that_is_not_there_is_named(model):
    assert "model.lora.target names 'zzz'" in refusal(lora(["q_proj", "zzz"]), model)


LONGROPE = {
    "rope_type": "longrope", "factor": 2.0, "rope_theta": 1e4, "short_factor": [1.0] * 3, "long_factor": [2.0] * 3,
    "original_max_position_embeddings": 64,
}  # fmt: skip
PHI = {**LONGROPE, "short_mscale": 1.0, "long_mscale": 1.2}
"""Phi-3.5-MoE also scales by the longest position that its code sees."""


@pytest.mark.parametrize(
    ("model_type", "settings", "message"),
    [
        (
            "llama",
            {"num_attention_heads": 6, "num_key_value_heads": 3},
            "heads, which is 6; use one of 2, 3, 6, or 1",
        ),
        ("phimoe", {"num_attention_heads": 8, "num_key_value_heads": 4, "rope_parameters": PHI}, "longrope positions"),
        ("qwen3_next", {}, "layers of type linear_attention"),
        ("mamba", {}, "layers of type linear_attention"),
        ("gpt_oss", {}, "its own attention, as for sinks"),
        ("bloom", {}, "its own attention, as for sinks or ALiBi"),
    ],
)
def test_a_model_whose_rows_workers_cannot_share_is_refused(model_type, settings, message):
    from transformers import AutoConfig

    sizes = {} if model_type == "bloom" else {"hidden_size": 48, "num_hidden_layers": 4}
    described = AutoConfig.for_model(model_type, **sizes, **settings)
    scaling = {"sequence_parallel": 4, "num_workers": 4}
    check_shared_rows(config(), described)
    refused = messages.refusal(check_shared_rows, config(scaling=scaling), described)
    assert message in refused
    assert refused.startswith("scaling.sequence_parallel=4 ")


@pytest.mark.parametrize(
    ("optimizer", "options", "message"),
    [
        ("adamw", {"fusedd": True}, "train.optimizer=adamw refuses train.optimizer_options={'fusedd': True}"),
        ("lion", {"betta": [0.9, 0.8]}, "train.optimizer=lion has no option 'betta'; did you mean betas?"),
        ("galore", {"rankk": 4}, "train.optimizer=galore has no option 'rankk'"),
        ("muon", {"nesterovv": True}, "train.optimizer=muon refuses train.optimizer_options"),
    ],
)
def test_an_option_that_the_optimizer_does_not_have_is_named(model, optimizer, options, message):
    wrong = config(
        model={"path": "m", "finetuning": "full"},
        train={"optimizer": optimizer, "optimizer_options": options, "optimizer_target": "all", "zero_stage": 0},
    )
    assert message in refusal(wrong, model)


@pytest.mark.parametrize(
    ("optimizer", "options"),
    [("adamw", {"amsgrad": True}), ("galore", {"rank": 4}), ("lion", {"cautious": True}), ("muon", {"momentum": 0.9}),
     ("adamw_8bit", {"min_8bit_size": 64}), ("adam_mini", {"model_sharding": False}), ("badam", {"switch_block_every": 2})],
)  # fmt: skip
def test_options_that_the_optimizer_has_pass(model, optimizer, options):
    full = {"path": "m", "finetuning": "full"}
    check_model(
        config(model=full, train={"optimizer": optimizer, "optimizer_options": options, "zero_stage": 0}), str(model)
    )


def test_no_layer_is_left_out_at_random(tmp_path):
    """Each worker would leave others out, and wait for those that the others do not."""
    from transformers import OPTConfig, OPTForCausalLM

    settings = OPTConfig(
        vocab_size=50, hidden_size=16, ffn_dim=32, num_hidden_layers=4, num_attention_heads=2, max_position_embeddings=64,
        word_embed_proj_dim=16, dropout=0.0, attention_dropout=0.0, layerdrop=0.5,
    )  # fmt: skip
    OPTForCausalLM(settings).save_pretrained(tmp_path)
    said: list[str] = []
    full = config(model={"path": "m", "finetuning": "full"})
    check_model(full, str(tmp_path), said.append)
    assert said == ["model: ignoring layerdrop=0.5 of its config.json; every step trains all layers"]
    model = load_model(full, str(tmp_path)).train()
    ids = torch.arange(20)[None]
    with torch.no_grad():
        found = [model(input_ids=ids).logits for _ in range(8)]
    assert all(torch.equal(each, found[0]) for each in found)


def test_rows_longer_than_a_table_of_positions_are_refused(model, tmp_path):
    """Positions that are computed have no end; a warning tells examples that are longer than those of the training before."""
    from transformers import GPT2Config, GPT2LMHeadModel

    long = config(data={"train": [{"name": "a", "path": "a"}], "sequence_length": 1024})
    GPT2LMHeadModel(GPT2Config(n_embd=8, n_layer=1, n_head=1, n_positions=512, vocab_size=400)).save_pretrained(
        tmp_path
    )
    assert "data.sequence_length=1024, but the model has 512 positions; use at most 512" in refusal(long, tmp_path)
    check_model(long, str(model))


def test_a_model_that_is_not_whole_is_refused(model, tmp_path):
    (tmp_path / "config.json").write_text((model / "config.json").read_text())
    assert "contains no weights" in refusal(config(), tmp_path)
    with pytest.raises(RequestError, match="contains no weights"):
        merge(tmp_path, tmp_path / "out")
    (tmp_path / "config.json").write_text("{")
    assert "its config.json cannot be used" in refusal(config(), tmp_path)


def test_the_identity_of_a_model_follows_its_config_and_weights(model, tmp_path):
    (tmp_path / "config.json").write_text((model / "config.json").read_text())
    (tmp_path / "model.safetensors").write_bytes((model / "model.safetensors").read_bytes())
    assert model_fingerprint(str(tmp_path)) == model_fingerprint(str(model))
    (tmp_path / "model.safetensors").write_bytes(b"")
    assert model_fingerprint(str(tmp_path)) != model_fingerprint(str(model))


def test_the_exact_identity_follows_the_times_of_the_files(model, tmp_path):
    folder = tmp_path / "copy"
    shutil.copytree(model, folder)  # with its times
    assert exact_fingerprint(str(folder)) == exact_fingerprint(str(model))
    os.utime(folder / "model.safetensors", ns=(1, 1))
    assert exact_fingerprint(str(folder)) != exact_fingerprint(str(model))


def test_the_identity_of_a_tokenizer_follows_its_files_and_not_the_weights(model, tmp_path):
    folder = tmp_path / "copy"
    shutil.copytree(model, folder)
    assert tokenizer_fingerprint(str(folder)) == tokenizer_fingerprint(str(model))
    (folder / "model.safetensors").write_bytes(b"")
    assert tokenizer_fingerprint(str(folder)) == tokenizer_fingerprint(str(model))
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    assert tokenizer_fingerprint(str(folder)) != tokenizer_fingerprint(str(model))


@pytest.mark.parametrize("name", ["cosine", "linear", "constant"])
def test_a_run_of_one_step_trains_with_the_whole_rate(name):
    optimizer = torch.optim.AdamW([torch.nn.Parameter(torch.zeros(1))], lr=0.5)
    assert make_lr_scheduler(optimizer, TrainSection(warmup_ratio=0.03, schedule=name), steps=1).get_last_lr() == [0.5]
