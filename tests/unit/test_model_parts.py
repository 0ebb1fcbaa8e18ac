"""Which weights belong to which part of a model for text and images, and which of them are trained."""

from __future__ import annotations

from importlib.util import find_spec

import pytest
import torch

from raysft.config import parse, with_overrides
from raysft.config.conflicts import refuse_conflicts
from raysft.errors import RequestError
from raysft.models.model_parts import part_of, whole_modules
from raysft.run.trained_parts import check_images
from raysft.train.check_model import check_model
from raysft.train.finetuning import check_names, load_model
from tests.shards import the_set, written
from tests.tiny import tiny_model
from tests.tiny_vision import FAMILIES, tiny_vision_model
from tests.training import make_config, write_conversations

PROJECTORS = {
    "llava": "multi_modal_projector", "llava-siglip": "multi_modal_projector", "idefics3": "connector",
    "qwen2-vl": "merger", "qwen2.5-vl": "merger", "qwen3-vl": "merger",
}  # fmt: skip
TOWERS = {
    "llava": "vision_tower", "llava-siglip": "vision_tower", "idefics3": "vision_model",
    "qwen2-vl": "visual", "qwen2.5-vl": "visual", "qwen3-vl": "visual",
}  # fmt: skip


def expected_part(family: str, name: str) -> str:
    """The part by the names that these families have."""
    names = name.split(".")
    if PROJECTORS[family] in names:
        return "projector"
    return "vision" if TOWERS[family] in names else "language"


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return {family: tiny_vision_model(tmp_path_factory.mktemp(family) / "model", family) for family in FAMILIES}


def config_of(folder, **settings):
    config = parse(
        {
            "run": {"name": "r", "storage": str(folder)},
            "model": {"path": str(folder), "dtype": "float32"},
            "data": {"train": [{"name": "d", "path": "d.jsonl"}]},
        }
    )
    return with_overrides(config, {f"model.{key}": value for key, value in settings.items()})


def trained_of(model) -> set[str]:
    return {name for name, weight in model.named_parameters() if weight.requires_grad}


@pytest.mark.parametrize("family", FAMILIES)
def test_each_weight_is_of_one_part(folders, family):
    model = load_model(config_of(folders[family], finetuning="full"), str(folders[family]))
    part = part_of(model)
    parts = {name: part(name) for name, _ in model.named_parameters()}
    assert parts == {name: expected_part(family, name) for name in parts}
    assert set(parts.values()) == {"language", "projector", "vision"}
    assert [name.rpartition(".")[2] for name in whole_modules(model, "projector")] == [PROJECTORS[family]]


@pytest.mark.parametrize(
    "wanted", [["language"], ["projector"], ["projector", "vision"], ["language", "projector", "vision"]]
)
@pytest.mark.parametrize("family", FAMILIES)
def test_full_trains_the_parts_alone(folders, family, wanted):
    model = load_model(config_of(folders[family], finetuning="full", train_parts=wanted), str(folders[family]))
    names = [name for name, _ in model.named_parameters()]
    assert trained_of(model) == {name for name in names if expected_part(family, name) in wanted}


@pytest.mark.parametrize("kind", ["lora", "oft"])
@pytest.mark.parametrize("wanted", [["language"], ["language", "projector"], ["vision"], ["language", "vision"]])
@pytest.mark.parametrize("family", FAMILIES)
def test_adapters_are_on_the_parts_and_the_projector_is_whole(folders, family, wanted, kind):
    settings = {"finetuning": kind, "train_parts": wanted, "oft.block_size": 8}
    model = load_model(config_of(folders[family], **settings), str(folders[family]))
    trained = trained_of(model)
    assert {expected_part(family, name) for name in trained} == set(wanted)
    for name in trained:
        whole = ".modules_to_save." in name
        assert whole == (expected_part(family, name) == "projector"), name


@pytest.mark.parametrize(
    ("family", "loose"), [("llava-next", ["model.image_newline"]), ("internvl", []), ("idefics3", [])]
)
def test_what_adapters_leave_frozen_of_the_projector_is_told(tmp_path, family, loose):
    folder, said = tiny_vision_model(tmp_path / "model", family), []
    config = config_of(folder, finetuning="lora", train_parts=["language", "projector"])
    short = {"data.sequence_length": 512}
    check_model(with_overrides(config, short), str(folder), said.append)
    model = load_model(config, str(folder))
    trained = {name.replace(".modules_to_save.default", "") for name in trained_of(model)}
    whole = load_model(config_of(folder, finetuning="full", train_parts=["projector"]), str(folder))
    assert {each for each in trained_of(whole) if f"base_model.model.{each}" not in trained} == set(loose)
    expected = f"model.train_parts names projector, but {', '.join(loose)} stays frozen: "
    assert [line.startswith(expected) for line in said] == [True] * len(loose)
    for other in ({"finetuning": "full", "train_parts": ["projector"]}, {"finetuning": "lora"}):
        check_model(with_overrides(config_of(folder, **other), short), str(folder), said.append)
    assert len(said) == len(loose)


@pytest.mark.parametrize("family", ["llava", "qwen2.5-vl"])
def test_modules_by_name_are_those_of_the_parts(folders, family):
    """The towers have modules of the same names."""
    name = "q_proj" if family == "llava" else "gate_proj"
    for wanted in (["language"], ["vision"], ["language", "vision"]):
        settings = {"finetuning": "lora", "train_parts": wanted, "lora.target": [name]}
        model = load_model(config_of(folders[family], **settings), str(folders[family]))
        assert {expected_part(family, each) for each in trained_of(model)} == set(wanted)
        assert all(f".{name}." in each for each in trained_of(model))


def test_a_layer_that_is_never_called_gets_no_adapter(folders):
    """SigLIP ends with torch's own attention, which computes with the weights of its output layer."""
    settings = {"finetuning": "lora", "train_parts": ["vision"]}
    model = load_model(config_of(folders["llava-siglip"], **settings), str(folders["llava-siglip"]))
    assert any(".head.attention.out_proj" in name for name, _ in model.named_parameters())
    assert not any(".head.attention" in name for name in trained_of(model))
    assert any(".head.mlp.fc1" in name for name in trained_of(model))


def test_freeze_trains_layers_of_the_decoder_and_whole_parts(folders):
    settings = {"finetuning": "freeze", "freeze.layers": 1, "freeze.extra_modules": ["norm"]}
    model = load_model(config_of(folders["qwen2-vl"], **settings), str(folders["qwen2-vl"]))
    assert all(".layers.1." in name or name.endswith("language_model.norm.weight") for name in trained_of(model))
    settings["train_parts"] = ["language", "projector"]
    more = load_model(config_of(folders["qwen2-vl"], **settings), str(folders["qwen2-vl"]))
    added = trained_of(more) - trained_of(model)
    assert added
    assert added == {name for name, _ in more.named_parameters() if ".merger." in name}


def test_a_text_model_has_no_such_parts(tmp_path):
    folder = tiny_model(tmp_path / "model")
    with pytest.raises(
        RequestError, match=r"model.train_parts=\['language', 'vision'\] names vision, but Llama.* no such part"
    ):
        load_model(config_of(folder, finetuning="full", train_parts=["language", "vision"]), str(folder))


def test_a_module_of_another_part_is_refused(folders):
    from transformers import AutoConfig, AutoModelForImageTextToText

    config = config_of(folders["llava"], **{"lora.target": ["fc1"]})
    with torch.device("meta"):
        model = AutoModelForImageTextToText.from_config(AutoConfig.from_pretrained(folders["llava"]))
    with pytest.raises(
        RequestError, match=r"lora.target names 'fc1', but the model has no such module in \['language'\]"
    ):
        check_names(model, config)
    check_names(model, with_overrides(config, {"model.train_parts": ["vision"]}))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"finetuning": "lora", "train_parts": ["projector"]}, "needs language or vision, which can have adapters"),
        ({"finetuning": "freeze", "train_parts": ["vision"]}, "freeze trains layers of the language model"),
        ({"finetuning": "full", "train_parts": ["vision"], "new_layers": 1}, "adds layers to the language model"),
        ({"finetuning": "full", "train_parts": ["vision"], "new_tokens.plain": ["<b>"]}, "requires trained embeddings"),
    ],
)
def test_settings_that_need_the_language_model(tmp_path, settings, message):
    with pytest.raises(RequestError, match=message):
        refuse_conflicts(config_of(tmp_path, **settings))


@pytest.mark.parametrize(
    ("parts", "message"), [([], "must not be empty"), (["vision", "vision"], "twice"), (["audio"], "audio")]
)
def test_parts_that_are_none(tmp_path, parts, message):
    with pytest.raises(RequestError, match=message):
        config_of(tmp_path, train_parts=parts)


@pytest.mark.parametrize("parts", [["projector"], ["language", "vision"]])
def test_text_alone_trains_no_part_that_sees_images(tmp_path, parts):
    write_conversations(tmp_path / "data.jsonl", 4)
    model = tiny_model(tmp_path / "model")
    manifest = written(the_set(make_config(tmp_path, model), str(model)), str(model))
    with pytest.raises(RequestError, match=f"trains {parts[-1]} on images, but data.train has none") as refused:
        check_images(config_of(model, finetuning="full", train_parts=parts), [manifest])
    assert "\n" not in str(refused.value)
    check_images(config_of(model, finetuning="full"), [manifest])


@pytest.mark.skipif(find_spec("bitsandbytes") is None, reason="needs bitsandbytes")
@pytest.mark.parametrize("kind", ["4bit", "8bit"])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_language_model_alone_is_quantized(folders, family, kind):
    settings = {"quantization": kind, "finetuning": "lora", "train_parts": ["language", "projector", "vision"]}
    model = load_model(config_of(folders[family], **settings), str(folders[family]))
    kinds = ("Linear4bit", "Linear8bitLt")
    quantized = {name for name, module in model.named_modules() if type(module).__name__ in kinds}
    assert {expected_part(family, name) for name in quantized} == {"language"}
    assert sum(name.endswith(".q_proj") for name in quantized) == 2
    assert not any("lm_head" in name for name in quantized)
