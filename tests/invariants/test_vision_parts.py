"""Training parts of a model for images: what is trained is as in a plain loop, and what is frozen stays bit for bit."""

from __future__ import annotations

from dataclasses import replace
from itertools import product
from typing import Any

import numpy as np
import pytest
from safetensors.torch import load_file
from transformers import AutoModelForImageTextToText

from raysft.models.model_parts import part_of
from tests.invariants.test_vision_training import STEPS, Family, case, make_family, plain_training
from tests.tiny_vision import FAMILIES, TILED
from tests.training import Case, Result, assert_same, train_all

PARTS = {
    "projector": ["projector"],
    "projector and vision": ["projector", "vision"],
    "all": ["language", "projector", "vision"],
}


def parts_case(family: Family, parts: list[str], **options: Any) -> Case:
    return case(family, {"model.train_parts": parts}, **options)


@pytest.fixture(scope="module")
def families(tmp_path_factory) -> dict[str, Family]:
    return {name: make_family(tmp_path_factory.mktemp(name), name) for name in (*FAMILIES, *TILED)}


@pytest.fixture(scope="module")
def trained(families, tmp_path_factory) -> dict[tuple[str, str], tuple[Result, Case]]:
    """(family, way) → its training with one worker."""
    kept = tmp_path_factory.mktemp("kept")
    cases = {}
    for name in FAMILIES:
        for way, parts in PARTS.items():
            cases[name, way] = parts_case(families[name], parts)
            cases[name, f"{way}, zero 3"] = parts_case(families[name], parts, zero_stage=3)
        adapters = ["language", "projector"]
        cases[name, "lora"] = parts_case(families[name], adapters, finetuning="lora")
        cases[name, "lora, zero 3"] = parts_case(families[name], adapters, finetuning="lora", zero_stage=3)
        saved = parts_case(families[name], ["projector"], save_every_steps=1)
        cases[name, "saved"] = replace(saved, keep=kept / name)
        cases[name, "resumed"] = replace(saved, resume=kept / name / f"checkpoint_{STEPS - 1}")
    cases |= {(name, "all"): parts_case(families[name], PARTS["all"]) for name in TILED}
    results = train_all(list(cases.values()))
    return {key: (result, cases[key]) for key, result in zip(cases, results, strict=True)}


@pytest.mark.parametrize(("name", "way"), [*product(FAMILIES, PARTS), *product(TILED, ["all"])])
def test_training_equals_a_plain_loop_and_the_rest_stays(families, trained, name, way):
    result, _ = trained[name, way]
    assert not result.failure
    plain = AutoModelForImageTextToText.from_pretrained(families[name].model)
    part = part_of(plain)
    names = [weight for weight, _ in plain.named_parameters() if part(weight) in PARTS[way]]
    losses, norms, weights = plain_training(plain, families[name], [f"{each}" for each in names])
    np.testing.assert_allclose(result.losses, losses, rtol=1e-5)
    np.testing.assert_allclose(result.norms, norms, rtol=1e-4)
    begun = AutoModelForImageTextToText.from_pretrained(families[name].model).state_dict()
    moved = set()
    for weight, value in AutoModelForImageTextToText.from_pretrained(result.model).named_parameters():
        now, before = value.detach().numpy(), begun[weight].numpy()
        if part(weight) in PARTS[way]:
            np.testing.assert_allclose(now, weights[weight], rtol=1e-5, atol=1e-5, err_msg=weight)
            if not np.array_equal(now, before):
                moved.add(part(weight))
        else:
            np.testing.assert_array_equal(now, before, err_msg=weight)
    assert moved == set(PARTS[way])


@pytest.mark.parametrize("way", [*PARTS, "lora"])
@pytest.mark.parametrize("name", FAMILIES)
def test_zero_changes_nothing(trained, name, way):
    other = trained[name, f"{way}, zero 3"][0]
    assert not other.failure
    assert_same(other[:4], trained[name, way][0][:4])


@pytest.mark.parametrize("name", FAMILIES)
def test_an_adapter_has_the_projector_in_full(families, trained, name):
    result = trained[name, "lora"][0]
    assert not result.failure
    saved = load_file(result.model / "adapter_model.safetensors")
    plain = AutoModelForImageTextToText.from_pretrained(families[name].model)
    part, begun = part_of(plain), plain.state_dict()
    of_projector = {each for each in begun if part(each) == "projector"}
    prefix = "base_model.model."
    whole = {each.removeprefix(prefix) for each in saved if ".lora_" not in each}
    assert whole == of_projector
    assert any(not saved[prefix + each].equal(begun[each]) for each in whole)
    assert {part(each.removeprefix(prefix)) for each in saved if ".lora_" in each} == {"language"}


@pytest.mark.parametrize("name", FAMILIES)
def test_resumed_is_uninterrupted(trained, name):
    (whole, _), (resumed, _) = trained[name, "saved"], trained[name, "resumed"]
    assert not resumed.failure
    assert resumed.losses == whole.losses[STEPS - 1 :]
    assert whole.weights.keys() == resumed.weights.keys()
    for weight, values in whole.weights.items():
        np.testing.assert_array_equal(values, resumed.weights[weight], err_msg=weight)


def test_two_workers_train_the_same_parts(families, trained):
    """One of them has rows without images, while the other has some."""
    names = ["llava", "qwen3-vl"]
    ways = [(name, way, stage) for name in names for way in ("projector", "all") for stage in (0, 2, 3)]
    cases = [parts_case(families[name], PARTS[way], zero_stage=stage, micro_batch_size=1) for name, way, stage in ways]
    for (name, way, stage), result in zip(ways, train_all(cases, 2), strict=True):
        assert not result.failure, (name, way, stage)
        assert_same(result[:4], trained[name, way][0][:4])
