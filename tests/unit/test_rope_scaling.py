"""Scaled positions: a model computes with them what transformers does, in training, once it is saved, and in generation."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from raysft.config import Config, parse, with_overrides
from raysft.config.llamafactory.conversion import convert
from raysft.generate.engines.batching import obstacle
from raysft.generate.engines.static import TransformersEngine
from raysft.models.examples import Examples, Slice, begin
from raysft.models.rope_scaling import can_be_scaled, positions_of, scaled_config
from raysft.run.inputs import check_model_files, find_other_model
from raysft.run.warnings import beyond_positions, warnings
from raysft.train.export import save
from raysft.train.finetuning import load_model
from tests.messages import holds, refusal
from tests.tiny import tiny_model
from tests.unit.test_warnings import plan, source

THETA = {"rope_theta": 10000.0}
YARN = {**THETA, "rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
LLAMA3 = {**YARN, "rope_type": "llama3", "low_freq_factor": 1.0, "high_freq_factor": 4.0}
KINDS: dict[str, tuple[Any, dict[str, Any], int]] = {
    "linear": ("linear", {**THETA, "rope_type": "linear", "factor": 4.0}, 256),
    "linear, by its factor": (
        {"rope_type": "linear", "factor": 4},
        {**THETA, "rope_type": "linear", "factor": 4.0},
        256,
    ),
    # Its frequencies are computed from the positions before the scaling.
    "dynamic": ("dynamic", {**THETA, "rope_type": "dynamic", "factor": 4.0}, 64),
    "yarn": ("yarn", YARN, 256),
    "llama3": ("llama3", LLAMA3, 256),
    "mapping": (
        {"type": "yarn", "factor": 2, "beta_fast": 16, "original_max_position_embeddings": 32},
        {**YARN, "factor": 2.0, "beta_fast": 16.0, "original_max_position_embeddings": 32},
        64,
    ),
}
"""Name → ``model.rope_scaling``, the parameters and ``max_position_embeddings`` of a model with 64 positions for rows of 250."""


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    folder = tiny_model(tmp_path_factory.mktemp("base") / "model", spread=0.2)
    described = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**described, "max_position_embeddings": 64}))
    return folder


def make_config(folder: Path, model: Path, scaling: Any, finetuning: str = "full", **data: Any) -> Config:
    return parse({
        "model": {"path": str(model), "finetuning": finetuning, "dtype": "float32", "rope_scaling": scaling},
        "data": {"train": [{"name": "a", "path": "a"}], "cache": str(folder / "cache"), "sequence_length": 250, **data},
        "generate": {"max_new_tokens": 12, "do_sample": False},
    })  # fmt: skip


def by_hand(base: Path, parameters: dict[str, Any], positions: int) -> LlamaForCausalLM:
    """The weights of the model under a config that transformers makes."""
    described = LlamaConfig.from_pretrained(base).to_dict()
    hf_config = LlamaConfig(**{**described, "rope_parameters": parameters, "max_position_embeddings": positions})
    model = LlamaForCausalLM(hf_config).eval()
    weights = AutoModelForCausalLM.from_pretrained(base).state_dict()
    assert not model.load_state_dict(weights, strict=False).unexpected_keys
    return model


@torch.no_grad()
def logits(model: Any, tokens: torch.Tensor, **options: Any) -> torch.Tensor:
    return model(tokens, use_cache=False, **options).logits


def long_text(tokens: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(3, 390, (1, tokens), generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("kind", KINDS)
def test_the_trained_and_the_saved_model_compute_what_transformers_does(tmp_path, base, kind):
    asked, parameters, positions = KINDS[kind]
    config = make_config(tmp_path, base, asked)
    files = check_model_files(config, lambda line: None)
    model, tokens = load_model(config, files.model).eval(), long_text(200)
    reference = by_hand(base, parameters, positions)
    expected = logits(reference, tokens)
    assert torch.equal(logits(model, tokens), expected)
    assert not torch.allclose(expected, logits(AutoModelForCausalLM.from_pretrained(base), tokens), atol=1e-2)

    save(model, gather_alone(model), AutoTokenizer.from_pretrained(files.model), tmp_path / "saved")
    saved = AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    assert torch.equal(logits(saved, tokens), expected)
    assert (dict(saved.config.rope_parameters), saved.config.max_position_embeddings) == (parameters, positions)
    assert positions_of(files.hf_config) == (64 if kind == "mapping" else 256)

    again = replace(files, hf_config=None)
    assert check_model_files(config, lambda line: None).model == again.model
    assert find_other_model(config, str(tmp_path / "saved"), "evaluate.model", print).folder == tmp_path / "saved"
    assert find_other_model(config, str(base), "evaluate.model", print).location == files.model


def gather_alone(model: Any) -> dict[str, torch.Tensor]:
    return {name: weight.detach().clone() for name, weight in model.named_parameters() if weight.requires_grad}


@pytest.mark.parametrize(
    ("own", "kept"),
    [
        ({"rope_type": "yarn", "beta_fast": 16.0, "mscale": 0.7, "attention_factor": 1.1}, {"beta_fast": 16.0, "mscale": 0.7}),
        ({"rope_type": "llama3", "low_freq_factor": 2.0, "high_freq_factor": 8.0},
         {"low_freq_factor": 2.0, "high_freq_factor": 8.0}),
    ],
)  # fmt: skip
def test_a_model_that_is_scaled_further_keeps_the_rest_of_its_settings(tmp_path, base, own, kept):
    model, described = tmp_path / "model", json.loads((base / "config.json").read_text())
    shutil.copytree(base, model)
    own = {**THETA, "factor": 2.0, "original_max_position_embeddings": 64, **own}
    described |= {"rope_parameters": own, "max_position_embeddings": 128}
    (model / "config.json").write_text(json.dumps(described))
    config = make_config(tmp_path, model, own["rope_type"])
    found = check_model_files(config, lambda line: None).hf_config.rope_parameters
    expected = {**THETA, "rope_type": own["rope_type"], "factor": 4.0, "original_max_position_embeddings": 64, **kept}
    assert dict(found) == expected
    (model / "chat_template.jinja").write_text("of a later version")
    copy = Path(check_model_files(config, lambda line: None).model)
    assert (copy / "chat_template.jinja").read_text() == "of a later version"


def test_an_adapter_knows_the_model_with_scaled_positions(tmp_path, base):
    from peft import AutoPeftModelForCausalLM

    config = make_config(tmp_path, base, "yarn", "lora")
    files, tokens = check_model_files(config, lambda line: None), long_text(200)
    model = load_model(config, files.model).eval()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "lora_B" in name:
                weight.normal_(std=0.1, generator=torch.Generator().manual_seed(1))
    save(model, gather_alone(model), AutoTokenizer.from_pretrained(files.model), tmp_path / "saved")
    loaded = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "saved").eval()
    torch.testing.assert_close(logits(loaded, tokens), logits(model, tokens), atol=1e-5, rtol=1e-5)
    assert loaded.config.rope_parameters["rope_type"] == "yarn"
    other = make_config(tmp_path, base, {"rope_type": "yarn", "factor": 8})
    told = refusal(find_other_model, other, str(tmp_path / "saved"), "generate.model", print)
    assert holds(told, f"generate.model={tmp_path}/saved is an adapter … export")


LONGROPE = {
    **THETA, "rope_type": "longrope", "original_max_position_embeddings": 64,
    "short_factor": [1.0 + place / 8 for place in range(8)], "long_factor": [2.0 + place for place in range(8)],
}  # fmt: skip
BY_LENGTH = {"dynamic": KINDS["dynamic"][1:], "longrope": (LONGROPE, 256)}
"""Kinds of positions that depend on the length of a text, of a model that had 64 before."""


def scaled_by_length(folder: Path, base: Path, kind: str) -> Any:
    """The model as it is trained; with ``longrope`` it has been made so, as Phi-3 has."""
    config = make_config(folder, base, kind if kind == "dynamic" else None)
    if kind == "longrope":
        by_hand(base, *BY_LENGTH[kind]).save_pretrained(folder / "model")
        return load_model(config, str(folder / "model")).eval()
    return load_model(config, check_model_files(config, lambda line: None).model).eval()


@pytest.mark.parametrize("kind", BY_LENGTH)
def test_positions_of_an_example_depend_on_no_other(tmp_path, base, kind):
    """A row of a short, a long and a longer example, then a row of short ones, through one model."""
    model = scaled_by_length(tmp_path, base, kind)
    texts = [[long_text(length, length) for length in row] for row in ((20, 100, 130, 65), (60, 64, 30))]
    for row in texts:
        position_ids = torch.cat([torch.arange(text.shape[1]) for text in row])[None]
        found = logits(model, torch.cat(row, 1), position_ids=position_ids).split([text.shape[1] for text in row], 1)
        for text, of_text in zip(row, found, strict=True):
            alone = logits(by_hand(base, *BY_LENGTH[kind]), text)
            torch.testing.assert_close(of_text, alone, atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", BY_LENGTH)
def test_positions_of_a_slice_are_those_of_whole_examples(tmp_path, base, kind):
    rotary = scaled_by_length(tmp_path, base, kind).model.rotary_emb
    lengths, states = (20, 100, 130, 6), torch.zeros(1, 256, 8)
    positions = torch.cat([torch.arange(length) for length in lengths])[None]
    whole = rotary(states, positions)
    try:
        for start in range(0, 256, 64):
            own = slice(start, start + 64)
            begin(Examples.of_part(lengths, Slice(None, 4, own.start, own.stop)))
            for part, of_row in zip(rotary(states[:, own], positions[:, own]), whole, strict=True):
                assert torch.equal(part, of_row[:, own])
    finally:
        begin(None)


def test_dynamic_positions_are_generated_as_for_each_prompt_alone(tmp_path, base):
    config = make_config(tmp_path, base, "dynamic")
    folder = check_model_files(config, lambda line: None).model
    asked = [long_text(length, length)[0].tolist() for length in (58, 120, 9)]
    written = TransformersEngine(config, folder).complete(["a", "b", "c"], asked)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    for prompt, completion in zip(asked, written, strict=True):
        fresh = by_hand(base, *KINDS["dynamic"][1:])
        out = fresh.generate(torch.tensor([prompt]), max_new_tokens=12, do_sample=False, eos_token_id=2, pad_token_id=0)
        assert completion.text == tokenizer.decode(out[0, len(prompt) :], skip_special_tokens=True)
    assert "(dynamic)" in obstacle(config, folder)


def test_a_model_with_enough_positions_stays_as_it_is(tmp_path, base):
    said: list[str] = []
    config = make_config(tmp_path, base, "yarn", sequence_length=64)
    assert check_model_files(config, said.append).model == str(base)
    assert any("changes nothing" in line and "64 positions" in line for line in said)


def described_model(folder: Path, base: Path, kind: str, **settings: Any) -> Path:
    """A folder with the config of some model, whose weights nobody reads."""
    folder.mkdir()
    for file in base.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    AutoConfig.for_model(kind, vocab_size=400, **settings).save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    ("kind", "settings", "scaling", "said"),
    [
        ("gpt2", {}, "yarn", "model.rope_scaling='yarn' scales rotary positions, but … model_type=gpt2, which has none"),
        ("gemma3_text", {"max_position_embeddings": 64}, "yarn", "… positions of several kinds … rope_parameters"),
        ("llama", {"max_position_embeddings": 128, "rope_parameters": YARN}, "llama3",
         "… already (rope_type=yarn, to 128)"),
        ("gptj", {}, "linear", "… model_type=gptj, which has none"),
        # Its config knows a scaling of its own alone.
        ("phi3", {"max_position_embeddings": 64}, "linear",
         "… model_type=phi3, for which transformers does not take it (`rope… got linear); remove it"),
        ("phi3", {"max_position_embeddings": 64}, "yarn", "… model_type=phi3, for which … remove it"),
    ],
)  # fmt: skip
def test_models_whose_positions_cannot_be_scaled_are_refused(tmp_path, base, kind, settings, scaling, said):
    model = described_model(tmp_path / "model", base, kind, **settings)
    told = refusal(check_model_files, make_config(tmp_path, model, scaling), lambda line: None)
    further = scaling == "llama3"  # it has yarn, with a larger factor too
    assert can_be_scaled(make_config(tmp_path, model, None), AutoConfig.from_pretrained(model)) == further
    assert all(part in told for part in said.split("… ")), told


def test_three_positions_a_token_are_refused(tmp_path, base):
    """Those of Qwen's models for images, in time, height and width."""
    planes = {**THETA, "rope_type": "default", "mrope_section": [2, 3, 3]}
    hf_config = AutoConfig.for_model("qwen2_vl", text_config={"rope_parameters": planes, "max_position_embeddings": 64})
    told = refusal(scaled_config, make_config(tmp_path, base, "yarn"), hf_config, print)
    assert holds(
        told, "model.rope_scaling='yarn' … model.path … model_type=qwen2_vl_text, which has three (mrope); remove it"
    )


@pytest.mark.parametrize(
    ("scaling", "said"),
    [
        ("longrope", "model.rope_scaling"),
        ({"rope_type": "yarn", "facter": 4}, "did you mean factor?"),
        ({"rope_type": "linear", "factor": 0.5}, "factor=0.5 must be a number of at least 1"),
        ({"rope_type": "linear", "factor": float("nan")}, "factor=nan must be a number of at least 1"),
        ({"rope_type": "linear", "factor": "4"}, "factor=4 must be a number"),
        ({"rope_type": "linear", "type": "yarn", "factor": 4}, "rope_type=linear, but type=yarn; use one of them"),
        ({"rope_type": "llama3", "factor": 4, "low_freq_factor": 0}, "low_freq_factor=0 must be a number above 0"),
        ({"rope_type": "yarn", "factor": 4, "attention_factor": 0}, "attention_factor=0 must be a number above 0"),
        ({"rope_type": "yarn", "factor": 4, "beta_slow": 32}, "beta_fast=32 must be above beta_slow=32"),
        ({"rope_type": "linear", "beta_fast": 4}, "beta_fast is not a setting of linear"),
        ({"factor": 4}, "has no rope_type; set it to one of linear, dynamic, yarn, llama3"),
    ],
)
def test_settings_that_transformers_would_not_take_are_refused(tmp_path, base, scaling, said):
    assert said in refusal(make_config, tmp_path, base, scaling)


def test_examples_beyond_the_positions_are_told_with_the_remedy(tmp_path, base):
    planned = plan(sources={"a": source(beyond=12, longest=1900)}, positions=1024)
    long = {"data.sequence_length": 2048}
    (line,) = warnings(with_overrides(make_config(tmp_path, base, None), long), planned)
    assert holds(
        line, "source 'a': 12 of 20,000 examples … 1,024 positions … 1,900 tokens … model.rope_scaling=yarn … 1024"
    )
    (line,) = warnings(with_overrides(make_config(tmp_path, base, None), long), replace(planned, can_be_scaled=False))
    assert "trained; lower data.sequence_length to 1024" in line
    assert "rope_scaling" not in line
    (line,) = warnings(with_overrides(make_config(tmp_path, base, {"rope_type": "yarn", "factor": 2}), long), planned)
    assert "raise the factor of model.rope_scaling" in line


@pytest.mark.parametrize(
    ("tokens", "mask", "told"), [(1024, False, ""), (2048, False, "each row"), (2048, True, "'a'")]
)
def test_of_documents_the_rows_count(tmp_path, base, tokens, mask, told):
    """Rows cut longer documents, and are one text each if nothing keeps the documents apart."""
    planned = plan(stage="pt", sources={"a": source(beyond=12, longest=90_000)}, positions=1024)
    settings = {"stage": "pt", "data.sequence_length": tokens, "data.document_mask": mask}
    lines = list(beyond_positions(with_overrides(make_config(tmp_path, base, None), settings), planned))
    assert len(lines) == bool(told)
    assert all(told in line and "1,024 positions" in line and "1024" in line for line in lines)


@pytest.mark.parametrize("kind", ["linear", "dynamic", "yarn", "llama3"])
def test_the_key_of_llamafactory_gives_its_factor(base, kind):
    """``cutoff_len`` divided by the positions of the model, rounded up."""
    given = {"model_name_or_path": str(base), "stage": "sft", "do_train": True, "dataset": "a", "output_dir": "o"}
    config = parse(convert({**given, "rope_scaling": kind, "cutoff_len": 250}).config)
    assert config.model.rope_scaling == kind
    found = scaled_config(config, AutoConfig.from_pretrained(base), print).rope_parameters
    assert (found["rope_type"], found["factor"]) == (kind, 4.0)
